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
from lightning_qat.analysis.ladder.rungs import FLOAT_MODEL, RUNG_NAMES, BrokenRung
from lightning_qat.analysis.metric_direction import higher_is_better
from lightning_qat.analysis.tolerance import COLLAPSE, ROUNDING, tolerance

Status = Literal["holds", "falls", "breaks", "noted", "cannot tell"]

TRAIN_LOSS = "train_loss"
ROUNDING_OF_A_MEAN = 1e-6
"""Relative difference that float32 makes of the mean of the same numbers."""


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
    """Compare metric by metric.

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
    if value is None or not math.isfinite(before):
        note = "not logged by the evaluation" if value is None else "not finite to begin with"
        return PipelineRow(rung, what, metric, before, value, None, "cannot tell", note)
    note = ""
    if noise is None:
        tolerated = ROUNDING * abs(before)
    elif (error := noise.standard_errors.get(metric, 0.0)) > 0:
        tolerated = tolerance(error, least=ROUNDING_OF_A_MEAN * abs(before))
    else:  # one batch, a metric of the whole epoch, batches that all agree: only a collapse counts
        tolerated = COLLAPSE * abs(before)
        note = "no estimate of the noise: a tenth is tolerated"
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
        # batch norm and dropout are in another mode than in the float run: less than double says nothing
        tolerated = abs(reference) + tolerance(finetune.train_loss_error or 0.0)
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
    """Return the rows that decide: a cost may rise while the scores hold (an overconfident classifier).

    Without scores the costs decide.
    """
    compared = [row for row in rows if row.tolerance is not None and row.metric != TRAIN_LOSS]
    return [row for row in compared if higher_is_better(row.metric)] or compared


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
