"""Sketch what every module computes in the first step of a stage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torchmetrics import Metric

from lightning_qat.analysis.fingerprint.layer_calls import LayerCall, Sketch, Sketcher
from lightning_qat.analysis.fingerprint.module_settings import plain_modules
from lightning_qat.callbacks.passes.extra_batches import extra_batches
from lightning_qat.callbacks.passes.fresh_loaders import Stage
from lightning_qat.callbacks.passes.run_step import run_step
from lightning_qat.callbacks.trainer.seeding import seeded
from lightning_qat.quantization.modules.tensor_leaves import named_leaves

MOST_CALLS = 4
"""Calls of a module that are kept; a recurrent model may call one very often."""
Prepare = Callable[[pl.LightningModule, str], Any]


def layers_of_first_step(
    trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage, seed: int, prepare: Prepare
) -> tuple[LayerCall, ...]:
    """Sketch what the modules compute in the first step of a stage, in the order in which their calls begin.

    The step runs twice, with other random numbers: calls whose result is random are left out.

    Args:
        trainer: the running trainer.
        pl_module: its module; call this inside ``undisturbed``.
        stage: whose loader and step are used.
        seed: decides which batch is drawn.
        prepare: sets the modes of the modules ahead of the step.
    """
    with seeded(seed):
        extra = next(iter(extra_batches(trainer, pl_module, 1, stage)), None)
    if extra is None:
        return ()
    runs = []
    for number in range(2):
        recorder = _LayerRecorder()
        with seeded(seed + number), torch.no_grad():
            prepare(pl_module, stage)
            with recorder.recording(pl_module):
                run_step(trainer, pl_module, copy.deepcopy(extra), stage)  # a step may write into its batch
        runs.append(recorder.calls)
    one, other = runs
    if [call.name for call in one] != [call.name for call in other]:
        return ()
    return tuple(first for first, second in zip(one, other, strict=True) if first == second)


class _LayerRecorder:
    def __init__(self) -> None:
        self.calls: list[LayerCall] = []
        self._sketcher = Sketcher()
        self._open: dict[str, list[int | None]] = {}
        self._counts: dict[str, int] = {}

    @contextmanager
    def recording(self, pl_module: nn.Module) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for path, module in plain_modules(pl_module):
                if not isinstance(module, (Metric, torch.jit.ScriptModule)):
                    handles.append(module.register_forward_pre_hook(self._before(path), with_kwargs=True))
                    handles.append(module.register_forward_hook(self._after(path), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # sketched ahead of the call, which may write into them
            self._counts[path] = self._counts.get(path, 0) + 1
            kept = self._counts[path] <= MOST_CALLS
            self._open.setdefault(path, []).append(len(self.calls) if kept else None)
            if kept:
                self.calls.append(LayerCall(path, self._sketches((args, kwargs) if kwargs else args)))

        return hook

    def _after(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            number = self._open[path].pop() if self._open.get(path) else None
            if number is not None:
                self.calls[number] = LayerCall(path, self.calls[number].inputs, self._sketches(result))

        return hook

    def _sketches(self, value: Any) -> dict[str, Sketch]:
        return {path or "0": self._sketcher.sketch(tensor) for path, tensor in named_leaves(value)}
