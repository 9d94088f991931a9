"""Remedies for a point that quantizes badly: what to change, as YAML to paste, and by how much the error will fall.

The predictions use the error of a step ``s`` that values hit evenly, ``s / sqrt(12)`` (root mean square). A remedy
promises half of the predicted factor: real values do not hit a step evenly, and observers do not use the whole range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lightning_qat.analysis.comparison.point_evidence import AxisProfile, PointEvidence

WORTHWHILE = 4.0
"""A remedy is offered if it promises two bits: less is lost in the noise of the next calibration."""
MOST_GROUPS = 4
MOST_PLACES = 512
ENOUGH = 1 / 64
"""Relative error that a split should reach: five significant bits."""
_INT8_MAX, _INT16_MAX = 127, 32767


@dataclass(frozen=True)
class Remedy:
    """One thing to do about a point.

    Args:
        action: a sentence that says what to do.
        yaml: the override to paste; empty if it takes more than that.
        factor: the point's root mean square error (relative to every single value if ``relative``) falls at least by
            this factor; None if that cannot be told.
        relative: see ``factor``.
    """

    action: str
    yaml: str = ""
    factor: float | None = None
    relative: bool = False


def override(point: str, is_weight: bool, **fields: object) -> str:
    """Format an override as YAML to paste.

    Example:
        >>> print(override("div_0.input1", False, dtype="int16", fixed_scale="100/32768"))
        overrides:
          - {match: "div_0.input1", activation: {dtype: int16, fixed_scale: 100/32768}}
    """
    inner = ", ".join(f"{key}: {_flow(value)}" for key, value in fields.items())
    return f'overrides:\n  - {{match: "{point}", {"weight" if is_weight else "activation"}: {{{inner}}}}}'


def wider_type(e: PointEvidence, declared: tuple[float, float] | None = None) -> Remedy:
    """Raise a point to int8 if it has less, else to int16; with a declared range, to int16 at a scale that fits it."""
    dtype = wider_dtype(e)
    if declared is not None and e.role != "weight":
        largest = max(abs(end) for end in declared)
        has_int16 = not e.types or "int16" in e.types
        levels = 32768 if has_int16 else e.quant_max + 1
        fields: dict[str, object] = {"dtype": "int16"} if has_int16 else {}
        scale = f"{largest:g}/{levels}"
        yaml = override(e.point, False, **fields, fixed_scale=scale)
        action = f"Raise it to int16 with the fixed scale {scale}." if has_int16 else f"Fix the scale: {scale}."
        return Remedy(action, yaml, _promised(e, largest / levels / 12**0.5))
    if dtype is None and e.bits < 16:
        return Remedy("The hardware has no wider type here: change the model so that its values are more even.")
    if dtype is None:
        return Remedy(
            "It has 16 bits already: keep it in float32, or change the model so that its values are more even.",
            override(e.point, e.role == "weight", dtype="float32"),
        )
    quant_max = _INT16_MAX if dtype == "int16" else _INT8_MAX
    fields = {"dtype": dtype}
    if e.fixed_scale is not None:
        fields["fixed_scale"] = f"{rounded_up(e.largest):g}/{quant_max}"
    elif e.clipping > e.rounding:
        fields["observer"] = "minmax"
    after = e.largest / quant_max / math.sqrt(12)
    return Remedy(f"Raise it to {dtype}.", override(e.point, e.role == "weight", **fields), _promised(e, after))


def wider_dtype(e: PointEvidence) -> str | None:
    """The next usual type with more bits that the hardware has; None if there is none."""
    types = [dtype for dtype, bits in (("int8", 8), ("int16", 16)) if bits > e.bits]
    return next((dtype for dtype in types if not e.types or dtype in e.types), None)


def fitted_scale(e: PointEvidence, why: str) -> Remedy:
    """Make the type represent just what was seen: by the observer if that can do it, else with a fixed scale."""
    if e.role == "weight":
        return Remedy(why)
    if e.scheme == "affine" and e.fixed_scale is None and _saw_the_same(e):  # a range that is not around zero
        yaml = override(e.point, False, observer="minmax")
        return Remedy(f"{why} Let the observer cover all values.", yaml, _promised(e, _fitted_step(e) / math.sqrt(12)))
    if e.quant_max == (1 << e.bits) - 1 and e.min is not None and e.min < 0:  # unsigned: a fixed scale starts at zero
        wider = wider_type(e)
        return replace(wider, action=f"{why} {wider.action}")
    largest = rounded_up(e.largest)
    scale = f"{largest:g}/{e.quant_max}"
    yaml = override(e.point, False, fixed_scale=scale)
    return Remedy(f"{why} Or fix the scale: {scale}.", yaml, _promised(e, largest / e.quant_max / math.sqrt(12)))


def wider_range(e: PointEvidence) -> Remedy:
    """Represent everything that was seen: by the observer if that suffices, else with a wider type as well."""
    factor = _promised(e, _fitted_step(e) / math.sqrt(12)) if e.fixed_scale is None else None
    if factor is None or (factor < WORTHWHILE and e.bits < 16):
        return wider_type(e)
    yaml = override(e.point, e.role == "weight", observer="minmax")
    return Remedy("Let the observer cover all values.", yaml, factor)


def exceeds_calibration(e: PointEvidence) -> bool:
    """Whether values came that the range of the calibration data does not explain."""
    if e.calibrated is None or e.min is None or e.max is None:
        return False
    low, high = e.calibrated
    if e.scheme == "affine":
        return e.min < min(low, 0.0) - e.scale or e.max > max(high, 0.0) + e.scale
    return e.largest > max(-low, high) + e.scale


def _saw_the_same(e: PointEvidence) -> bool:
    """Whether a range from calibration fits what was seen now."""
    if e.calibrated is None or e.min is None or e.max is None or exceeds_calibration(e):
        return False
    return e.calibrated[1] - e.calibrated[0] <= 2 * (e.max - e.min)


def _fitted_step(e: PointEvidence) -> float:
    """Step with which the type represents just what was seen."""
    if e.scheme != "affine" or e.min is None or e.max is None:
        return e.largest / e.quant_max
    return (max(e.max, 0.0) - min(e.min, 0.0)) / ((1 << e.bits) - 1)


def split(e: PointEvidence) -> Remedy | None:
    """Give groups along an axis scales of their own, so that small values keep their relative precision.

    Tries the present type, then int16, with as few groups as do; returns None if no axis helps.
    """
    now = relative_rms(e)
    types = [(e.dtype, e.quant_max)]
    if e.bits < 16 and (not e.types or "int16" in e.types):
        types.append(("int16", _INT16_MAX))
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
    )


def best_split(profile: AxisProfile, groups: int, quant_max: int, count: int) -> tuple[float, tuple[int, ...]]:
    """Find the groups of neighbours along an axis with the smallest root mean square of ``error / value``.

    A group's step is its largest magnitude over ``quant_max``; the squared relative error of its values adds up to
    ``step**2 / 12`` times their ``1 / x**2``. Exact, by dynamic programming over at most ``MOST_PLACES`` places: a
    longer axis is cut at multiples of a few indices only, as time and memory grow with the square of the places.

    Args:
        profile: the values along the axis.
        groups: number of groups.
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
    whole = len(profile.largest)
    width = -(-whole // MOST_PLACES)
    places = np.arange(0, whole, width)
    largest = np.maximum.reduceat(np.array(profile.largest), places)
    inverse = np.add.reduceat(np.array(profile.inverse_squares), places)
    length = len(largest)
    cost: NDArray[np.float64] = np.full((length + 1, length + 1), np.inf)  # of a group from index i to j, excluded
    for i in range(length):
        highest = np.maximum.accumulate(largest[i:])
        cost[i, i + 1 :] = (highest / quant_max) ** 2 / 12 * np.cumsum(inverse[i:])
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
    return math.sqrt(float(total[length]) / count), sizes


def _unsplit(profile: AxisProfile, quant_max: int, count: int) -> float:
    """Return the prediction of :func:`best_split` for one group."""
    return max(profile.largest) / quant_max * math.sqrt(sum(profile.inverse_squares) / 12 / count)


def relative_rms(e: PointEvidence) -> float:
    """Root mean square, over all values, of the error relative to the value."""
    return math.sqrt(sum(o.count * o.relative_error**2 for o in e.octaves) / max(1, e.count))


def rounded_up(value: float, digits: int = 3) -> float:
    """Round up to some significant digits.

    Example:
        >>> rounded_up(3.14159), rounded_up(86.6)
        (3.15, 86.6)
    """
    if value <= 0 or not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.{digits}g}")


def _promised(e: PointEvidence, after: float) -> float | None:
    factor = math.floor(e.error / after / 2) if after else 0
    return float(factor) if factor > 1 else None


def _flow(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    return str(value)
