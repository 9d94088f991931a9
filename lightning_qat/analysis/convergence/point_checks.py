"""The checks of the convergence monitor that look at parameters and quantization points."""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning_qat.analysis.convergence.point_history import PointHealth
from lightning_qat.analysis.convergence.training_series import ConvergenceRow, TrainingSeries
from lightning_qat.analysis.trend import STILL, mann_kendall

ONE_BIT = 20 * math.log10(2)
"""A bit of resolution in dB: W. R. Bennett, "Spectra of quantized signals", Bell System Technical Journal 27 (1948)."""


def dead_gradients(series: TrainingSeries) -> ConvergenceRow:
    """Look for parameters that get no gradient at all."""
    check = "gradients"
    names = series.zero_gradients
    if not names:
        if not series.losses:
            return ConvergenceRow(check, "cannot tell", evidence="no step yet")
        return ConvergenceRow(check, "holds", evidence="no gradient is exactly zero at every step looked at.")
    return ConvergenceRow(
        check,
        "flagged",
        float(len(names)),
        0.0,
        f"the gradient of {len(names)} parameters is exactly zero at every step looked at ({', '.join(names[:3])}): "
        "they cannot learn.",
        "Look at the point behind them in the table of LayerStatistics(): if all of its values are clipped, its scale "
        "is too small; recalibrate, or give it int16. If gradients are zero in float too, something detaches them.",
        names,
    )


def drifting_scales(series: TrainingSeries) -> ConvergenceRow:
    """Look for scales that moved by a factor of two and cost a bit."""
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
        "no scale has moved by a factor of two since calibration while its point lost more than 6 dB.",
    )


def growing_clipping(series: TrainingSeries) -> ConvergenceRow:
    """Look for points that clip more and more, and lose a bit by it."""
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
        "no clipped share has more than doubled since the first epoch and cost its point more than 6 dB. What was "
        "clipped from the start is not judged here: LayerComparison() and ModelCheck() do.",
    )


def oscillating_weights(series: TrainingSeries) -> ConvergenceRow:
    """Look for codes that flip and flip back.

    Sources:
        M. Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, arXiv:2203.11086.
    """
    check = "oscillation"
    rates = series.points.flip_rates
    if len(rates) < 4:
        return ConvergenceRow(check, "cannot tell", evidence="fewer than 4 epochs of flip rates")
    returning = {
        name: health.flip_rate
        for name, health in series.points.latest.items()
        if health.flip_rate and health.return_rate is not None and health.return_rate > 0.5
    }
    if not returning or mann_kendall(rates).p_fall <= STILL or series.reaches_float:
        evidence = f"{rates[-1]:.1%} of the weight codes have flipped in the latest epoch."
        return ConvergenceRow(check, "holds", rates[-1], evidence=evidence)
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


def _points_row(
    series: TrainingSeries,
    check: str,
    measure: Callable[[PointHealth, PointHealth], float | None],
    limit: float | None,
    evidence: str,
    next_step: str,
    nothing: str,
) -> ConvergenceRow:
    """Compare the first and the last epoch point by point; while the metric holds, what is found is only noted."""
    if series.points.epochs < 2:
        return ConvergenceRow(check, "cannot tell", evidence="fewer than 2 epochs of statistics")
    first, last = series.points.first, series.points.latest
    values = {name: measure(first[name], health) for name, health in last.items() if name in first}
    found = {name: value for name, value in values.items() if value is not None}
    if not found:
        return ConvergenceRow(check, "holds", None, limit, nothing)
    names = tuple(sorted(found, key=lambda name: -found[name]))
    shown = names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
    return ConvergenceRow(
        check,
        "noted" if series.keeps_metric else "flagged",
        found[names[0]],
        limit,
        evidence.format(names=shown, worst=found[names[0]]),
        next_step,
        names,
    )
