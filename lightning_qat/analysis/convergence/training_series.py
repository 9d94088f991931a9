"""What the convergence monitor looks at, and the rows of its evidence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_qat.analysis.ladder.measurements import Measurement, compare, judged

CheckStatus = Literal["holds", "flagged", "noted", "cannot tell"]
MOST_FLIP_RATES = 256
"""Epochs of flip rates that are kept: enough for a trend, and a bounded checkpoint."""


@dataclass(frozen=True)
class PointHealth:
    """The state of one quantization point at the end of an epoch.

    Args:
        scale_drift: scale relative to the calibrated one, minus 1.
        sqnr: of the point alone, in dB.
        clipped_share: share of its values that are clipped.
        clips: clipping makes more of its error than rounding does.
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
    """What is kept of the points over any number of epochs.

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


class LossHistory:
    """The losses of any number of steps in bounded memory: when it is full, neighbours are averaged.

    Args:
        values: losses so far.
        stride: steps that one value stands for.
        capacity: values kept at most.

    Example:
        >>> history = LossHistory(capacity=4)
        >>> for loss in (1.0, 3.0, 5.0, 7.0, 9.0, 9.0):
        ...     history.append(loss)
        >>> history.values, history.stride, history.steps
        ([2.0, 6.0, 9.0], 2, 6)
    """

    def __init__(self, values: Iterable[float] = (), stride: int = 1, capacity: int = 4096) -> None:
        self.values = list(values)
        self.stride = stride
        self.capacity = capacity
        self._pending: list[float] = []

    @property
    def steps(self) -> int:
        """Number of steps recorded."""
        return len(self.values) * self.stride + len(self._pending)

    def append(self, loss: float) -> None:
        """Record the loss of one step; one that is not finite is kept as it is, at once."""
        self._pending.append(loss)
        if len(self._pending) < self.stride and math.isfinite(loss):
            return
        self.values.append(statistics.fmean(self._pending))
        self._pending.clear()
        if len(self.values) >= self.capacity:
            pairs = zip(self.values[::2], self.values[1::2], strict=False)
            self.values = [(one + other) / 2 for one, other in pairs]
            self.stride *= 2


@dataclass(frozen=True)
class TrainingSeries:
    """All that is known of a run of quantization-aware training so far.

    Args:
        losses: training losses in order since quantization was switched on, of every step or averaged over so many
            neighbours.
        steps: number of steps they stand for.
        float_loss: mean training loss of the float model that QAT started from, on some batches of the same data, and
            its standard error.
        metrics: the latest evaluation, quantized.
        evaluations: how many there were.
        calibrated: evaluation of the calibrated model before the first step.
        float_model: evaluation of the float model before the first step.
        points: health of every point, first and last.
        zero_gradients: parameters whose gradient was exactly zero at every step looked at in the last epoch.
        first_bad: the first op whose result was not finite, as ``name (file.py:line)``, if it was looked for.
    """

    losses: tuple[float, ...] = ()
    steps: int = 0
    float_loss: tuple[float, float] | None = None
    metrics: Measurement | None = None
    evaluations: int = 0
    calibrated: Measurement | None = None
    float_model: Measurement | None = None
    points: PointHistory = field(default_factory=PointHistory)
    zero_gradients: tuple[str, ...] = ()
    first_bad: str = ""

    @property
    def keeps_metric(self) -> bool:
        """Whether an evaluation says that the calibrated metric is held: then nothing else can be very wrong."""
        return self._holds(self.calibrated)

    @property
    def reaches_float(self) -> bool:
        """Whether an evaluation says that the float metric is reached."""
        return self._holds(self.float_model)

    def _holds(self, before: Measurement | None) -> bool:
        if before is None or self.metrics is None:
            return False
        rows = judged(compare(0, "", before.metrics, self.metrics, before))
        return bool(rows) and all(row.status == "holds" for row in rows)


@dataclass(frozen=True)
class ConvergenceRow:
    """One check.

    Args:
        check: what was looked for.
        status: ``noted``: seen, but not bad while the metric holds.
        value: the number that decided.
        limit: what it is compared with.
        evidence: the numbers as a sentence, and why the limit is what it is.
        next_step: what to do about it.
        names: points or parameters concerned.
    """

    check: str
    status: CheckStatus
    value: float | None = None
    limit: float | None = None
    evidence: str = ""
    next_step: str = ""
    names: tuple[str, ...] = field(default=())
