"""Whether quantization-aware training converges, judged by its losses, metrics and points.

Every limit is a significance level, a bit (a factor of two in a scale, 6 dB), or the same collapse as in the pipeline
check. A flag names its limit and the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from typing_extensions import override

from lightning_qat.analysis.convergence.finite_values import finite_values
from lightning_qat.analysis.convergence.point_checks import (
    dead_gradients,
    drifting_scales,
    growing_clipping,
    oscillating_weights,
)
from lightning_qat.analysis.convergence.training_series import ConvergenceRow, TrainingSeries
from lightning_qat.analysis.ladder.rows import breaks, compare, format_falls, judged
from lightning_qat.analysis.ladder.sentences import LOWER_LEARNING_RATE
from lightning_qat.analysis.results import Block, Result
from lightning_qat.analysis.tolerance import STANDARD_ERRORS, tolerance
from lightning_qat.analysis.trend import STILL, Trend, block_length, mann_kendall, mean_and_error

ConvergenceVerdict = Literal[
    "not finite",
    "metric collapsed",
    "diverging",
    "dead gradients",
    "scales drift",
    "clipping grows",
    "weights oscillate",
    "not learning",
    "healthy",
    "too early",
]
SIGNIFICANCE = 0.001
"""Chance of a false alarm per test of a trend. A run is tested some twenty times, so about one healthy run in fifty
would pass this hurdle by chance; every flag needs a second condition besides."""
MOST_BLOCKS = 512
"""Blocks of a trend test at most: more cost time and find nothing that matters."""
_HEALTHY = (
    "healthy: losses, metrics and points are not worse than calibration left them, within what is tolerated. Whether "
    "that is good enough is not judged here: AccuracyTable(target=...) says."
)
FIRST_LOOK = 32
"""Steps before the loss is judged: eight blocks of four, and with fewer than eight the trend test cannot reach its
level."""


@dataclass(frozen=True)
class ConvergenceResult(Result[ConvergenceRow]):
    """Evidence and verdict.

    Args:
        verdict: the gravest flag, ``healthy``, or ``too early`` if nothing could be judged yet.
        note: the verdict as a sentence, with the next step.
        steps: optimizer steps looked at.
        epochs: evaluated epochs looked at.
    """

    verdict: ConvergenceVerdict = "too early"
    note: str = ""
    steps: int = 0
    epochs: int = 0
    title: ClassVar[str] = "Convergence"
    shown: ClassVar[tuple[str, ...]] = ("check", "status", "value", "limit", "evidence")

    @property
    def is_bad(self) -> bool:
        """Whether something was flagged."""
        return self.verdict not in ("healthy", "too early")

    @override
    def full_blocks(self) -> tuple[Block, ...]:
        """All columns, with what is left open among what to do."""
        rows = [{**cells, "next_step": row.advice} for cells, row in zip(self.to_dicts(), self.rows, strict=True)]
        columns = [column for column in self.columns() if column != "left_open"]
        return (Block.of(self.title, columns, rows, self.note),)


def judge_convergence(series: TrainingSeries) -> ConvergenceResult:
    """Judge a run by everything known so far; the checks come in the order in which they would be fixed.

    Args:
        series: what was recorded.

    Example:
        >>> from lightning_qat.analysis.convergence.training_series import TrainingSeries
        >>> judge_convergence(TrainingSeries(losses=(0.5, 0.4, float("nan")))).verdict
        'not finite'
        >>> judge_convergence(TrainingSeries(losses=(0.5,) * 8)).verdict
        'too early'
    """
    rows = tuple(check(series) for check in _CHECKS.values())
    flagged = [(verdict, row) for verdict, row in zip(_CHECKS, rows, strict=True) if row.status == "flagged"]
    counted = {"steps": max(series.steps, len(series.losses)), "epochs": series.evaluations}
    if flagged:
        verdict, first = flagged[0]
        return ConvergenceResult(rows, verdict, f"{verdict}: {first.evidence} {first.advice}", **counted)
    judged_loss = len(series.losses) >= FIRST_LOOK
    if not judged_loss and (series.metrics is None or series.calibrated is None):
        return ConvergenceResult(rows, "too early", "too early to judge: neither losses nor metrics yet.", **counted)
    return ConvergenceResult(rows, "healthy", _HEALTHY, **counted)


def _metric(series: TrainingSeries) -> ConvergenceRow:
    check = "metric"
    if series.calibrated is None or series.metrics is None:
        return ConvergenceRow(check, "cannot tell", evidence="no evaluation before and after an epoch yet")
    rows = compare(series.calibrated.metrics, series.metrics, series.calibrated)
    if not breaks(rows):
        kept = ", ".join(f"{row.metric} {row.expected:.4g} -> {row.value:.4g}" for row in judged(rows)[:2])
        if not kept:
            return ConvergenceRow(check, "cannot tell", evidence="no metric that was logged both times")
        return ConvergenceRow(check, "holds", evidence=f"against the calibrated model: {kept}.")
    worst = next(row for row in judged(rows) if row.status == "breaks")
    known = series.float_model
    lost = compare(known.metrics, series.calibrated, known) if known is not None else []
    calibration = (
        f"Calibration alone had lost much already ({format_falls(judged(lost))})."
        if breaks(lost)
        else "Calibration was right."
    )
    return ConvergenceRow(
        check,
        "flagged",
        worst.value,
        worst.expected,
        evidence=f"the metric has collapsed against the calibrated model's ({format_falls(judged(rows))}); a fall is "
        f"tolerated up to a tenth or to {STANDARD_ERRORS:g} standard errors, whichever is more. {calibration}",
        next_step=(
            "calibrated_diagnosis.txt says what is wrong, if LayerComparison() is listed."
            if breaks(lost)
            else "In any case, do not sweep learning rate and weight decay yet."
        ),
        left_open="points" if breaks(lost) else "quantization",
    )


def _diverging(series: TrainingSeries) -> ConvergenceRow:
    check = "loss trend"
    losses = [loss for loss in series.losses if math.isfinite(loss)]
    if len(losses) < FIRST_LOOK:
        return ConvergenceRow(check, "cannot tell", evidence=f"fewer than {FIRST_LOOK} steps")
    latest = losses[len(losses) // 2 :]
    whole, recent = _trend(losses), _trend(latest)
    first, last = mean_and_error(losses[: len(losses) // 4]), mean_and_error(losses[-(len(losses) // 4) :])
    rise, noise = last[0] - first[0], tolerance(first[1], last[1])
    evidence = (
        f"mean loss {first[0]:.4g} in the first quarter of {len(losses)} steps, {last[0]:.4g} in the last "
        f"(Mann-Kendall p = {whole.p_rise:.1g} for a rise; only p below {SIGNIFICANCE:g} counts as one)."
    )
    rises = whole.p_rise < SIGNIFICANCE and recent.p_rise < STILL and rise > noise
    if not rises:
        return ConvergenceRow(check, "holds", whole.p_rise, SIGNIFICANCE, evidence)
    if series.keeps_metric:
        return ConvergenceRow(check, "noted", whole.p_rise, SIGNIFICANCE, evidence + " The metric holds.")
    return ConvergenceRow(
        check,
        "flagged",
        whole.p_rise,
        SIGNIFICANCE,
        f"the training loss rises and goes on rising: {evidence}",
        f"Run FloatFinetune(): if the float model diverges too, {LOWER_LEARNING_RATE}; if it does not, fix the scales "
        "(activation_scales: fixed).",
    )


def _not_learning(series: TrainingSeries) -> ConvergenceRow:
    """A loss that stays above the float model's, where it started, with a metric that misses the float one."""
    check = "plateau"
    losses = [loss for loss in series.losses if math.isfinite(loss)]
    if len(losses) < FIRST_LOOK or series.float_loss is None:
        return ConvergenceRow(check, "cannot tell", evidence="too few steps, or no loss of the float model")
    start, now = mean_and_error(losses[: len(losses) // 4]), mean_and_error(losses[len(losses) // 2 :])
    reference = series.float_loss
    latest = losses[len(losses) // 2 :]
    falling = _trend(latest).p_fall < STILL
    above = now[0] - reference[0] > tolerance(now[1], reference[1])
    gained = start[0] - now[0] > tolerance(start[1], now[1])
    evidence = (
        f"mean loss {now[0]:.4g} in the second half of {len(losses)} steps, {start[0]:.4g} in the first quarter; the "
        f"float model's is {reference[0]:.4g}."
    )
    if falling or gained or not above or series.reaches_float:
        reason = _no_plateau(falling, gained, above)
        return ConvergenceRow(check, "holds", now[0], reference[0], f"{evidence} It is no plateau: {reason}.")
    return ConvergenceRow(
        check,
        "flagged",
        now[0],
        reference[0],
        f"training gains nothing: {evidence}",
        "If the loss does not move at all, the learning rate is too small or gradients are clipped to nothing.",
        left_open="points",
    )


def _no_plateau(falling: bool, gained: bool, above: bool) -> str:
    if not above:
        return "it is not above the float model's"
    if gained:
        return "it has fallen"
    return "it is falling" if falling else "the metric of the float model is reached"


_CHECKS: dict[ConvergenceVerdict, Callable[[TrainingSeries], ConvergenceRow]] = {
    "not finite": finite_values,
    "metric collapsed": _metric,
    "diverging": _diverging,
    "dead gradients": dead_gradients,
    "scales drift": drifting_scales,
    "clipping grows": growing_clipping,
    "weights oscillate": oscillating_weights,
    "not learning": _not_learning,
}


def _trend(losses: Sequence[float]) -> Trend:
    """The trend of a stretch of losses; of very long ones in larger blocks, as every pair of blocks is compared."""
    return mann_kendall(losses, max(block_length(losses), math.ceil(len(losses) / MOST_BLOCKS)))
