"""The leaders of a sorted list that have broken away from the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST_GAP = 2.0
"""A factor of two is one bit: leaders that are less ahead than that have not broken away."""
_MOST_LEADERS = 0.25


def break_away(values: Sequence[float], least_gap: float = LEAST_GAP) -> int:
    """Return how many of the values, sorted from the largest down, have broken away: before the largest ratio gap.

    The gap is looked for in the first quarter of the list (at least behind the first value): further down, the ratios
    of small values are large and mean nothing.

    Args:
        values: at least zero, in descending order.
        least_gap: a gap smaller than this is none.

    Returns:
        The number of leaders; 0 if there is no gap.

    Example:
        >>> break_away([1.79, 1.47, 0.35, 0.25, 0.22, 0.21, 0.19, 0.18])
        2
        >>> break_away([5.0, 4.0, 3.5, 3.0])
        0
    """
    finite = [v for v in values if math.isfinite(v)]
    leaders = len(values) - len(finite)  # what turned the output into NaN is ahead of everything
    last = max(1, math.ceil(len(finite) * _MOST_LEADERS))
    best, gap = 0, least_gap
    for count in range(1, min(last, len(finite) - 1) + 1):
        before, after = finite[count - 1], finite[count]
        ratio = before / after if after > 0 else math.inf if before > 0 else 1.0
        if ratio >= gap and ratio > (gap if best else 0):
            best, gap = count, ratio
    return leaders + best
