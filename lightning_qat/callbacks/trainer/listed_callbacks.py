"""Finding one callback from another."""

from __future__ import annotations

from typing import TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

CallbackT = TypeVar("CallbackT", bound=Callback)


def listed(trainer: pl.Trainer, kind: type[CallbackT]) -> list[CallbackT]:
    """Return the trainer's callbacks of a class, subclasses included, in the order in which their hooks run."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]
