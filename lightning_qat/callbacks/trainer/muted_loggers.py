"""Keeping what a step sends straight to a logger (``self.logger.experiment.add_image``) out of the run's logs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger


@contextmanager
def muted_loggers(trainer: pl.Trainer) -> Iterator[None]:
    """Mute the trainer's loggers in a block. Names and directories can still be read."""
    loggers = trainer.loggers
    trainer.loggers = [logger if isinstance(logger, _Muted) else _Muted(logger) for logger in loggers]  # type: ignore[misc]
    try:
        yield
    finally:
        trainer.loggers = loggers


class _Muted:
    """Looks like a logger, attributes and class included; its methods do nothing."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self.experiment = _Silent()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._logger)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._logger, name)
        return (lambda *args, **kwargs: None) if callable(value) else value


class _Silent:
    """Replaces the object that a logger writes with (``experiment``): all of its methods do nothing."""

    def __getattr__(self, name: str) -> _Silent:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Silent:
        return self

    def __getitem__(self, key: Any) -> _Silent:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        return None
