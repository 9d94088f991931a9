"""How far two measurements may lie apart before a difference counts, and when a fall is a collapse.

Every check asks :func:`tolerance`: the rungs of the pipeline check, the convergence monitor and the comparison of
fingerprints. Only ``least``, the difference that is tolerated in any case, differs between them.
"""

from __future__ import annotations

import math

STANDARD_ERRORS = 3.0
"""A fall of three standard errors happens by chance in about one of a thousand evaluations."""
COLLAPSE = 0.1
"""A fall by more than this share is a collapse; also the tolerance where there is nothing to estimate noise from."""
ROUNDING = 0.01
"""Relative difference that another device or precision makes of the same samples."""


def tolerance(*errors: float, least: float = 0.0) -> float:
    """Return the largest difference of two measurements that chance explains: three of its standard errors.

    Args:
        errors: standard errors of the independent measurements that are subtracted; one if the other is exact.
        least: a difference of this size is tolerated in any case.

    Example:
        >>> tolerance(0.01), tolerance(0.03, 0.04, least=0.1), tolerance(0.01, least=0.1)
        (0.03, 0.15000000000000002, 0.1)
    """
    return max(least, STANDARD_ERRORS * math.hypot(*errors))
