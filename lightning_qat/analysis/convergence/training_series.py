"""The input of the convergence monitor, and the rows of its evidence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Annotated, Any, Literal

from lightning_qat.analysis.convergence.point_history import PointHealth, PointHistory
from lightning_qat.analysis.ladder.measurements import Measurement
from lightning_qat.analysis.ladder.rows import compare, judged
from lightning_qat.analysis.open_question import OpenQuestion, with_question
from lightning_qat.quantization.reading.checks import AT_LEAST_ONE, AT_LEAST_ZERO

CheckStatus = Literal["holds", "flagged", "noted", "cannot tell"]


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
        bad_input: the first training batch that was not finite, with what it holds, if one was met.
        bad_buffers: buffers that have become not finite, such as statistics of a batch norm.
        bad_since: when that was first seen.
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
    bad_input: str = ""
    bad_buffers: tuple[str, ...] = ()
    bad_since: str = ""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs of the series, as primitives; the losses are stored with their history."""
        measured = {"metrics": self.metrics, "calibrated": self.calibrated, "float_model": self.float_model}
        return {
            "float_loss": list(self.float_loss) if self.float_loss else None,
            "evaluations": self.evaluations,
            **{name: _plain_measurement(m) for name, m in measured.items()},
            "first_points": _plain_health(self.points.first),
            "latest_points": _plain_health(self.points.latest),
            "point_epochs": self.points.epochs,
            "flip_rates": list(self.points.flip_rates),
            "zero_gradients": list(self.zero_gradients),
            "first_bad": self.first_bad,
            "bad_input": self.bad_input,
            "bad_buffers": list(self.bad_buffers),
            "bad_since": self.bad_since,
        }

    @classmethod
    def of_state(cls, stored: StoredSeries, losses: LossHistory) -> TrainingSeries:
        """Return the series of a :meth:`state_dict`.

        Args:
            stored: what was stored.
            losses: the losses that were stored beside it.
        """
        return cls(
            losses=tuple(losses.values),
            steps=losses.steps,
            float_loss=stored.float_loss,
            metrics=stored.metrics,
            evaluations=stored.evaluations,
            calibrated=stored.calibrated,
            float_model=stored.float_model,
            points=PointHistory(
                first=_health_of(stored.first_points),
                latest=_health_of(stored.latest_points),
                epochs=stored.point_epochs,
                flip_rates=stored.flip_rates,
            ),
            zero_gradients=stored.zero_gradients,
            first_bad=stored.first_bad,
            bad_input=stored.bad_input,
            bad_buffers=stored.bad_buffers,
            bad_since=stored.bad_since,
        )

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
        rows = judged(compare(before.metrics, self.metrics, before))
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
        left_open: what another report can tell; part of what to do.
    """

    check: str
    status: CheckStatus
    value: float | None = None
    limit: float | None = None
    evidence: str = ""
    next_step: str = ""
    names: tuple[str, ...] = field(default=())
    left_open: OpenQuestion = ""

    @property
    def advice(self) -> str:
        """What to do, with where to look for what is left open."""
        return with_question(self.left_open, self.next_step)


_StoredHealth = tuple[float | None, float | None, float | None, bool, float | None, float | None]
"""The fields of PointHealth in their order."""


@dataclass(frozen=True)
class StoredSeries:
    """The schema of :meth:`TrainingSeries.state_dict` and of the losses that stand beside it.

    What has a default is not in the checkpoints of earlier releases.
    """

    losses: tuple[float, ...]
    stride: Annotated[int, AT_LEAST_ONE]
    float_loss: tuple[float, float] | None
    evaluations: Annotated[int, AT_LEAST_ZERO]
    metrics: Measurement | None
    calibrated: Measurement | None
    float_model: Measurement | None
    first_points: dict[str, _StoredHealth]
    point_epochs: Annotated[int, AT_LEAST_ZERO]
    flip_rates: tuple[float, ...]
    latest_points: dict[str, _StoredHealth] = field(default_factory=dict)
    zero_gradients: tuple[str, ...] = ()
    first_bad: str = ""
    bad_input: str = ""
    bad_buffers: tuple[str, ...] = ()
    bad_since: str = ""


def _plain_health(points: Mapping[str, PointHealth]) -> dict[str, list[Any]]:
    """Return the health of points as plain data."""
    return {name: list(astuple(health)) for name, health in points.items()}


def _health_of(stored: Mapping[str, _StoredHealth]) -> dict[str, PointHealth]:
    """Return the health of plain data."""
    return {name: PointHealth(*health) for name, health in stored.items()}


def _plain_measurement(measurement: Measurement | None) -> dict[str, dict[str, float]] | None:
    """Return a measurement as plain data."""
    if measurement is None:
        return None
    return {"metrics": dict(measurement.metrics), "standard_errors": dict(measurement.standard_errors)}
