"""Every private name of Lightning that this package uses, in one place (lightning 2.6)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.connectors.data_connector import (
    _DataLoaderSource,
    _parse_num_batches,
    _request_dataloader,
)
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden

STAGES = {
    "train": RunningStage.TRAINING,
    "validate": RunningStage.VALIDATING,
    "test": RunningStage.TESTING,
    "predict": RunningStage.PREDICTING,
}

__all__ = ["STAGES", "RunningStage", "TrainerFn", "extract_batch_size", "is_overridden"]


@contextmanager
def running_stage(trainer: pl.Trainer, stage: str) -> Iterator[None]:
    """Let ``trainer.training``, ``trainer.validating`` ... answer for the step that runs."""
    before = trainer.state.stage
    trainer.state.stage = STAGES[stage]
    try:
        yield
    finally:
        trainer.state.stage = before


def attached_loader(trainer: pl.Trainer, stage: str) -> Any | None:
    """Return the loaders of a stage: fresh from their hook, or the instance given to ``fit``/``validate``/``test``."""
    loops: dict[str, list[Any]] = {
        "train": [trainer.fit_loop],
        "validate": [trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop],
        "test": [trainer.test_loop],
        "predict": [trainer.predict_loop],
    }
    for loop in loops[stage]:
        source: _DataLoaderSource = loop._data_source
        if source.instance is not None and source.is_defined():
            return _request_dataloader(source)
    return None


def hook_loader(owner: Any, name: str) -> Any | None:
    """Return a fresh loader from the hook ``name`` of a datamodule or module, or None if it has no such hook."""
    if owner is None or not callable(getattr(owner, name, None)):
        return None
    if name in ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader") and not is_overridden(
        name, owner
    ):
        return None
    if name.startswith(("train", "val", "test", "predict")):
        return _request_dataloader(_DataLoaderSource(owner, name))
    return getattr(owner, name)()


def prepared_loader(trainer: pl.Trainer, loader: Any, stage: str, shuffle: bool) -> Any:
    """Add a distributed sampler where the strategy needs one."""
    loader = trainer._data_connector._prepare_dataloader(loader, shuffle=shuffle, mode=STAGES[stage])
    return trainer.strategy.process_dataloader(loader)


def batch_limit(trainer: pl.Trainer, stage: str, length: float) -> float:
    """Number of batches after ``limit_*_batches``, ``fast_dev_run`` and ``overfit_batches``."""
    name = {"train": "train", "validate": "val", "test": "test", "predict": "predict"}[stage]
    limit = getattr(trainer, f"limit_{name}_batches")
    return float(_parse_num_batches(STAGES[stage], length, limit))


def steps_taken(trainer: pl.Trainer) -> int:
    """The step that Lightning's own loggers use as x-axis."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
