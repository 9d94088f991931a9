"""The best way to cut an axis into groups of neighbours that have a scale each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MOST_PLACES = 512


def best_groups(
    largest: NDArray[np.float64], weights: NDArray[np.float64], groups: int, quant_max: int
) -> tuple[float, tuple[int, ...]]:
    """Find the groups with the smallest sum of weighted squared errors.

    The step of a group is its largest magnitude over ``quant_max``; every index adds ``step**2 / 12`` times its weight.
    Exact, by dynamic programming over at most ``MOST_PLACES`` places: a longer axis is cut at multiples of a few
    indices only, as time and memory grow with the square of the places.

    Args:
        largest: largest magnitude at every index.
        weights: of the squared errors at every index.
        groups: how many.
        quant_max: largest code.

    Returns:
        The sum, and the lengths of the groups.

    Example:
        >>> values = np.array([1.0, 2.0, 1000.0, 2000.0])
        >>> best_groups(values, values**-2, 2, 127)[1]
        (2, 2)
    """
    whole = len(largest)
    width = -(-whole // MOST_PLACES)
    places = np.arange(0, whole, width)
    highest = np.maximum.reduceat(largest, places)
    weight = np.add.reduceat(weights, places)
    length = len(highest)
    cost: NDArray[np.float64] = np.full((length + 1, length + 1), np.inf)  # of a group from index i to j, excluded
    for i in range(length):
        cost[i, i + 1 :] = (np.maximum.accumulate(highest[i:]) / quant_max) ** 2 / 12 * np.cumsum(weight[i:])
    total = cost[0].copy()
    choices = []
    for _ in range(groups - 1):
        sums = total[:, None] + cost
        choices.append(sums.argmin(axis=0))
        total = sums.min(axis=0)
    ends = [length]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    starts = [*ends[::-1], length]
    cuts = [min(width * start, whole) for start in starts]
    sizes = tuple(b - a for a, b in zip([0, *cuts[:-1]], cuts, strict=True) if b > a)
    return float(total[length]), sizes
