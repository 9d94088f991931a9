"""Settings of optimizers and schedulers that steps and hooks change (a warm-up by hand), and putting them back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """Copy everything in the groups of an optimizer but the parameters."""
    return [
        {k: v.clone() if isinstance(v, Tensor) else copy.copy(v) for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]


def apply_settings(optimizer: Any, groups: list[dict[str, Any]]) -> None:
    """Write copied settings into the groups; those that were added since keep theirs."""
    for group, settings in zip(optimizer.param_groups, groups, strict=False):
        for name, value in settings.items():
            if isinstance(group.get(name), Tensor) and isinstance(value, Tensor):
                group[name].copy_(value)  # schedulers and compiled optimizers hold on to the tensor
            else:
                group[name] = value


@contextmanager
def preserved_optimizers(trainer: pl.Trainer) -> Iterator[None]:
    """Put back the settings of the trainer's optimizers and the counters of its schedulers on exit."""
    groups = [(optimizer, settings_of(optimizer)) for optimizer in trainer.optimizers]
    schedulers = [(c.scheduler, dict(vars(c.scheduler))) for c in trainer.lr_scheduler_configs]
    try:
        yield
    finally:
        for optimizer, settings in groups:
            apply_settings(optimizer, settings)
        for scheduler, attributes in schedulers:
            scheduler.__dict__.update(attributes)
