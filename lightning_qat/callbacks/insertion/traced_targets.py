"""Learn the ops of the targets from a few steps, before the rest of the run is set up."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_qat.callbacks.insertion.target_discovery import captured_calls
from lightning_qat.callbacks.preservation.undisturbed import undisturbed
from lightning_qat.quantization.tracing.op_graph import OpGraph
from lightning_qat.quantization.tracing.tracer import trace


def traced_targets(
    trainer: pl.Trainer, pl_module: pl.LightningModule, target: str | list[str], batches: int, train_mode: bool = True
) -> dict[str, OpGraph]:
    """Trace the target(s) on what a few steps give to them.

    Args:
        trainer: the running trainer.
        pl_module: its module. It is on its training device meanwhile, as some kernels exist only there.
        target: ``auto``, a path, or several.
        batches: batches per step.
        train_mode: trace training steps, in train mode, too.

    Returns:
        The ops by the path of the target; ``""`` is the module itself.

    Raises:
        MisconfigurationException: a target does not exist or was not called.
        TracingError: no step could be run, or the ops cannot be traced.
    """
    with _on_device(pl_module, trainer.strategy.root_device), _quiet():
        calls = captured_calls(trainer, pl_module, target, batches, train_mode)
        with undisturbed(trainer, pl_module):  # a forward may count its calls
            return {path: trace(pl_module.get_submodule(path), c, train_mode) for path, c in calls.items()}


def graphs_of_rank_zero(trainer: pl.Trainer, graphs: dict[str, OpGraph]) -> dict[str, OpGraph]:
    """Return rank 0's graphs on all ranks; they may have drawn different batches. Call it on all ranks.

    Raises:
        MisconfigurationException: the ranks have found different targets.
    """
    if trainer.world_size == 1:
        return graphs
    first = trainer.strategy.broadcast({path: graph.to_dict() for path, graph in graphs.items()})
    if set(first) != set(graphs):
        raise MisconfigurationException(
            f"ranks disagree about the targets: {format_targets(first)} on rank 0, {format_targets(graphs)} on rank "
            f"{trainer.global_rank}. Name them: target: [...]."
        )
    return {path: OpGraph.from_dict(graph) for path, graph in first.items()}


def format_targets(paths: Iterable[str]) -> str:
    """Return the paths of targets as they are written in a message."""
    return "[" + ", ".join(repr(path) if path else "the whole module" for path in paths) + "]"


@contextmanager
def _on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a block with the module on another device, and move it back."""
    before = next((t.device for t in module.parameters()), device)
    moved = before != device and before.type != "meta"
    if moved:
        module.to(device)
    try:
        yield
    finally:
        if moved:
            module.to(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing is not training: advice about training would only puzzle."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is no training data in this")  # calibration says it
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        yield
