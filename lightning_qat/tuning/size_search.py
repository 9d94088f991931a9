"""Searching how many points have to be raised, by few evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

_DOUBLINGS = 3


@dataclass(frozen=True)
class SizeFound:
    """The outcome of a search.

    Args:
        passing: the smallest size that was seen to pass; None if none did.
        failing: the largest size below it that was seen to fail; None if none did.
        evaluated: whether each evaluated size passed, in the order of evaluation.
    """

    passing: int | None
    failing: int | None
    evaluated: Mapping[int, bool]


def smallest_passing(most: int, passes: Callable[[int], bool], start: int, evaluations: int = 8) -> SizeFound:
    """Find a small size that passes: binary search, and a final step down while evaluations are left.

    Sizes are expected to pass from some size on. Where that is not so (metrics are noisy), the last steps look whether
    one size less passes too.

    Args:
        most: the largest size.
        passes: evaluates a size.
        start: the size to try first, such as the number of leaders; sizes double from there until one passes, and the
            largest is tried after three that fail.
        evaluations: how many sizes are evaluated at most.

    Example:
        >>> smallest_passing(100, lambda size: size >= 13, start=4)
        SizeFound(passing=13, failing=12, evaluated={4: False, 8: False, 16: True, 12: False, 14: True, 13: True})
    """
    seen: dict[int, bool] = {}

    def tried(size: int) -> bool:
        seen[size] = passes(size)
        return seen[size]

    low, high = 0, None  # `low` fails (size 0 is known to fail), `high` passes
    size = max(1, min(start, most))
    while len(seen) < evaluations:
        if tried(size):
            high = size
            break
        low = size
        if size == most:
            break
        size = min(most, 2 * size) if len(seen) < _DOUBLINGS else most
    while high is not None and high - low > 1 and len(seen) < evaluations:
        size = (low + high) // 2
        if tried(size):
            high = size
        else:
            low = size
    while high is not None and high > 1 and len(seen) < evaluations and high - 1 not in seen and tried(high - 1):
        high -= 1
    failing = max((size for size, passed in seen.items() if not passed and (high is None or size < high)), default=None)
    return SizeFound(high, failing, dict(seen))
