"""Loaders for an extra pass over data. They share no worker, no position and no random state with the run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lightning_qat.callbacks.passes.calibration_batches import calibration_loaders
from lightning_qat.callbacks.preservation.module_state import preserved_loader_state
from lightning_qat.callbacks.trainer import _compat

Stage = Literal["train", "validate", "test", "predict", "calibration"]


@contextmanager
def fresh_loaders(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> Iterator[tuple[Any, str]]:
    """Yield a CombinedLoader of our own, limited as the trainer limits it, and the stage its data belong to.

    On exit its workers are ended, and generators, samplers and datasets that it shares with the run are put back.

    Raises:
        MisconfigurationException: there is no loader to take batches from.
    """
    loaders, source = _loaders(trainer, pl_module, stage)
    mode = "max_size_cycle" if source == "train" else "sequential"
    if isinstance(loaders, CombinedLoader):
        loaders, mode = loaders.iterables, _compat.mode_of(loaders)
    combined = CombinedLoader(loaders, mode)  # type: ignore[arg-type]
    combined.flattened = [_clone(loader) for loader in combined.flattened]
    if trainer.overfit_batches > 0:  # type: ignore[attr-defined]
        _compat.take_first_batches(combined, source)
    with preserved_loader_state(combined.flattened):
        combined.flattened = [
            _compat.prepared_loader(trainer, loader, source, shuffle=_is_shuffled(loader))
            for loader in combined.flattened
        ]
        combined.limits = [_compat.batch_limit(trainer, source, _length(loader)) for loader in combined.flattened]
        try:
            yield combined, source
        finally:
            combined.reset()


def _loaders(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> tuple[Any, str]:
    """Return loaders and the stage whose limits and samplers apply to them."""
    if stage == "calibration":
        return calibration_loaders(trainer, pl_module)
    loader = _compat.attached_loader(trainer, stage)
    if loader is None:
        raise MisconfigurationException(f"there is no {stage} dataloader to take batches from.")
    return loader, stage


def _clone(loader: Any) -> Any:
    """A loader of our own: iterating the user's would end the persistent workers of the epoch that uses it."""
    if not isinstance(loader, DataLoader):
        return loader
    clone = copy.copy(loader)
    clone.__dict__["_iterator"] = None
    return clone


def _is_shuffled(loader: Any) -> bool:
    return isinstance(getattr(loader, "sampler", None), torch.utils.data.RandomSampler)


def samples_of_batch(loader: Any, batch_idx: int) -> int | None:
    """Return the number of samples in a batch; None if the loader does not say.

    Args:
        loader: of :func:`fresh_loaders`.
        batch_idx: number of the batch in it.
    """
    size = getattr(loader, "batch_size", None)
    if not isinstance(loader, DataLoader) or size is None:
        return None
    try:
        return int(min(size, len(loader.sampler) - batch_idx * size))  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # an iterable dataset
        return None


def _length(loader: Any) -> float:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return float("inf")
