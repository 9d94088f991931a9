"""Finetuning a copy of the module for a few batches and evaluating it.

The copy shares nothing with the run, so there is nothing to put back but the random state and what steps leave behind.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_qat.analysis.ladder.measurements import Finetune, Measurement
from lightning_qat.callbacks.ladder.same_values import same_values
from lightning_qat.callbacks.ladder.training_copy import TrainingCopy
from lightning_qat.callbacks.passes.evaluation import Evaluation, evaluate
from lightning_qat.callbacks.preservation.undisturbed import undisturbed
from lightning_qat.callbacks.quantized_run import evaluations_of
from lightning_qat.quantization.modules.batch_norms import is_batch_norm
from lightning_qat.quantization.modules.module_walk import REGION_NAME
from lightning_qat.quantization.planning.plan import ScaleRole
from lightning_qat.quantization.region.region import find_regions
from lightning_qat.quantization.region.switches import State


def measure(trainer: pl.Trainer, pl_module: pl.LightningModule, limit: float, copy: pl.LightningModule) -> Measurement:
    """Evaluate a copy of the module as validation does."""
    return _measurement(evaluate(trainer, pl_module, limit=limit, module=copy))


def measure_in_state(trainer: pl.Trainer, pl_module: pl.LightningModule, state: State, limit: float) -> Measurement:
    """Evaluate the module with all its regions in ``state``, and no scale moving."""
    return _measurement(evaluations_of(trainer).evaluate(trainer, pl_module, state, limit=limit))


def finetune_copy(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    *,
    batches: int,
    eval_batches: float,
    state: State,
    zero_lr: bool,
    freeze_batch_norm: bool = False,
    updates: Iterable[ScaleRole] = (),
    advance: Callable[[], Any] = lambda: None,
) -> Finetune:
    """Finetune a copy and evaluate it.

    Args:
        trainer: the running trainer, after its optimizers were set up.
        pl_module: its module, which is not changed.
        batches: training batches on this rank.
        eval_batches: validation batches on this rank.
        state: state of the copy's fake-quants.
        zero_lr: every step is made with learning rate 0.
        freeze_batch_norm: all batch norm in eval mode while training; else as it is in the run.
        updates: which scales follow the data.
        advance: called after each batch.
    """
    with undisturbed(trainer, pl_module):
        copy = TrainingCopy(trainer, pl_module, zero_lr, freeze_batch_norm)
        for region in find_regions(copy.module).values():
            region.set_state(state, updates)
        done = copy.train(batches, advance)
        changes = _changes(pl_module.named_parameters(), copy.module.named_parameters())
        buffers = _changes(pl_module.named_buffers(), copy.module.named_buffers())
        loss, error = copy.train_loss()
        after = measure(trainer, pl_module, eval_batches, copy.module)
    marker = f"{REGION_NAME}.fake_quants."
    scales = {name: change for name, change in {**changes, **buffers}.items() if marker in name}
    return Finetune(
        after=after,
        batches=done,
        train_loss=loss,
        train_loss_error=error,
        changed_parameters=tuple(name for name in changes if marker not in name),  # learned scales are no weights
        changed_by_optimizer=tuple(sorted(name for name in copy.changed_by_optimizer if marker not in name)),
        moved_buffers={
            name: change
            for name, change in buffers.items()
            if marker not in name and not name.endswith("num_batches_tracked")
        },
        moved_scales={
            _point_of(name, marker): change
            for name, change in sorted(scales.items(), key=lambda item: -item[1])
            if name.endswith(".scale")
        },
        learning_rates=(min(copy.learning_rates), max(copy.learning_rates)) if copy.learning_rates else None,
        losses=tuple(copy.losses),
        gradient_kept=statistics.median(copy.gradient_kept) if copy.gradient_kept else None,
        step_size=statistics.fmean(copy.step_sizes) if copy.step_sizes else None,
    )


def moves_batch_norm(pl_module: pl.LightningModule) -> bool:
    """Whether a batch norm updates its statistics in this training."""
    norms = (m for m in pl_module.modules() if is_batch_norm(m))
    return any(m.training and m.track_running_stats for m in norms)


def _measurement(evaluation: Evaluation) -> Measurement:
    return Measurement(evaluation.metrics, evaluation.standard_errors)


def _point_of(name: str, marker: str) -> str:
    path, _, rest = name.partition(marker)
    return path + rest.rsplit(".", 1)[0].replace("/", ".")


def _changes(before: Iterable[tuple[str, Tensor]], after: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Return the relative change of every tensor that is not bit-identical, the largest first."""
    known = dict(before)
    changes = {
        name: _relative_change(known[name], tensor) if name in known else 1.0
        for name, tensor in after
        if name not in known or not same_values(known[name], tensor)
    }
    return dict(sorted(changes.items(), key=lambda item: -item[1]))


@torch.no_grad()
def _relative_change(one: Tensor, other: Tensor) -> float:
    """Norm of the difference / larger of both norms. 0: no change; 1: as large as the tensor; 2: its sign flips."""
    if one.shape != other.shape:
        return 1.0
    a, b = one.detach().double().cpu(), other.detach().double().cpu()
    largest = max(float(a.norm()), float(b.norm()))
    return float((a - b).norm()) / largest if largest > 0 else 0.0
