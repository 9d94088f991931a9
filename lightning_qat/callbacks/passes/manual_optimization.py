"""Running the training step of a module that optimizes manually, without optimizing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from lightning_qat.callbacks.trainer import _compat


@contextmanager
def inert_optimization(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Let the calls that manual optimization makes do nothing, so that all of the step runs and no weight moves.

    Modules with automatic optimization are left alone.
    """
    if pl_module.automatic_optimization:
        yield
        return
    optimizers, schedulers = (
        _Inert() if count == 1 else [_Inert() for _ in range(count)] or None
        for count in _compat.optimizer_counts(trainer, pl_module)
    )

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    replaced: dict[str, Any] = {
        "optimizers": lambda *args, **kwargs: optimizers,
        "lr_schedulers": lambda: schedulers,
        "manual_backward": nothing,
        "toggle_optimizer": nothing,
        "untoggle_optimizer": nothing,
        "clip_gradients": nothing,
    }
    before = {name: pl_module.__dict__.get(name) for name in replaced}
    pl_module.__dict__.update(replaced)
    try:
        yield
    finally:
        for name, previous in before.items():
            if previous is None:
                del pl_module.__dict__[name]
            else:
                pl_module.__dict__[name] = previous


class _Inert:
    """Stands for an optimizer or a scheduler: everything on it does nothing, ``with`` works, a closure still runs."""

    param_groups: tuple[dict[str, Any], ...] = ()

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        return closure() if callable(closure) else None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *error: Any) -> None:
        return None
