"""A choice of types: the overrides to paste, the predicted error, the cost; and the front of the best choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

from typing_extensions import override

from lightning_qat.analysis.mixed_precision.point_errors import INFINITE_ERROR, error_text
from lightning_qat.analysis.results import Block, Result

OUT_OF_RANGE = 1.0
"""A predicted error of so many times the output's power means nothing: errors do not add up there any more."""

MEASURE = "trust what is measured (lightning_qat.measure_choices), not what is predicted"


@dataclass(frozen=True)
class RaisedPoint:
    """A point that is raised.

    Args:
        point: name of the point.
        op_name: its op.
        op_type: canonical torch function.
        role: ``weight`` or ``activation``.
        dtype: the type it gets.
        mse: mean squared error of the output that it adds at this type, alone.
        mse_before: the same at its narrowest type.
    """

    point: str
    op_name: str
    op_type: str
    role: str
    dtype: str
    mse: float
    mse_before: float


@dataclass(frozen=True)
class PrecisionChoice(Result[RaisedPoint]):
    """Which points are raised.

    Args:
        rows: the raised points, those that gain most first.
        predicted: predicted mean squared error of the output.
        narrowest: the same with all points at their narrowest types.
        widest: the same with all points at their widest types.
        power: mean square of the float output.
        cost: what it costs, see ``cost_name``.
        cost_name: ``points``, ``ops``, ``bops`` or ``latency``.
        points: number of points in all.
        adds_up: whether errors add up on this model, so that the prediction can be relied on.
    """

    predicted: float = 0.0
    narrowest: float = 0.0
    widest: float = 0.0
    power: float = 0.0
    cost: float = 0.0
    cost_name: str = "points"
    points: int = 0
    adds_up: bool = True
    title: ClassVar[str] = "Points to raise"
    shown: ClassVar[tuple[str, ...]] = ("point", "op_type", "role", "dtype", "mse_before", "mse")

    @property
    def overrides(self) -> list[dict[str, Any]]:
        """The overrides as the YAML has them; append them to those that are there."""
        return [{"match": row.point, row.role: {"dtype": row.dtype}} for row in self.rows]

    @property
    def raised(self) -> tuple[str, ...]:
        """Names of the raised points."""
        return tuple(row.point for row in self.rows)

    @property
    def recovered(self) -> float:
        """Share of the error that all wide types would take away which this choice takes away."""
        most = self.narrowest - self.widest
        return (self.narrowest - self.predicted) / most if most > 0 else 1.0

    @property
    def predicted_sqnr(self) -> float:
        """The predicted signal to noise ratio of the output, in dB."""
        return sqnr_of(self.power, self.predicted)

    @property
    def in_range(self) -> bool:
        """Whether the prediction means something: not if the predicted error exceeds the output itself."""
        return self.predicted <= OUT_OF_RANGE * self.power

    @property
    @override
    def note(self) -> str:
        """Say what is raised, what it gains and costs, and how far the prediction can be trusted."""
        what = f"{len(self.rows)} of {self.points} points are raised ({len(self.rows) / max(1, self.points):.1%})"
        before, now = error_text(self.narrowest), error_text(self.predicted)
        noise = f"{sqnr_of(self.power, self.narrowest):.1f} to " if self.narrowest < INFINITE_ERROR else ""
        gain = f"the predicted error of the output falls from {before} to {now} ({noise}{self.predicted_sqnr:.1f} dB)"
        cost = {
            "points": "",
            "ops": f" It touches {self.cost:.1%} of the ops.",
            "bops": f" It costs {self.cost:.3g} times the bit operations of the narrowest types.",
            "latency": f" It takes {self.cost:.3g} times as long as the narrowest types.",
        }[self.cost_name]
        trust = ""
        if not self.in_range:
            trust = f" This error is larger than the output itself: errors do not add up there: {MEASURE}."
        elif not self.adds_up and self.rows:
            trust = f" Errors do not add up on this model: {MEASURE}."
        return f"{what}: {gain}.{cost}{trust}"


def sqnr_of(power: float, error: float) -> float:
    """Return a signal to noise ratio in dB; inf without an error, -inf without a signal."""
    if error <= 0:
        return math.inf
    return 10 * math.log10(power / error) if power > 0 else -math.inf


@dataclass(frozen=True)
class FrontRow:
    """One choice on the front.

    Args:
        raised: number of raised points.
        share: their share of all points.
        cost: what the choice costs.
        predicted: predicted mean squared error of the output.
        sqnr: the predicted signal to noise ratio, in dB.
        recovered: share of the avoidable error that it takes away.
        in_range: whether the prediction means something.
        added: the points raised since the row before.
    """

    raised: int
    share: float
    cost: float
    predicted: float
    sqnr: float
    recovered: float
    in_range: bool
    added: tuple[str, ...]


_MOST_ROWS, _MOST_NAMES = 20, 3
"""Of a front in its short form: rows, and names of the points that a row adds."""


@dataclass(frozen=True)
class PrecisionFront(Result[FrontRow]):
    """The choices of which none is both cheaper and more exact than another, from the narrowest types to the widest.

    Args:
        rows: the cheapest first.
        choices: the choice of each row, with its overrides; each is made when it is asked for.
        cost_name: what the cost is.
    """

    choices: Sequence[PrecisionChoice] = ()
    cost_name: str = "points"
    title: ClassVar[str] = "Error against cost"
    shown: ClassVar[tuple[str, ...]] = ("raised", "share", "cost", "predicted", "sqnr", "recovered", "added")

    @property
    @override
    def note(self) -> str:
        """Say so if the predictions mislead."""
        return f"Errors do not add up on this model: {MEASURE}." if self.choices and not self.choices[0].adds_up else ""

    @override
    def about(self) -> dict[str, Any]:
        """Return the facts beside the rows, with the overrides of every row."""
        return {"cost_name": self.cost_name, "overrides": [choice.overrides for choice in self.choices]}

    @override
    def blocks(self) -> tuple[Block, ...]:
        """Return the short form: at most 20 rows, spread evenly, each with the points added since the row above it."""
        last = len(self.rows) - 1
        kept = range(last + 1) if last < _MOST_ROWS else [round(i * last / (_MOST_ROWS - 1)) for i in range(_MOST_ROWS)]
        rows = []
        for before, index in pairwise([-1, *kept]):
            added = [point for row in self.rows[before + 1 : index + 1] for point in row.added]
            others = len(added) - _MOST_NAMES
            names = (*added[:_MOST_NAMES], f"and {others} more") if others > 0 else tuple(added)
            rows.append(replace(self.rows[index], added=names))
        return Result.blocks(replace(self, rows=tuple(rows)))
