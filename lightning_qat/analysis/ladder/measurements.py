"""The evidence of the pipeline ladder: what was measured, and how one measurement compares with another.

A fall counts if it is larger than what evaluating on other batches would change: three standard errors of the metric
over the evaluation batches. Where something may move, a fall that counts is a collapse only if it also takes more than
a tenth away (the source's rule of thumb: above 90 % of the float value, go on training).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_qat.analysis.metric_direction import is_worse_when_larger
from lightning_qat.analysis.tolerance import COLLAPSE, STANDARD_ERRORS

Status = Literal["holds", "falls", "breaks", "noted", "cannot tell"]

TRAIN_LOSS = "train_loss"


@dataclass(frozen=True)
class Measurement:
    """One evaluation.

    Args:
        metrics: values by name.
        standard_errors: their variation over batches, where known.
    """

    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finetune:
    """What a finetune on a copy of the model did.

    Args:
        after: the evaluation after it.
        batches: training batches run.
        train_loss: mean training loss over them, None if the step returns none.
        train_loss_error: its standard error over batches.
        changed_parameters: names of the parameters that are not bit-identical to before.
        changed_by_optimizer: those of them that the optimizer's own step changed (looked at only with lr 0).
        moved_buffers: relative change of the buffers that moved (batch norm statistics), the largest first.
        moved_scales: the same for the scales of quantization points.
        learning_rates: the smallest and the largest that was used.
        losses: training losses by batch, of this rank.
        gradient_kept: share of the gradient's length that clipping leaves, in the median step (1: nothing is cut off).
        step_size: the largest change of a weight in one step, relative to the largest weight of its tensor and without
            that by weight decay; mean over the first steps.
    """

    after: Measurement
    batches: int
    train_loss: float | None = None
    train_loss_error: float | None = None
    changed_parameters: tuple[str, ...] = ()
    changed_by_optimizer: tuple[str, ...] = ()
    moved_buffers: Mapping[str, float] = field(default_factory=dict)
    moved_scales: Mapping[str, float] = field(default_factory=dict)
    learning_rates: tuple[float, float] | None = None
    losses: tuple[float, ...] = ()
    gradient_kept: float | None = None
    step_size: float | None = None


@dataclass(frozen=True)
class PipelineRow:
    """One number on one rung.

    Args:
        rung: number of the rung.
        what: what the rung does.
        metric: which number.
        expected: what it was before, or in the float run.
        value: what it is.
        tolerance: how much worse it may be.
        status: ``falls``: by more than the tolerance, but it is no collapse. ``noted``: evidence without judgement.
        note: what there is to say about it.
    """

    rung: int
    what: str
    metric: str
    expected: float | None
    value: float | None
    tolerance: float | None
    status: Status
    note: str = ""


def compare(
    rung: int,
    what: str,
    expected: Mapping[str, float],
    after: Measurement,
    noise: Measurement,
    strict: bool = False,
) -> list[PipelineRow]:
    """Compare metric by metric.

    Args:
        rung: number of the rung.
        what: what the rung does.
        expected: the values before.
        after: the evaluation after.
        noise: the evaluation whose standard errors give the tolerance.
        strict: nothing may have moved, so every fall beyond the tolerance breaks, however small.
    """
    return [_row(rung, what, name, before, after, noise, strict) for name, before in expected.items()]


def _row(
    rung: int, what: str, metric: str, before: float, after: Measurement, noise: Measurement, strict: bool
) -> PipelineRow:
    value = after.metrics.get(metric)
    if value is None or not math.isfinite(before):
        note = "not logged by the evaluation" if value is None else "not finite to begin with"
        return PipelineRow(rung, what, metric, before, value, None, "cannot tell", note)
    error = noise.standard_errors.get(metric, 0.0)
    # without an estimate (one batch, a metric of the whole epoch, batches that all agree) only a collapse counts
    tolerance = STANDARD_ERRORS * error if error > 0 else COLLAPSE * abs(before)
    tolerance = max(tolerance, 1e-6 * abs(before))  # float32 rounding of a mean
    fall = value - before if is_worse_when_larger(metric) else before - value
    status: Status = "breaks"  # NaN breaks
    if fall <= tolerance:
        status = "holds"
    elif not strict and fall <= COLLAPSE * abs(before):
        status = "falls"
    note = "" if error > 0 else "no estimate of the noise: a tenth is tolerated"
    return PipelineRow(rung, what, metric, before, value, tolerance, status, note)


def train_loss_row(rung: int, what: str, finetune: Finetune, reference: float | None = None) -> list[PipelineRow]:
    """Note the training loss; judge it if that of the float run is known."""
    loss = finetune.train_loss
    if loss is None:
        return []
    status: Status = "noted"
    tolerance = None
    if not math.isfinite(loss):
        status = "breaks"
    elif reference is not None:
        # batch norm and dropout are in another mode than in the float run: less than double says nothing
        tolerance = abs(reference) + STANDARD_ERRORS * (finetune.train_loss_error or 0.0)
        status = "holds" if loss - reference <= tolerance else "breaks"
    return [PipelineRow(rung, what, TRAIN_LOSS, reference, loss, tolerance, status)]


def drift_row(rung: int, what: str, metric: str, moved: Mapping[str, float]) -> list[PipelineRow]:
    """Note the largest relative change of statistics or scales, if any moved."""
    if not moved:
        return []
    name, largest = next(iter(moved.items()))
    note = f"relative change of {name}, the largest of {len(moved)} that moved"
    return [PipelineRow(rung, what, metric, None, largest, None, "noted", note)]


def skipped_row(rung: int, what: str, note: str) -> PipelineRow:
    """Say that a rung was not measured."""
    return PipelineRow(rung, what, "", None, None, None, "cannot tell", note)


def judged(rows: Sequence[PipelineRow]) -> list[PipelineRow]:
    """Return the rows that decide: a cost may rise while the scores hold (an overconfident classifier).

    Without scores the costs decide.
    """
    compared = [row for row in rows if row.tolerance is not None and row.metric != TRAIN_LOSS]
    return [row for row in compared if not is_worse_when_larger(row.metric)] or compared


def breaks(rows: Sequence[PipelineRow]) -> bool:
    """Whether a metric that decides breaks."""
    return any(row.status == "breaks" for row in judged(rows))


def spelled(rows: Sequence[PipelineRow]) -> str:
    """Spell the first rows that fall, scores first: ``val_acc 0.98 -> 0.1``."""
    fallen = sorted((r for r in rows if r.status in ("breaks", "falls")), key=lambda r: is_worse_when_larger(r.metric))
    return ", ".join(
        f"{row.metric} {row.value:.4g}"
        if row.expected is None
        else f"{row.metric} {row.expected:.4g} -> {row.value:.4g}"
        for row in fallen[:2]
    )
