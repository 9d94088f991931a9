"""The rows of the pipeline check: how one measurement compares with another.

A fall counts if it is larger than what evaluating on other batches would change: three standard errors of the metric
over the evaluation batches. Where something may move, a fall that counts is a collapse only if it also takes more than
a tenth away (the source's rule of thumb: above 90 % of the float value, go on training).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_qat.analysis.ladder.measurements import Finetune, Measurement
from lightning_qat.analysis.ladder.rung_tolerance import metric_tolerance, same_samples_tolerance, train_loss_tolerance
from lightning_qat.analysis.ladder.rungs import FLOAT_MODEL, RUNG_NAMES, BrokenRung
from lightning_qat.analysis.metric_direction import higher_is_better, is_error_rate, is_objective, is_quality
from lightning_qat.analysis.tolerance import COLLAPSE

Status = Literal["holds", "falls", "breaks", "noted", "cannot tell"]

TRAIN_LOSS = "train_loss"


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
        note: an explanation.
    """

    rung: int
    what: str
    metric: str
    expected: float | None
    value: float | None
    tolerance: float | None
    status: Status
    note: str = ""


Evidence = tuple[list[PipelineRow], list[BrokenRung]]
"""Rows of one or several rungs, and those of the rungs that break."""


def compare(
    before: Mapping[str, float],
    after: Measurement,
    noise: Measurement,
    *,
    rung: int = FLOAT_MODEL,
    what: str = "",
    strict: bool = False,
    same_samples: bool = False,
) -> list[PipelineRow]:
    """Compare metric by metric. What is no matter of quality, such as seconds, is noted and not judged.

    Args:
        before: the values that are expected.
        after: the evaluation after.
        noise: the evaluation whose standard errors give the tolerance.
        rung: number of the rung.
        what: name of the rows, if it is not that of the rung.
        strict: nothing may have moved, so every fall beyond the tolerance breaks, however small.
        same_samples: both were measured on the same samples, so only rounding is tolerated.
    """
    return [
        _row(rung, what or RUNG_NAMES[rung], name, value, after, None if same_samples else noise, strict)
        for name, value in before.items()
    ]


def _row(
    rung: int, what: str, metric: str, before: float, after: Measurement, noise: Measurement | None, strict: bool
) -> PipelineRow:
    value = after.metrics.get(metric)
    if not is_quality(metric):
        return PipelineRow(rung, what, metric, before, value, None, "noted", "not judged: it does not measure quality")
    if value is None or not math.isfinite(before):
        note = "not logged by the evaluation" if value is None else "not finite to begin with"
        return PipelineRow(rung, what, metric, before, value, None, "cannot tell", note)
    note = ""
    if noise is None:
        tolerated = same_samples_tolerance(before)
    else:
        error = noise.standard_errors.get(metric, 0.0)
        tolerated = metric_tolerance(before, error)
        note = "" if error > 0 else "no estimate of the noise: a tenth is tolerated"
    fall = before - value if higher_is_better(metric) else value - before
    status: Status = "breaks"  # NaN breaks
    if fall <= tolerated:
        status = "holds"
    elif not strict and fall <= COLLAPSE * abs(before):
        status = "falls"
    return PipelineRow(rung, what, metric, before, value, tolerated, status, note)


def train_loss_row(rung: int, finetune: Finetune, reference: float | None = None) -> list[PipelineRow]:
    """Note the training loss; judge it if that of the float run is known."""
    loss = finetune.train_loss
    if loss is None:
        return []
    status: Status = "noted"
    tolerated = None
    if not math.isfinite(loss):
        status = "breaks"
    elif reference is not None:
        tolerated = train_loss_tolerance(reference, finetune.train_loss_error)
        status = "holds" if loss - reference <= tolerated else "breaks"
    return [PipelineRow(rung, RUNG_NAMES[rung], TRAIN_LOSS, reference, loss, tolerated, status)]


def drift_row(rung: int, metric: str, moved: Mapping[str, float]) -> list[PipelineRow]:
    """Note the largest relative change of statistics or scales, if any moved."""
    if not moved:
        return []
    name, largest = next(iter(moved.items()))
    note = f"relative change of {name}, the largest of {len(moved)} that moved"
    return [PipelineRow(rung, RUNG_NAMES[rung], metric, None, largest, None, "noted", note)]


def skipped_row(rung: int, note: str) -> PipelineRow:
    """Say that a rung was not measured."""
    return PipelineRow(rung, RUNG_NAMES[rung], "", None, None, None, "cannot tell", note)


def judged(rows: Sequence[PipelineRow]) -> list[PipelineRow]:
    """Return the rows that decide: the scores, and beside them the errors in the unit of a task.

    A loss may rise while the scores hold (an overconfident classifier). The error of another task may not. Without
    scores all costs decide.
    """
    compared = [row for row in rows if row.tolerance is not None and row.metric != TRAIN_LOSS]
    has_scores = any(higher_is_better(row.metric) for row in compared)
    return [row for row in compared if _decides_beside_scores(row)] if has_scores else compared


def _decides_beside_scores(row: PipelineRow) -> bool:
    if higher_is_better(row.metric):
        return True
    if not row.expected or row.value is None or is_objective(row.metric):  # a tenth of an error of zero is nothing
        return False
    if is_error_rate(row.metric, row.expected):  # 2 % wrong and 3 % wrong are 98 % and 97 % right
        return not row.value - row.expected <= COLLAPSE * (1 - row.expected)
    return True


def breaks(rows: Sequence[PipelineRow]) -> bool:
    """Whether a metric that decides breaks."""
    return any(row.status == "breaks" for row in judged(rows))


def format_falls(rows: Sequence[PipelineRow]) -> str:
    """Name the first rows that fall, scores first: ``val_acc 0.98 -> 0.1``."""
    fallen = [row for row in rows if row.status in ("breaks", "falls")]
    fallen.sort(key=lambda row: not higher_is_better(row.metric))
    return ", ".join(
        f"{row.metric} {row.value:.4g}"
        if row.expected is None
        else f"{row.metric} {row.expected:.4g} -> {row.value:.4g}"
        for row in fallen[:2]
    )
