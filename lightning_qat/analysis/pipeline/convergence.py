"""Whether quantization-aware training converges, judged by its losses, metrics and points (C1, C2).

Every limit is a significance level, a bit (a factor of two in a scale, 6 dB) or the collapse the pipeline checks use; a
flag says which, and what to do next.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning_qat.analysis.pipeline.convergence_rows import ConvergenceRow, PointHealth, TrainingSeries
from lightning_qat.analysis.pipeline.pipeline_rows import STANDARD_ERRORS, Measurement, breaks, compare, judged, spelled
from lightning_qat.analysis.pipeline.trend import Trend, block_length, mann_kendall
from lightning_qat.analysis.results import Result

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
ONE_BIT = 20 * math.log10(2)
"""A bit of resolution in dB: W. R. Bennett, "Spectra of quantized signals", Bell System Technical Journal 27 (1948)."""
MOST_BLOCKS = 512
"""Blocks of a trend test at most: more cost time and find nothing that matters."""
FIRST_LOOK = 32
"""Steps before the loss is judged: fewer give no four independent blocks of a correlated series."""


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


def judge_convergence(series: TrainingSeries) -> ConvergenceResult:
    """Judge a run by everything known so far; the checks come in the order in which they would be fixed.

    Args:
        series: what was recorded.

    Example:
        >>> from lightning_qat.analysis.pipeline.convergence_rows import TrainingSeries
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
        return ConvergenceResult(rows, verdict, f"{verdict}: {first.evidence} {first.next_step}", **counted)
    judged_loss = len(series.losses) >= FIRST_LOOK
    if not judged_loss and (series.metrics is None or series.calibrated is None):
        return ConvergenceResult(rows, "too early", "too early to judge: neither losses nor metrics yet.", **counted)
    return ConvergenceResult(rows, "healthy", "healthy: nothing in losses, metrics or points looks wrong.", **counted)


def _finite_losses(series: TrainingSeries) -> ConvergenceRow:
    check = "finite loss"
    bad = next((i for i, loss in enumerate(series.losses) if not math.isfinite(loss)), None)
    if bad is None:
        return ConvergenceRow(check, "holds" if series.losses else "cannot tell")
    where = f" The first result that is not finite: {series.first_bad}." if series.first_bad else ""
    before = series.losses[:bad]
    jump = f" after {before[-1]:.4g}" if before else ""
    return ConvergenceRow(
        check,
        "flagged",
        value=float(bad),
        evidence=f"the training loss is {series.losses[bad]} at step {bad}{jump}.{where}",
        next_step=(
            "Look at that op's inputs: give it activation: {dtype: float32} or int16 in overrides; if it is finite in "
            "float at the same step, its scale is too small or zero, see Calibration's findings. If the float model "
            "is not finite either, lower the learning rate."
            if series.first_bad
            else "List ZeroLRFinetune(): if the loss is finite there, lower the learning rate; if it is not, look for "
            "bad values in the data and for points with a zero scale."
        ),
    )


def _metric(series: TrainingSeries) -> ConvergenceRow:
    check = "metric"
    if series.calibrated is None or series.metrics is None:
        return ConvergenceRow(check, "cannot tell", evidence="no evaluation before and after an epoch yet")
    rows = compare(0, "", series.calibrated.metrics, series.metrics, series.calibrated)
    if not breaks(rows):
        return ConvergenceRow(check, "holds" if judged(rows) else "cannot tell")
    worst = next(row for row in judged(rows) if row.status == "breaks")
    return ConvergenceRow(
        check,
        "flagged",
        worst.value,
        worst.expected,
        evidence=f"the metric has collapsed against the calibrated model's ({spelled(judged(rows))}); a tenth and "
        f"{STANDARD_ERRORS:g} standard errors are tolerated.",
        next_step="Calibration was right, so do not sweep learning rate and weight decay yet: run PipelineCheck() (or "
        "ZeroLRFinetune() and FloatFinetune()) to see whether quantization is to blame at all.",
    )


