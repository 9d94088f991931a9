"""The errors of all points at several types, and the choices that follow from them without any data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ClassVar

from typing_extensions import override

from lightning_qat.analysis.mixed_precision.model_hashes import hashes_of
from lightning_qat.analysis.mixed_precision.op_costs import CostName, CostOfTypes, LatencyRatios, OpCost
from lightning_qat.analysis.mixed_precision.point_errors import Check, PointError, error_text
from lightning_qat.analysis.mixed_precision.precision_choice import (
    MEASURE,
    OUT_OF_RANGE,
    PrecisionChoice,
    PrecisionFront,
    RaisedPoint,
)
from lightning_qat.analysis.mixed_precision.precision_front import precision_front
from lightning_qat.analysis.mixed_precision.precision_search import Assignment, PrecisionSearch
from lightning_qat.analysis.results import Result
from lightning_qat.quantization.counts import number_of
from lightning_qat.quantization.errors import ConfigurationError, near_names
from lightning_qat.quantization.numerics.break_away import break_away
from lightning_qat.quantization.reading.files import Document
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.shares import count_of, share_of

MISLEADING = 2.0
"""A sum of errors that is so many times what was measured, or less than its inverse, misleads."""


@dataclass(frozen=True)
class PrecisionErrors(Result[PointError]):
    """The errors of all points at several types; made by :func:`lightning_qat.measure_errors`.

    Args:
        rows: one for each point and type, in execution order, the narrowest type first.
        dtypes: the types that were asked for, the narrowest first.
        output: the chosen output in words.
        batches: number of batches.
        power: mean square of the float output.
        checks: the prediction beside a measurement, for each type.
        together: for each point the points that the hardware raises with it.
        ops: what decides the cost of each op.
        latency: time per operation by kind and type, from the hardware profile; empty without one.
        not_reached: points that no batch ran: their errors count as 0.
        hashes: SHA-256 of the ``plan``, the ``weights`` and the ``data`` they were measured with.
    """

    rows: tuple[PointError, ...]
    dtypes: tuple[str, ...] = ()
    output: str = ""
    batches: int = 0
    power: float = 0.0
    checks: tuple[Check, ...] = ()
    together: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ops: tuple[OpCost, ...] = ()
    latency: LatencyRatios = field(default_factory=dict)
    not_reached: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    title: ClassVar[str] = "Output error of each point at each type"
    shown: ClassVar[tuple[str, ...]] = ("point", "op_type", "dtype", "mse", "standard_error", "exact")

    @classmethod
    def load(cls, path: str | os.PathLike[str], region: Region | Mapping[str, Region] | None = None) -> PrecisionErrors:
        """Read the file that :func:`lightning_qat.write_json` wrote.

        Args:
            path: the file.
            region: refuse errors that were measured with another plan or other weights than this region has; several
                regions by the paths of their targets.

        Raises:
            ConfigurationError: the file is damaged, or belongs to another model; the message says what differs.
        """
        document = Document(path, "a file of errors by point and type", "measure them again with measure_errors")
        errors = document.as_json(cls)
        for point, others in errors.together.items():
            for name in (point, *others):
                if name not in errors.by_point:
                    raise document.error(f"'together' names {name!r}, which has no errors")
        if region is not None:
            regions = region if isinstance(region, Mapping) else {"": region}
            differing = [name for name, value in hashes_of(regions).items() if errors.hashes.get(name) != value]
            if differing:
                raise ConfigurationError(
                    f"{os.fspath(path)} was measured with another model: {' and '.join(differing)} of this one differ. "
                    "Measure again with measure_errors."
                )
        return errors

    @cached_property
    def by_point(self) -> dict[str, dict[str, PointError]]:
        """The rows by point and type."""
        found: dict[str, dict[str, PointError]] = {}
        for row in self.rows:
            found.setdefault(row.point, {})[row.dtype] = row
        return found

    @property
    @override
    def note(self) -> str:
        """Say what was measured, and how well the sum of the errors predicts the whole."""
        checked = "; ".join(
            f"all at {c.dtype}: predicted {error_text(c.predicted)}, measured {error_text(c.measured)}"
            for c in self.checks
        )
        far = [c.dtype for c in self.checks if max(c.predicted, c.measured) > OUT_OF_RANGE * self.power]
        trust = ""
        if far:
            trust = f" At {', '.join(far)} the output has collapsed: errors do not add up there: {MEASURE}."
        elif not self.adds_up:
            trust = f" At {self.dtypes[0]} errors do not add up: {MEASURE}."
        nothing = len(self.not_reached)
        unknown = f" Nothing is known of {number_of(nothing, 'point')} that no batch ran." if nothing else ""
        measured = f"{self.output}, {number_of(self.batches, 'batch')}, mean square {self.power:.3g}"
        return f"{measured}. {checked}.{trust}{unknown}"

    @property
    def adds_up(self) -> bool:
        """Whether the errors at the narrowest type add up to what was measured, within a factor of 2.

        Elements that share one value, such as a black background, share one error: such errors cancel or round away.
        """
        return all(c.measured / MISLEADING <= c.predicted <= c.measured * MISLEADING for c in self.checks[:1])

    def choose(
        self,
        *,
        points: Iterable[str] | None = None,
        top: int | str | None = None,
        share: float | str | None = None,
        max_error: float | None = None,
        budget: float | str | None = None,
        always: Iterable[str] = (),
        cost: CostName = "points",
        latency: LatencyRatios | None = None,
    ) -> PrecisionChoice:
        """Choose which points get a wider type. Give one of ``points``, ``top``, ``share``, ``max_error``, ``budget``.

        Points that the hardware ties to a chosen one are raised with it. This needs no data and no model.

        Args:
            points: exactly these.
            top: so many of the points that gain most, or ``leaders``: those whose gain has broken away from the rest
                (see :func:`~lightning_qat.quantization.numerics.break_away.break_away`).
            share: this share of all points that have errors here, such as ``0.005`` or ``"0.5%"``; rounded up.
            max_error: least cost with at most this predicted mean squared error of the output.
            budget: least predicted error with at most this cost: a share for ``points`` and ``ops`` (``"10%"``), a
                multiple of the narrowest types for ``bops`` and ``latency`` (``1.2``).
            always: points that are raised in any case, such as those that were sensitive at a wider type.
            cost: ``points``, ``ops``, ``bops`` or ``latency``.
            latency: time per operation by kind and type, in place of the hardware profile's.

        Raises:
            ConfigurationError: not exactly one rule was given, a point does not exist, or no choice meets the bound;
                then the message says the least that can be reached.
        """
        rules = {"points": points, "top": top, "share": share, "max_error": max_error, "budget": budget}
        given = [name for name, value in rules.items() if value is not None]
        if len(given) != 1:
            raise ConfigurationError(f"give exactly one of {', '.join(rules)}, not {', '.join(given) or 'none'}.")
        search = self._search(cost, latency)
        fixed = self._known(always)
        if max_error is not None:
            if isinstance(max_error, (bool, str)) or not max_error >= 0:
                raise ConfigurationError(f"max_error is a mean squared error, a number from 0 on, not {max_error!r}.")
            found = search.cheapest(lambda: search.start(fixed), max_error)
            if found is None:
                least = search.start(search.together)
                raise ConfigurationError(
                    f"no choice has a predicted error of at most {max_error:.3g}: with all points raised it is "
                    f"{least.error:.3g}. Write a bound above that."
                )
        elif budget is not None:
            limit = share_of(budget, "budget") if search.cost.is_share else count_of(budget, None, "budget")
            found = search.most_exact(lambda: search.start(fixed), limit)
            if found is None:
                raise ConfigurationError(
                    f"no choice costs at most {limit:.3g} ({cost}): the least is {search.start(fixed).cost:.3g}."
                )
        else:
            chosen = self._known(points) if points is not None else self._most_gaining(search, top, share)
            found = search.start([*fixed, *chosen])
        return self._choice(found, search, cost)

    def front(
        self, cost: CostName = "points", latency: LatencyRatios | None = None, always: Iterable[str] = ()
    ) -> PrecisionFront:
        """Return the choices from the narrowest types to the widest, of which none beats another in cost and error.

        Where raising points costs nothing (by ``bops``, those that no matrix product reads), the first choice has them
        raised.

        Args:
            cost: ``points``, ``ops``, ``bops`` or ``latency``.
            latency: time per operation by kind and type, in place of the hardware profile's.
            always: points that are raised in any case.
        """
        search = self._search(cost, latency)
        start = search.start(self._known(always))
        return precision_front(search, start, partial(self._choice, search=search, cost=cost))

    def _search(self, cost: CostName, latency: LatencyRatios | None) -> PrecisionSearch:
        errors = {point: {d: row.mse for d, row in own.items()} for point, own in self.by_point.items()}
        narrowest = {point: next(iter(own)) for point, own in errors.items()}
        costs = CostOfTypes(cost, self.ops, narrowest, latency or dict(self.latency))
        return PrecisionSearch(errors, self.together, costs)

    def _known(self, points: Iterable[str]) -> list[str]:
        if isinstance(points, str):
            raise ConfigurationError(f"several points belong into a list: write [{points!r}], not {points!r}.")
        found = list(points)
        for point in found:
            if point not in self.by_point:
                near = near_names(point, self.by_point)
                hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
                raise ConfigurationError(f"no errors were measured at point {point!r}.{hint}")
            if point not in self.together:
                raise ConfigurationError(
                    f"point {point!r} has no wider type here: an override or the hardware gives it "
                    f"{next(iter(self.by_point[point]))} in any case."
                )
        return found

    def _most_gaining(self, search: PrecisionSearch, top: int | str | None, share: float | str | None) -> list[str]:
        gains = {p: max(0.0, _first(e) - _last(e)) for p, e in search.errors.items() if p in self.together}
        ranked = sorted(gains, key=lambda point: -gains[point])
        if top == "leaders":
            return ranked[: break_away([math.sqrt(gains[point]) for point in ranked if gains[point] > 0])]
        whole = len(self.by_point)
        count = count_of(top, whole, "top") if top is not None else whole * share_of(share or 0.0, "share")
        if top is not None and (count > whole if str(top).strip().endswith("%") else count % 1):
            raise ConfigurationError(f"top is a count of points, a percentage up to '100%' or leaders, not {top!r}.")
        return ranked[: math.ceil(count - 1e-9)]  # a tenth of 50 is 5, whatever the rounding

    def _choice(self, found: Assignment, search: PrecisionSearch, cost: CostName) -> PrecisionChoice:
        raised = [p for p, dtype in found.dtypes.items() if dtype != next(iter(self.by_point[p]))]
        gain = {p: _first(search.errors[p]) - search.errors[p][found.dtypes[p]] for p in raised}
        rows = []
        for point in sorted(raised, key=lambda p: -gain[p]):
            row, before = self.by_point[point][found.dtypes[point]], _first(search.errors[point])
            rows.append(RaisedPoint(point, row.op_name, row.op_type, row.role, row.dtype, row.mse, before))
        return PrecisionChoice(
            tuple(rows),
            predicted=search.error_of(found.dtypes),
            narrowest=search.narrowest,
            widest=search.widest,
            power=self.power,
            cost=search.cost.of(found.dtypes),
            cost_name=cost,
            points=len(self.by_point),
            adds_up=self.adds_up,
        )


def _first(errors: Mapping[str, float]) -> float:
    return next(iter(errors.values()))


def _last(errors: Mapping[str, float]) -> float:
    return list(errors.values())[-1]
