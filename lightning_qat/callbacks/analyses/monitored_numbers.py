"""Numbers that EarlyStopping and ModelCheckpoint can monitor although they are missing in the first epochs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.listed_callbacks import listed


def check_early_stopping(trainer: pl.Trainer, callback: Callback, names: Collection[str], in_first_epoch: bool) -> None:
    """Refuse an EarlyStopping that would end the run in its first epoch because its number is still missing.

    Args:
        trainer: the running trainer, before the first epoch.
        callback: the callback that logs the numbers, at the end of epochs.
        names: names of the numbers.
        in_first_epoch: whether the callback logs them at the end of the first epoch already.

    Raises:
        MisconfigurationException: there is one, or it waits for a number that a ModelCheckpoint monitors too.
    """
    who, callbacks = type(callback).__name__, listed(trainer, Callback)
    for stopping in listed(trainer, EarlyStopping):
        name = stopping.monitor
        if name not in names or name in trainer.callback_metrics or not _compat.looks_after_each_epoch(stopping):
            continue
        if stopping.strict and callbacks.index(stopping) < callbacks.index(callback):
            raise MisconfigurationException(
                f"EarlyStopping({name!r}) is listed before {who}, so it would look for this number before it is there, "
                f"and end the run. List it behind {who}."
            )
        late = f"{who} has no number before it has analysed a model that has scales (start_epoch, every_n_epochs)"
        if stopping.strict and not in_first_epoch:
            raise MisconfigurationException(
                f"EarlyStopping({name!r}) would end the run after the first epoch: {late}. Write "
                f"EarlyStopping({name!r}, strict=False), which waits for it."
            )
        if not in_first_epoch and name in _sorted_by(trainer):
            raise MisconfigurationException(
                f"EarlyStopping and ModelCheckpoint both monitor {name!r}: {late}, and ModelCheckpoint cannot wait for "
                "it. Let it monitor another metric, such as val_loss."
            )


def log_numbers(
    trainer: pl.Trainer, pl_module: pl.LightningModule, names: Collection[str], numbers: Mapping[str, float]
) -> None:
    """Log numbers at the end of an epoch. Call it in every epoch and on all ranks.

    A ModelCheckpoint that sorts by a number fails if it is missing. Until there is a number, NaN is logged for it and
    counts as the worst. NaN is not logged if EarlyStopping monitors the number too, as NaN would end the run.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        names: names of all numbers that the callback may log.
        numbers: the numbers of this epoch, the same on all ranks.
    """
    awaited = _sorted_by(trainer).intersection(names).difference(numbers)
    if awaited:
        awaited -= trainer.callback_metrics.keys() | {stopping.monitor for stopping in listed(trainer, EarlyStopping)}
    for name, number in {**dict.fromkeys(sorted(awaited), math.nan), **numbers}.items():
        pl_module.log(name, number, sync_dist=trainer.world_size > 1)


def _sorted_by(trainer: pl.Trainer) -> set[str]:
    """The numbers that checkpoints are sorted by."""
    return {checkpoint.monitor for checkpoint in listed(trainer, ModelCheckpoint) if checkpoint.monitor is not None}
