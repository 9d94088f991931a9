"""Where values that are not finite stand: in what a loader delivers, and in the buffers of a module."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_qat.analysis.convergence.training_series import TrainingSeries
from lightning_qat.analysis.nan_origin import first_bad_point
from lightning_qat.callbacks.passes.extra_batches import ExtraBatch
from lightning_qat.callbacks.passes.run_step import run_step
from lightning_qat.callbacks.preservation.module_copy import copied_module
from lightning_qat.callbacks.preservation.undisturbed import undisturbed
from lightning_qat.quantization import ranks
from lightning_qat.quantization.modules.module_walk import is_in_region
from lightning_qat.quantization.modules.tensor_leaves import is_float, named_leaves
from lightning_qat.quantization.region.region import find_regions


def non_finite_input(batch: Any) -> str:
    """Name the first tensor of a batch that is not finite, with what it holds; empty if all are.

    Example:
        >>> import torch
        >>> non_finite_input((torch.tensor([1.0, float("nan")]), torch.tensor(3)))
        '0 holds nan'
    """
    for name, tensor in named_leaves(batch):
        if is_float(tensor) and not bool(tensor.isfinite().all()):
            return f"{name or 'the tensor'} holds {'nan' if bool(tensor.isnan().any()) else 'inf'}"
    return ""


def non_finite_buffers(module: nn.Module) -> list[str]:
    """Return the names of the buffers that are not finite, such as statistics of a batch norm; scales are left out."""
    return [name for name, buffer in module.named_buffers() if not is_in_region(name) and _is_bad(buffer)]


def first_bad_op(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: tuple[Any, int] | None) -> str:
    """Run a training step again, and name the first op whose result is not finite; empty without a batch.

    It runs on a copy, as backward still needs the module.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        batch: what the step received, and its number.
    """
    if batch is None:
        return ""
    module = copied_module(pl_module)
    module.trainer = trainer
    extra = ExtraBatch(*batch, 0, False)
    with undisturbed(trainer, module):
        found = first_bad_point(find_regions(module), lambda: run_step(trainer, module, extra, "train"))
    return found or "in the loss itself, as every quantized op is finite"


def with_bad_values(
    series: TrainingSeries, module: nn.Module, ignored: Collection[str], batch: Any, at: str
) -> TrainingSeries:
    """Note the first batch that is not finite, and the first buffers that have become so.

    Args:
        series: what is known so far.
        module: after the step.
        ignored: buffers that were not finite to begin with, such as masks.
        batch: what the step received, None if it is not known.
        at: when this is, in words.
    """
    if ranks.count() > 1:
        at += f" on rank {ranks.rank()}"
    if not series.bad_input and (found := non_finite_input(batch)):
        series = replace(series, bad_input=f"{at}: {found}")
    names = [] if series.bad_buffers else [name for name in non_finite_buffers(module) if name not in ignored]
    return replace(series, bad_buffers=tuple(names), bad_since=at) if names else series


def as_all_ranks_found(series: TrainingSeries) -> TrainingSeries:
    """Complete a series by what other ranks found: each has its own batches, and buffers of its own in between.

    Of what several ranks found, that of the lowest is taken. Every rank must call this, and gets the same findings.
    """
    found = ranks.gathered_objects((series.first_bad, series.bad_input, series.bad_buffers, series.bad_since))
    first_bad = next((op for op, *_ in found if op), "")
    bad_input = next((where for _, where, *_ in found if where), "")
    buffers, since = next(((names, at) for *_, names, at in found if names), ((), ""))
    return replace(series, first_bad=first_bad, bad_input=bad_input, bad_buffers=buffers, bad_since=since)


def _is_bad(buffer: Tensor) -> bool:
    return is_float(buffer) and not bool(buffer.isfinite().all())
