"""Groups along an axis with scales of their own, for values whose relative precision counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_qat.analysis.comparison.best_split import best_groups
from lightning_qat.analysis.comparison.point_evidence import AxisProfile, PointEvidence
from lightning_qat.analysis.comparison.populations import MOST_GROUPS
from lightning_qat.analysis.diagnosis.remedy import INT16_MAX, WORTHWHILE, Remedy, override, percent

ENOUGH = 1 / 64
"""Relative error that a split should reach: five significant bits."""


def split(e: PointEvidence) -> Remedy | None:
    """Give groups along an axis scales of their own, so that small values keep their relative precision.

    Tries the present type, then int16, with as few groups as do; returns None if no axis helps.
    """
    now = relative_rms(e)
    types = [(e.dtype, e.quant_max)]
    if e.bits < 16 and (not e.types or "int16" in e.types):
        types.append(("int16", INT16_MAX))
    best: tuple[float, str, AxisProfile, tuple[int, ...]] | None = None
    for dtype, quant_max in types:
        for groups in range(2, MOST_GROUPS + 1):
            for profile in (p for p in e.profiles if len(p.largest) >= groups):
                after, sizes = best_split(profile, groups, quant_max, e.count)
                whole = now / 2 if dtype == e.dtype else _unsplit(profile, quant_max, e.count)
                if (best is None or after < best[0]) and whole >= WORTHWHILE * after:  # not by the wider type alone
                    best = after, dtype, profile, sizes
            if best is not None and best[0] <= ENOUGH and now >= 2 * WORTHWHILE * best[0]:
                return _split(e, now, *best)
    return _split(e, now, *best) if best is not None and now >= 2 * WORTHWHILE * best[0] else None


def _split(
    e: PointEvidence, now: float, after: float, dtype: str, profile: AxisProfile, sizes: Sequence[int]
) -> Remedy:
    fields: dict[str, object] = {} if dtype == e.dtype else {"dtype": dtype}
    fields["split"] = {"axis": profile.axis, "sizes": list(sizes)}
    return Remedy(
        f"Quantize {len(sizes)} groups along axis {profile.axis} with scales of their own, {list(sizes)}; or split the "
        "tensor in the model, do what follows with each part, and concatenate.",
        override(e.point, False, **fields),
        float(math.floor(now / after / 2)),
        relative=True,
        after=after,
        outcome=f"The error relative to each value falls from {percent(now)} to {percent(after)} (predicted).",
    )


def best_split(profile: AxisProfile, groups: int, quant_max: int, count: int) -> tuple[float, tuple[int, ...]]:
    """Find the groups of neighbours along an axis with the smallest root mean square of ``error / value``.

    The squared relative error of a group's values adds up to ``step**2 / 12`` times their ``1 / x**2``; see
    :func:`~lightning_qat.analysis.comparison.best_split.best_groups`.

    Args:
        profile: what is along the axis.
        groups: how many.
        quant_max: largest code.
        count: number of values.

    Returns:
        The predicted root mean square of the relative errors, and the lengths of the groups.

    Example:
        >>> values = np.array([1.0, 2.0, 1000.0, 2000.0])
        >>> error, sizes = best_split(AxisProfile(0, tuple(values), tuple(values**-2)), 2, 127, 4)
        >>> sizes, round(error, 4)
        ((2, 2), 0.0036)
    """
    squares, sizes = best_groups(np.array(profile.largest), np.array(profile.inverse_squares), groups, quant_max)
    return math.sqrt(squares / count), sizes


def _unsplit(profile: AxisProfile, quant_max: int, count: int) -> float:
    """What :func:`best_split` predicts of one group."""
    return max(profile.largest) / quant_max * math.sqrt(sum(profile.inverse_squares) / 12 / count)


def relative_rms(e: PointEvidence) -> float:
    """Root mean square, over all values, of the error relative to the value."""
    return math.sqrt(sum(o.count * o.relative_error**2 for o in e.octaves) / max(1, e.count))
