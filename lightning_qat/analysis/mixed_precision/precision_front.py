"""The front: the steps of a search as rows, and the choice behind each row when somebody asks for it.

A model of a thousand points has a thousand choices with up to a thousand points each: mostly a few of them are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import overload

from typing_extensions import override

from lightning_qat.analysis.mixed_precision.precision_choice import FrontRow, PrecisionChoice, PrecisionFront
from lightning_qat.analysis.mixed_precision.precision_search import ROUNDING, Assignment, PrecisionSearch

MakeChoice = Callable[[Assignment], PrecisionChoice]


def precision_front(search: PrecisionSearch, start: Assignment, make: MakeChoice) -> PrecisionFront:
    """Return the choices from a start to the widest types, of which none beats another in cost and error.

    What raises the types without raising the cost is part of the first choice.

    Args:
        search: makes the steps.
        start: types and cost at the beginning.
        make: makes the choice of types, errors and cost.
    """
    first = make(start)
    choices = FrontChoices(make, start.dtypes)
    least = {point: next(iter(own)) for point, own in search.errors.items()}
    points, raised = max(1, first.points), len(first.rows)
    added = list(first.raised)
    rows: list[FrontRow] = []
    for now in search.steps(start):
        changes = now.steps[-1] if now.steps else {}
        new = [point for point, before in changes.items() if before == least[point]]
        gains = {point: search.errors[point][least[point]] - search.errors[point][now.dtypes[point]] for point in new}
        added += sorted(new, key=lambda point: -gains[point])
        raised += len(new)
        choices.go_on({point: now.dtypes[point] for point in changes})
        if rows and now.error >= rows[-1].predicted:
            continue  # a gain that is lost in rounding
        while rows and now.cost <= rows[-1].cost * (1 + ROUNDING):  # it costs no more: nobody would stop before it
            added = [*rows.pop().added, *added]
            choices.unmark()
        here = replace(first, predicted=now.error, cost=now.cost)
        trust = here.predicted_sqnr, here.recovered, here.in_range
        rows.append(FrontRow(raised, raised / points, now.cost, now.error, *trust, tuple(added)))
        choices.mark(now.error, now.cost)
        added = []
    return PrecisionFront(tuple(rows), choices=choices, cost_name=first.cost_name)


class FrontChoices(Sequence[PrecisionChoice]):
    """The choices of a front, as what each changes of the one before.

    Args:
        make: makes a choice of types, errors and cost.
        start: the types before all changes.
    """

    def __init__(self, make: MakeChoice, start: Mapping[str, str]) -> None:
        self._make = make
        self._start = dict(start)
        self._changes: list[dict[str, str]] = []
        self._marks: list[tuple[int, float, float]] = []

    def go_on(self, changes: dict[str, str]) -> None:
        """Note the next changes."""
        self._changes.append(changes)

    def mark(self, error: float, cost: float) -> None:
        """Let what is noted so far be a choice."""
        self._marks.append((len(self._changes), error, cost))

    def unmark(self) -> None:
        """Let the last choice be none."""
        self._marks.pop()

    def __len__(self) -> int:
        return len(self._marks)

    @overload
    def __getitem__(self, index: int) -> PrecisionChoice: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[PrecisionChoice]: ...

    @override
    def __getitem__(self, index: int | slice) -> PrecisionChoice | Sequence[PrecisionChoice]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        count, error, cost = self._marks[index]
        dtypes = dict(self._start)
        for changes in self._changes[:count]:
            dtypes |= changes
        return self._make(Assignment(dtypes, error, cost))
