"""The health of the quantization points over the epochs of a training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_qat.analysis.statistics.statistics import LayerStatisticsResult, WeightCodes

MOST_FLIP_RATES = 256
"""Epochs of flip rates that are kept: enough for a trend, and a bounded checkpoint."""
FEWEST_CLIPPED = 16
"""Clipped values from which their number says something: the standard error of a count is its root, here a quarter."""


@dataclass(frozen=True)
class PointHealth:
    """The state of one quantization point at the end of an epoch.

    Args:
        scale_drift: scale relative to the calibrated one, minus 1.
        sqnr: of the point alone, in dB.
        clipped_share: share of its values that are clipped.
        clips: clipping makes more of its error than rounding does, and at least :data:`FEWEST_CLIPPED` values tell so.
        flip_rate: share of its weight codes that changed during the epoch; None for activations.
        return_rate: share of these that are back at the code of an epoch before; None if unknown.
    """

    scale_drift: float | None = None
    sqnr: float | None = None
    clipped_share: float | None = None
    clips: bool = False
    flip_rate: float | None = None
    return_rate: float | None = None


@dataclass(frozen=True)
class PointHistory:
    """The health of the points over any number of epochs, in bounded memory.

    Args:
        first: health of every point at the end of the first epoch.
        latest: the same at the end of the latest.
        epochs: how many there were.
        flip_rates: mean flip rate of the weights, by epoch, of the latest 256 epochs that have one.

    Example:
        >>> history = PointHistory()
        >>> for rate in (0.2, 0.1, 0.05):
        ...     history = history.after({"fc.weight": PointHealth(flip_rate=rate)})
        >>> history.first["fc.weight"].flip_rate, history.flip_rates, history.epochs
        (0.2, (0.2, 0.1, 0.05), 3)
    """

    first: Mapping[str, PointHealth] = field(default_factory=dict)
    latest: Mapping[str, PointHealth] = field(default_factory=dict)
    epochs: int = 0
    flip_rates: tuple[float, ...] = ()

    def after(self, health: Mapping[str, PointHealth]) -> PointHistory:
        """Return the history with one more epoch."""
        rates = [point.flip_rate for point in health.values() if point.flip_rate is not None]
        mean = (statistics.fmean(rates),) if rates else ()
        first = self.first if self.epochs else health
        return PointHistory(first, health, self.epochs + 1, (*self.flip_rates, *mean)[-MOST_FLIP_RATES:])


def health_of_points(
    result: LayerStatisticsResult,
    codes: Mapping[str, WeightCodes],
    before: Mapping[str, WeightCodes],
    earlier: Mapping[str, WeightCodes],
) -> dict[str, PointHealth]:
    """Return the health of every point at the end of an epoch, by its name.

    Args:
        result: the statistics of the points.
        codes: the weights' codes now, by region.
        before: those of the measurement before.
        earlier: those of the one before that.
    """
    return {
        (f"{row.region}:{row.point}" if row.region else row.point): PointHealth(
            scale_drift=row.scale_drift,
            sqnr=row.sqnr,
            clipped_share=row.clipped_share,
            clips=row.error_source == "clipping" and (row.clipped_share or 0.0) * row.count >= FEWEST_CLIPPED,
            flip_rate=row.flip_rate,
            return_rate=_return_rate(*(c.get(row.region, {}).get(row.point) for c in (codes, before, earlier))),
        )
        for row in result.rows
    }


def _return_rate(now: Tensor | None, before: Tensor | None, earlier: Tensor | None) -> float | None:
    """Of the codes that changed since the last measurement, the share that is back where it was the time before."""
    if now is None or before is None or earlier is None or not now.shape == before.shape == earlier.shape:
        return None
    flipped = now != before
    count = int(flipped.sum())
    return int((flipped & (now == earlier)).sum()) / count if count else None
