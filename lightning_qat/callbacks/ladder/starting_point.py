"""The state that a training started from, kept for a later check."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_qat.callbacks.preservation.optimizer_state import apply_settings, settings_of


class StartingPoint:
    """Weights, buffers, optimizers and schedulers as they were; the tensors are kept in main memory.

    Args:
        trainer: the running trainer, before its first step.
        pl_module: its module.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tensors = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(pl_module)}
        self._groups = [settings_of(optimizer) for optimizer in trainer.optimizers]
        self._schedulers = [copy.deepcopy(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs]

    @contextmanager
    def restored(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
        """Restore the start in a block; on exit, the present state is put back, bit for bit."""
        present = {name: tensor.detach().clone() for name, tensor in _tensors(pl_module)}
        states = [optimizer.state for optimizer in trainer.optimizers]
        groups = [settings_of(optimizer) for optimizer in trainer.optimizers]
        schedulers = [copy.deepcopy(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs]
        try:
            _write(pl_module, self._tensors)
            for optimizer, settings in zip(trainer.optimizers, self._groups, strict=True):
                optimizer.state = defaultdict(dict)
                apply_settings(optimizer, settings)
            for config, state in zip(trainer.lr_scheduler_configs, self._schedulers, strict=True):
                config.scheduler.load_state_dict(copy.deepcopy(state))
            yield
        finally:
            _write(pl_module, present)
            for config, state in zip(trainer.lr_scheduler_configs, schedulers, strict=True):
                config.scheduler.load_state_dict(state)
            for optimizer, optimizer_state, settings in zip(trainer.optimizers, states, groups, strict=True):
                optimizer.state = optimizer_state
                apply_settings(optimizer, settings)


def _tensors(pl_module: pl.LightningModule) -> Iterator[tuple[str, Tensor]]:
    yield from pl_module.named_parameters()
    yield from pl_module.named_buffers()


def _write(pl_module: pl.LightningModule, tensors: dict[str, Tensor]) -> None:
    with torch.inference_mode(False), torch.no_grad():  # in this order: the former turns gradients on
        for name, tensor in _tensors(pl_module):
            if name in tensors and tensors[name].shape == tensor.shape:
                tensor.copy_(tensors[name])
