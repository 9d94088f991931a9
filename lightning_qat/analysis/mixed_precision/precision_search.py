"""Choosing types: the steps from the narrowest to the widest types, and where to stop."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lightning_qat.analysis.mixed_precision.op_costs import CostOfTypes

ROUNDING = 1e-9
"""Costs are sums of many shares: a budget of a tenth must allow ten hundredths."""

Errors = Mapping[str, Mapping[str, float]]
"""Mean squared output error of each point at each of its types, the narrowest first."""


@dataclass
class Assignment:
    """The type of every point, with the predicted error and the cost that follow from it."""

    dtypes: dict[str, str]
    error: float
    cost: float
    steps: list[dict[str, str]] = field(default_factory=list)
    """The changes that led here, each with the types before it."""


class PrecisionSearch:
    """Raises points step by step. Errors of several points add up.

    Args:
        errors: of every point at each of its types, the narrowest first.
        together: the points that have to be raised with a point.
        cost: what a choice costs.
    """

    def __init__(self, errors: Errors, together: Mapping[str, tuple[str, ...]], cost: CostOfTypes) -> None:
        self.errors = errors
        self.together = together
        self.cost = cost
        self._touching: dict[str, set[str]] = {point: {point} & together.keys() for point in errors}
        for point, others in together.items():
            for other in others:
                self._touching[other].add(point)

    @cached_property
    def narrowest(self) -> float:
        """The predicted error with all points at their narrowest types."""
        return math.fsum(next(iter(own.values())) for own in self.errors.values())

    @cached_property
    def widest(self) -> float:
        """The predicted error with all points at their widest types."""
        return math.fsum(list(own.values())[-1] for own in self.errors.values())

    def start(self, raised: Iterable[str] = ()) -> Assignment:
        """Return the narrowest types, but for some points that have their widest (and those raised with them)."""
        dtypes = {point: next(iter(own)) for point, own in self.errors.items()}
        for point in raised:
            for other in self.together.get(point, (point,)):
                dtypes[other] = list(self.errors[other])[-1]
        return Assignment(dtypes, self.error_of(dtypes), self.cost.of(dtypes))

    def error_of(self, dtypes: Mapping[str, str]) -> float:
        """Return the predicted error of a choice."""
        return math.fsum(self.errors[point][dtype] for point, dtype in dtypes.items())

    def change(self, dtypes: Mapping[str, str], point: str) -> dict[str, str]:
        """Return the new types if a point is raised to its next one: of itself, and of those that must follow."""
        own = list(self.errors[point])
        level = own.index(dtypes[point]) + 1
        if level >= len(own):
            return {}
        changes = {point: own[level]}
        for other in self.together.get(point, ()):
            choices = list(self.errors[other])
            wanted = min(level, len(choices) - 1)
            if other != point and choices.index(dtypes[other]) < wanted:
                changes[other] = choices[wanted]
        return changes

    def steps(self, start: Assignment, by_cost: bool = True, budget: float = math.inf) -> Iterator[Assignment]:
        """Yield the start and then the choice after each step: the one that gains most per cost, or at all.

        Steps that gain nothing, or that the budget does not allow, are not made. The yielded assignment is always the
        same object, which the next step changes.
        """
        now, total = start, _ExactSum(self.errors[point][dtype] for point, dtype in start.dtypes.items())
        values = {point: self._value(now, point, by_cost) for point in self.together}
        order = {point: index for index, point in enumerate(values)}
        waiting = [(-value, order[point], point) for point, value in values.items()]
        heapq.heapify(waiting)
        yield now
        while waiting:
            negative, _, point = heapq.heappop(waiting)
            if values.get(point) != -negative:
                continue  # its value has changed since, and it waits with the new one
            if negative >= 0:
                return
            changes = self.change(now.dtypes, point)
            rise = self.cost.of_change(now.dtypes, changes)
            if now.cost + rise > budget * (1 + ROUNDING):
                del values[point]
                continue
            now.steps.append({name: now.dtypes[name] for name in changes})
            now.cost += rise
            now.error = self._exchange(now.dtypes, changes, total)
            for other in dict.fromkeys(p for name in changes for p in self._touching[name]):
                if other in values:
                    values[other] = self._value(now, other, by_cost)
                    heapq.heappush(waiting, (-values[other], order[other], other))
            yield now

    def cheapest(self, start: Callable[[], Assignment], bound: float) -> Assignment | None:
        """Return the choice of least cost whose predicted error is at most ``bound``; None if there is none."""
        found = []
        for by_cost in (True, False):
            for now in self.steps(start(), by_cost):
                if now.error <= bound:
                    found.append(self._without_needless(now, bound))
                    break
        return min(found, key=lambda choice: (choice.cost, choice.error), default=None)

    def most_exact(self, start: Callable[[], Assignment], budget: float) -> Assignment | None:
        """Return the choice of least predicted error that costs at most ``budget``; None if the start costs more."""
        if start().cost > budget * (1 + ROUNDING):
            return None
        found = [last for by_cost in (True, False) for last in deque(self.steps(start(), by_cost, budget), maxlen=1)]
        return min(found, key=lambda choice: (choice.error, choice.cost))

    def _value(self, now: Assignment, point: str, by_cost: bool) -> float:
        """What raising a point gains, per cost or as it is."""
        changes = self.change(now.dtypes, point)
        gain = math.fsum(self.errors[p][now.dtypes[p]] - self.errors[p][dtype] for p, dtype in changes.items())
        if not changes or not by_cost or gain <= 0:
            return gain if changes else 0.0
        rise = self.cost.of_change(now.dtypes, changes)
        return gain / rise if rise > 0 else math.inf

    def _without_needless(self, now: Assignment, bound: float) -> Assignment:
        """Take back steps, the last ones first, that the bound does not need: a late large step may replace them."""
        dtypes = dict(now.dtypes)
        total = _ExactSum(self.errors[point][dtype] for point, dtype in dtypes.items())
        for before in reversed(now.steps):
            after = {name: dtypes[name] for name in before}
            error = self._exchange(dtypes, before, total)
            if error > bound or not self._is_allowed(dtypes, before):
                self._exchange(dtypes, after, total)
        return Assignment(dtypes, self.error_of(dtypes), self.cost.of(dtypes))

    def _exchange(self, dtypes: dict[str, str], changes: Mapping[str, str], total: _ExactSum) -> float:
        """Give points other types, and return the new sum of all errors."""
        for name, dtype in changes.items():
            total.add(-self.errors[name][dtypes[name]])
            total.add(self.errors[name][dtype])
        dtypes |= changes
        return total.value

    def _is_allowed(self, dtypes: Mapping[str, str], lowered: Iterable[str]) -> bool:
        """Whether no point needs one of the lowered ones to be as wide as itself."""
        for name in lowered:
            for point in self._touching[name]:
                own, other = list(self.errors[point]), list(self.errors[name])
                level = min(own.index(dtypes[point]), len(other) - 1)
                if point != name and other.index(dtypes[name]) < level:
                    return False
        return True


class _ExactSum:
    """A sum that summands can be added to and taken from without rounding: ``math.fsum`` of what is in it.

    It is kept as parts that do not overlap (Shewchuk, "Adaptive Precision Floating-Point Arithmetic", 1997).
    """

    def __init__(self, values: Iterable[float]) -> None:
        self._parts: list[float] = []
        for value in values:
            self.add(value)

    def add(self, value: float) -> None:
        kept = []
        for part in self._parts:
            if abs(value) < abs(part):
                value, part = part, value
            high = value + part
            low = part - (high - value)
            if low:
                kept.append(low)
            value = high
        self._parts = [*kept, value]

    @property
    def value(self) -> float:
        return math.fsum(self._parts)