def _diverging(series: TrainingSeries) -> ConvergenceRow:
    check = "loss trend"
    losses = [loss for loss in series.losses if math.isfinite(loss)]
    if len(losses) < FIRST_LOOK:
        return ConvergenceRow(check, "cannot tell", evidence=f"fewer than {FIRST_LOOK} steps")
    latest = losses[len(losses) // 2 :]
    whole, recent = _trend(losses), _trend(latest)
    first, last = _mean_and_error(losses[: len(losses) // 4]), _mean_and_error(losses[-(len(losses) // 4) :])
    rise, noise = last[0] - first[0], STANDARD_ERRORS * math.hypot(first[1], last[1])
    evidence = (
        f"mean loss {first[0]:.4g} in the first quarter of {len(losses)} steps, {last[0]:.4g} in the last "
        f"(Mann-Kendall p = {whole.p_rise:.1g} for a rise)."
    )
    rises = whole.p_rise < SIGNIFICANCE and recent.p_rise < 0.05 and rise > noise
    if not rises:
        return ConvergenceRow(check, "holds", whole.p_rise, SIGNIFICANCE, evidence)
    if _metric_is_kept(series):
        return ConvergenceRow(check, "noted", whole.p_rise, SIGNIFICANCE, evidence + " The metric holds.")
    return ConvergenceRow(
        check,
        "flagged",
        whole.p_rise,
        SIGNIFICANCE,
        f"the training loss rises and goes on rising: {evidence}",
        "Run FloatFinetune(): if the float model diverges too, lower the learning rate (QAT wants 1/10 to 1/20 of the "
        "float one, no warm-up); if it does not, fix the scales (activation_scales: fixed).",
    )


def _not_learning(series: TrainingSeries) -> ConvergenceRow:
    """A loss that stays above the float model's, where it started, with a metric that misses the float one."""
    check = "plateau"
    losses = [loss for loss in series.losses if math.isfinite(loss)]
    if len(losses) < FIRST_LOOK or series.float_loss is None:
        return ConvergenceRow(check, "cannot tell", evidence="too few steps, or no loss of the float model")
    start, now = _mean_and_error(losses[: len(losses) // 4]), _mean_and_error(losses[len(losses) // 2 :])
    reference = series.float_loss
    latest = losses[len(losses) // 2 :]
    falling = _trend(latest).p_fall < 0.05
    above = now[0] - reference[0] > STANDARD_ERRORS * math.hypot(now[1], reference[1])
    gained = start[0] - now[0] > STANDARD_ERRORS * math.hypot(start[1], now[1])
    evidence = (
        f"mean loss {now[0]:.4g} in the second half of {len(losses)} steps, {start[0]:.4g} in the first quarter; the "
        f"float model's is {reference[0]:.4g}."
    )
    if falling or gained or not above or _reaches_float(series):
        return ConvergenceRow(check, "holds", now[0], reference[0], evidence)
    return ConvergenceRow(
        check,
        "flagged",
        now[0],
        reference[0],
        f"training gains nothing: {evidence}",
        "Calibrate and list SensitivityAnalysis(): raise its first points to int16 with overrides. If the loss does "
        "not move at all, the learning rate is too small or gradients are clipped to nothing.",
    )


def _dead_gradients(series: TrainingSeries) -> ConvergenceRow:
    check = "gradients"
    names = series.zero_gradients
    if not names:
        return ConvergenceRow(check, "holds" if series.losses else "cannot tell")
    return ConvergenceRow(
        check,
        "flagged",
        float(len(names)),
        0.0,
        f"the gradient of {len(names)} parameters is exactly zero at every step looked at ({', '.join(names[:3])}): "
        "they cannot learn.",
        "Look at the point behind them in layer_statistics: if all of its values are clipped, its scale is too small; "
        "recalibrate, or give it int16. If gradients are zero in float too, something detaches them.",
        names,
    )


def _scales(series: TrainingSeries) -> ConvergenceRow:
    check = "scales"

    def drifts(first: PointHealth, last: PointHealth) -> float | None:
        if last.scale_drift is None or first.sqnr is None or last.sqnr is None:
            return None
        factor = max(1 + last.scale_drift, 1 / max(1e-30, 1 + last.scale_drift))
        return factor if factor > 2 and first.sqnr - last.sqnr > ONE_BIT else None

    return _points_row(
        series,
        check,
        drifts,
        2.0,
        "the scale of {names} has moved by a factor of {worst:.3g} since calibration and the point has lost more than "
        "6 dB: a bit of its resolution.",
        "Keep scales fixed (activation_scales: fixed, or freeze_observers_after: 1) and calibrate with more batches.",
    )


def _clipping(series: TrainingSeries) -> ConvergenceRow:
    check = "clipping"

    def grows(first: PointHealth, last: PointHealth) -> float | None:
        if first.clipped_share is None or last.clipped_share is None or not last.clips:
            return None
        lost = first.sqnr is not None and last.sqnr is not None and first.sqnr - last.sqnr > ONE_BIT
        return last.clipped_share if lost and last.clipped_share > 2 * first.clipped_share else None

    return _points_row(
        series,
        check,
        grows,
        None,
        f"the clipped share of {{names}} has more than doubled in {series.points.epochs} epochs to {{worst:.2%}}, "
        "clipping is most of its error, and it has lost more than 6 dB.",
        "Its data have outgrown the calibrated range: activation_scales: ema for it to follow, or a fixed_scale or "
        "int16 for these points in overrides.",
    )


def _oscillation(series: TrainingSeries) -> ConvergenceRow:
    """Codes that flip and flip back: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (2022)."""
    check = "oscillation"
    rates = series.points.flip_rates
    if len(rates) < 4:
        return ConvergenceRow(check, "cannot tell", evidence="fewer than 4 epochs of flip rates")
    returning = {
        name: health.flip_rate
        for name, health in series.points.latest.items()
        if health.flip_rate and health.return_rate is not None and health.return_rate > 0.5
    }
    if not returning or mann_kendall(rates).p_fall <= 0.05 or _reaches_float(series):
        return ConvergenceRow(check, "holds", rates[-1])
    names = tuple(sorted(returning, key=lambda name: -returning[name]))
    return ConvergenceRow(
        check,
        "flagged",
        returning[names[0]],
        None,
        f"{returning[names[0]]:.1%} of the codes of {names[0]} flip per epoch, most of them back to where they were, "
        "and the flips do not become fewer.",
        "Lower the learning rate towards the end (a cosine schedule), freeze_batch_norm_after a few epochs, or give "
        "these weights more bits.",
        names,
    )


_CHECKS: dict[ConvergenceVerdict, Callable[[TrainingSeries], ConvergenceRow]] = {
    "not finite": _finite_losses,
    "metric collapsed": _metric,
    "diverging": _diverging,
    "dead gradients": _dead_gradients,
    "scales drift": _scales,
    "clipping grows": _clipping,
    "weights oscillate": _oscillation,
    "not learning": _not_learning,
}


def _points_row(
    series: TrainingSeries,
    check: str,
    measure: Callable[[PointHealth, PointHealth], float | None],
    limit: float | None,
    evidence: str,
    next_step: str,
) -> ConvergenceRow:
    """Compare the first and the last epoch point by point; it is noted only while the metric holds."""
    if series.points.epochs < 2:
        return ConvergenceRow(check, "cannot tell", evidence="fewer than 2 epochs of statistics")
    first, last = series.points.first, series.points.latest
    values = {name: measure(first[name], health) for name, health in last.items() if name in first}
    found = {name: value for name, value in values.items() if value is not None}
    if not found:
        return ConvergenceRow(check, "holds", None, limit)
    names = tuple(sorted(found, key=lambda name: -found[name]))
    spelled_names = names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
    return ConvergenceRow(
        check,
        "noted" if _metric_is_kept(series) else "flagged",
        found[names[0]],
        limit,
        evidence.format(names=spelled_names, worst=found[names[0]]),
        next_step,
        names,
    )


def _metric_is_kept(series: TrainingSeries) -> bool:
    """Whether an evaluation says that the calibrated metric is held: then nothing else can be very wrong."""
    return _holds(series, series.calibrated)


def _reaches_float(series: TrainingSeries) -> bool:
    return _holds(series, series.float_model)


def _holds(series: TrainingSeries, before: Measurement | None) -> bool:
    if before is None or series.metrics is None:
        return False
    rows = judged(compare(0, "", before.metrics, series.metrics, before))
    return bool(rows) and all(row.status == "holds" for row in rows)


def _trend(losses: Sequence[float]) -> Trend:
    """The trend of a stretch of losses; of very long ones in larger blocks, as every pair of blocks is compared."""
    return mann_kendall(losses, max(block_length(losses), math.ceil(len(losses) / MOST_BLOCKS)))


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error allowing for the correlation of neighbouring steps."""
    block = block_length(values)
    blocks = [statistics.fmean(values[i : i + block]) for i in range(0, len(values) - block + 1, block)]
    error = statistics.stdev(blocks) / math.sqrt(len(blocks)) if len(blocks) > 1 else math.inf
    return statistics.fmean(values), error
