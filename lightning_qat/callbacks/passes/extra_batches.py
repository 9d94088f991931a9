"""Batches beside those of the run: from fresh loaders, sent the way that Lightning's loops send them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from lightning_qat.callbacks.passes.fresh_loaders import Stage, fresh_loaders, samples_of_batch
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.messages import rank_zero_warn


@dataclass(frozen=True)
class ExtraBatch:
    """A batch on the device of the module, as a step receives it.

    Args:
        batch: what the step gets.
        batch_idx: its number in its loader.
        dataloader_idx: number of the loader.
        several_loaders: whether the step is told the number of the loader.
        source: the stage the batch was made for; a test or predict batch need not fit a validation step.
        samples: number of samples in it; None if the loader does not say.
    """

    batch: Any
    batch_idx: int
    dataloader_idx: int
    several_loaders: bool
    source: str = "train"
    samples: int | None = None


def extra_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, limit: float, stage: Stage = "calibration"
) -> Iterator[ExtraBatch]:
    """Yield batches of a stage from a fresh loader, on the device and in the precision the steps expect.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        limit: number of batches on this rank at most; the trainer's ``limit_*_batches`` hold too.
        stage: ``calibration``: ``calibration_dataloader()`` of the datamodule or module if there is one, else the
            training data, else the data of the stage that runs. Otherwise the loaders of that stage.

    Raises:
        MisconfigurationException: there is no loader to take batches from.
    """
    with fresh_loaders(trainer, pl_module, stage) as (combined, source):
        allowed = combined.limits
        several = len(allowed) > 1 and source != "train"
        _warn_about_one_shot_loaders(combined.flattened, source)
        end = min(limit, max(allowed, default=0) if source == "train" else sum(allowed))
        # calibration looks at what evaluation will see: no training augmentation on the way to the device
        shown = "validate" if stage == "calibration" else stage
        # islice: a batch too many would be lost to a loader that cannot start again
        for batch, batch_idx, dataloader_idx in itertools.islice(combined, None if end == float("inf") else int(end)):
            batch = transferred(trainer, pl_module, batch, dataloader_idx, shown)
            mixed = source == "train" and len(allowed) > 1  # a batch of several loaders
            samples = None if mixed else samples_of_batch(combined.flattened[dataloader_idx], batch_idx)
            yield ExtraBatch(batch, batch_idx, dataloader_idx, several, source, samples)


def transferred(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, dataloader_idx: int, stage: str) -> Any:
    """Send a batch the way Lightning's loops do: precision, hooks, device."""
    with _compat.running_stage(trainer, stage):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = _compat.before_transfer(pl_module, batch, dataloader_idx)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def _warn_about_one_shot_loaders(loaders: Iterable[Any], source: str) -> None:
    """Warn about loaders that cannot start again: an extra pass takes batches away from the run."""
    for kind in {type(loader).__name__ for loader in loaders if isinstance(loader, Iterator)}:
        rank_zero_warn(
            f"the {source} data come from an iterator ({kind}), which gives every batch once: tracing, calibration and "
            "analyses take batches that are missing in the run then. Give the Trainer a DataLoader, or an object whose "
            "__iter__ starts again."
        )
