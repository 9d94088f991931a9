"""Measure how far a training can move its model: a few steps of a copy, and the schedule simulated to the end."""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_debug  # type: ignore[attr-defined]

from lightning_qat.analysis.fingerprint.training_plan import TrainingPlan, planned
from lightning_qat.callbacks.ladder.training_copy import TrainingCopy
from lightning_qat.callbacks.preservation.optimizer_state import settings_of
from lightning_qat.callbacks.preservation.undisturbed import undisturbed
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.seeding import seeded
from lightning_qat.quantization.modules.module_walk import is_in_region

MOST_STEPS = 10_000
"""Steps of the schedule that are simulated; of a longer training this is where a schedule that steps too often ends."""
_STEPS_MEASURED = 4
_MOST_BATCHES = 64
"""Of batches for the steps that are measured; more if one step takes more, up to four times as many."""


def plan_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> TrainingPlan | None:
    """Simulate the schedules of a training that has not begun until its planned end; nothing is measured.

    Args:
        trainer: the running trainer, with its optimizers.
        pl_module: its module.

    Returns:
        The plan; None without optimizers, or where the schedules cannot be simulated.
    """
    scales = {id(p) for name, p in pl_module.named_parameters() if is_in_region(name)}
    steps = planned_steps(trainer)
    try:
        groups, rates = _simulated(trainer, pl_module, max(1, min(steps, MOST_STEPS)))
    except Exception as error:  # a fingerprint without it is better than a run that ends
        rank_zero_debug(f"the learning rate schedules cannot be simulated: {error!r}")
        return None
    kept = [number for number, group in enumerate(groups) if any(id(p) not in scales for p in group["params"])]
    groups, rates = [groups[number] for number in kept], [rates[number] for number in kept]
    if not groups:
        return None
    return replace(
        planned(steps, rates, [float(group.get("weight_decay", 0.0)) for group in groups]),
        samples=_samples_per_step(trainer),
        base_rates=tuple(float(group.get("initial_lr", group.get("lr", 0.0))) for group in groups),
        horizon=max(_horizon(group) for group in groups),
    )


def _simulated(
    trainer: pl.Trainer, pl_module: pl.LightningModule, steps: int
) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """Return the groups of all optimizers, and their learning rates by step."""
    memo: dict[int, Any] = {id(pl_module): pl_module, id(trainer): trainer}
    groups: list[dict[str, Any]] = []
    for optimizer in map(_compat.bare, trainer.optimizers):
        own = [
            {**settings, "params": group["params"]}
            for settings, group in zip(settings_of(optimizer), optimizer.param_groups, strict=True)
        ]
        # all that a scheduler asks of its optimizer
        memo[id(optimizer)] = SimpleNamespace(param_groups=own, defaults=optimizer.defaults, step=None)
        groups += own
    before = [dict(group) for group in groups]
    schedulers = [(config, copy.deepcopy(config.scheduler, memo)) for config in trainer.lr_scheduler_configs]
    batches, accumulated = float(trainer.num_training_batches), max(1, trainer.accumulate_grad_batches)
    batches = batches if batches > 0 else math.inf
    per_epoch = math.ceil(batches / accumulated) if math.isfinite(batches) else MOST_STEPS
    rates: list[list[float]] = [[] for _ in groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schedulers miss the steps of their optimizer
        for number in range(1, steps + 1):
            for found, group in zip(rates, groups, strict=True):
                found.append(float(group.get("lr", 0.0)))
            epoch, position = divmod(number - 1, per_epoch)
            # as Lightning counts: batches of this epoch, or epochs that have ended
            counts = {"step": min((position + 1) * accumulated, batches)}
            if position + 1 == per_epoch:
                counts["epoch"] = epoch + 1
            for config, scheduler in schedulers:
                count = counts.get(config.interval)
                if count is not None and not config.reduce_on_plateau and count % config.frequency == 0:
                    scheduler.step()
    return before, rates


def planned_steps(trainer: pl.Trainer) -> int:
    """Return the optimizer steps that a training will have; 0 if that is not known."""
    try:
        steps = float(trainer.estimated_stepping_batches)
    except Exception:  # loaders that cannot say how long they are
        return 0
    return int(steps) if math.isfinite(steps) and steps > 0 else 0


def with_updates(
    trainer: pl.Trainer, pl_module: pl.LightningModule, plan: TrainingPlan | None, seed: int
) -> TrainingPlan | None:
    """Train a copy for a few steps, and add how much a step changes each group, and what clipping keeps.

    The optimizers of the copy begin anew, with the highest learning rate of the plan. So it is the same measure at the
    start of QAT and at the end of the float run.
    """
    if plan is None or not (pl_module.automatic_optimization and any(plan.rates)):
        return plan
    try:
        with undisturbed(trainer, pl_module, trains=True), seeded(seed):
            trained = TrainingCopy(trainer, pl_module, zero_lr=False, freeze_batch_norm=False)
            trained.begin_anew(plan.rates)
            accumulated = max(1, trainer.accumulate_grad_batches)
            batches = max(accumulated, min(_STEPS_MEASURED * accumulated, _MOST_BATCHES))
            trained.train(min(batches, 4 * _MOST_BATCHES), lambda: None)
    except Exception as error:
        rank_zero_debug(f"how far a step moves the weights is not measured: {error!r}")
        return plan
    if not any(trained.group_updates):
        return plan  # no step was made
    kept = statistics.median(trained.gradient_kept) if trained.gradient_kept else None
    updates = tuple(statistics.fmean(sizes) if sizes else 0.0 for sizes in trained.group_updates)
    return replace(plan, updates=updates, kept=kept)


def _samples_per_step(trainer: pl.Trainer) -> float | None:
    size = getattr(_compat.attached_loader(trainer, "train"), "batch_size", None)
    if not isinstance(size, int):
        return None
    accumulated = float(max(1, trainer.accumulate_grad_batches))
    batches = trainer.num_training_batches
    if math.isfinite(batches) and batches > 0:  # the last step of an epoch takes what is left
        accumulated = batches / math.ceil(batches / accumulated)
    return float(size * accumulated * trainer.world_size)


def _horizon(group: dict[str, Any]) -> float:
    betas = group.get("betas")
    momentum = float(betas[0] if isinstance(betas, (tuple, list)) and betas else group.get("momentum", 0.0) or 0.0)
    return 1 / (1 - momentum) if 0 <= momentum < 1 else math.inf if momentum >= 1 else 1.0
