"""Samples that somebody has chosen by number, as the batch that a validation step receives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.callbacks.passes.extra_batches import ExtraBatch, extra_batches, transferred
from lightning_qat.callbacks.passes.fresh_loaders import Stage, fresh_loaders
from lightning_qat.callbacks.trainer import _compat


def chosen_samples(trainer: pl.Trainer, pl_module: pl.LightningModule, samples: Sequence[int] | None) -> ExtraBatch:
    """Return one batch of the validation data; of the calibration data, if there are no validation data.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        samples: numbers in the dataset of the (first) loader; None for its first batch.

    Raises:
        MisconfigurationException: there is no such sample, or the dataset has no numbers.
    """
    stage: Stage = "validate" if _compat.attached_loader(trainer, "validate") is not None else "calibration"
    if samples is None:
        first = next(iter(extra_batches(trainer, pl_module, 1, stage)), None)
        if first is None:
            raise MisconfigurationException("the data loader is empty, or limit_val_batches leaves nothing of it.")
        return first
    with fresh_loaders(trainer, pl_module, stage) as (loaders, source):
        loader = loaders.flattened[0]
        dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
        items = [_item(dataset, number) for number in samples]
        batch = collate(items) if collate is not None else items
        several = len(loaders.flattened) > 1 and source != "train"
    return ExtraBatch(transferred(trainer, pl_module, batch, 0, "validate"), 0, 0, several, source)


def _item(dataset: Any, number: int) -> Any:
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise MisconfigurationException(
            f"samples cannot be chosen from {type(dataset).__name__}, which has no numbers: leave --samples out to "
            "take the first batch."
        )
    if number >= len(dataset):
        raise MisconfigurationException(f"there is no sample {number}: the dataset has 0 to {len(dataset) - 1}.")
    return dataset[number]
