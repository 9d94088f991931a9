"""Show the rounds of a long loop as one row: the worst round, and the number of rounds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

RowT = TypeVar("RowT")


def worst_rounds(
    rows: Iterable[RowT], loop: Callable[[RowT], Hashable], badness: Callable[[RowT], float]
) -> list[tuple[RowT, int]]:
    """Keep only the worst row of each loop, at the place of the loop's first row; keep all other rows.

    Args:
        rows: in any order.
        loop: key that the rounds of one loop share; None or empty for a row that is in no loop.
        badness: larger is worse.

    Returns:
        Rows, and how many rounds each stands for; 1 for a row that is in no loop.

    Example:
        >>> worst_rounds([("a", 1.0), ("b", 5.0), ("b", 7.0), ("c", 2.0)], lambda r: r[0] == "b", lambda r: r[1])
        [(('a', 1.0), 1), (('b', 7.0), 2), (('c', 2.0), 1)]
    """
    found: dict[Hashable, tuple[RowT, int]] = {}
    for number, row in enumerate(rows):
        key = loop(row) or (number,)
        worst, count = found.get(key, (row, 0))
        found[key] = (row if badness(row) > badness(worst) else worst, count + 1)
    return list(found.values())
