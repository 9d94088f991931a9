"""Remedies for a point that quantizes badly, but for splits."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_qat.analysis.comparison.point_evidence import PointEvidence
from lightning_qat.analysis.diagnosis.remedy import (
    INT8_MAX,
    INT16_MAX,
    WORTHWHILE,
    Remedy,
    override,
    predicted,
    promised,
    rounded_up,
)
from lightning_qat.analysis.statistics.affine_gain import WORTHWHILE_GAIN

_HELPS = 0.95
"""What changes less than a 20th is no remedy."""


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
        return predicted(e, action, yaml, largest / levels / 12**0.5)
    if dtype is None and e.bits < 16:
        return Remedy("The hardware has no wider type here: change the model so that its values are more even.")
    if dtype is None:
        if e.types and "float32" not in e.types:
            return Remedy("It has 16 bits already: change the model so that its values are more even.")
        action = "It has 16 bits already: keep it in float32, or change the model so that its values are more even."
        return predicted(e, action, override(e.point, e.role == "weight", dtype="float32"), 0.0)
    quant_max = INT16_MAX if dtype == "int16" else INT8_MAX
    fields = {"dtype": dtype}
    if e.fixed_scale is not None:
        fields["fixed_scale"] = f"{rounded_up(e.largest):g}/{quant_max}"
    elif e.clipping > e.rounding:
        fields["observer"] = "minmax"
    after = e.largest / quant_max / math.sqrt(12)
    return predicted(e, f"Raise it to {dtype}.", override(e.point, e.role == "weight", **fields), after)


def scale_per_channel(e: PointEvidence) -> Remedy | None:
    """Give each channel of a weight its own scale, if the hardware can and it helps."""
    if e.role != "weight" or e.scales > 1 or e.channels < 2 or (e.styles and "per_channel" not in e.styles):
        return None
    action, yaml = (
        "Give each channel its own scale (granularity: per_channel).",
        override(e.point, True, granularity="per_channel"),
    )
    if e.per_channel is None:
        return Remedy(action, yaml)
    remedy = predicted(e, action, yaml, math.sqrt(e.per_channel / max(1, e.count)), "measured")
    return remedy if remedy.after is not None and remedy.after < _HELPS * e.relative_error else None


def affine_scheme(e: PointEvidence) -> Remedy | None:
    """Let the range follow the values where nearly all have one sign, if the hardware can and it helps."""
    if e.affine_gain is None or e.affine_gain < WORTHWHILE_GAIN or (e.styles and "affine" not in e.styles):
        return None
    action = "Nearly all values have one sign: use an affine scheme."
    return predicted(e, action, override(e.point, False, scheme="affine"), e.error / e.affine_gain)


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
        return predicted(e, f"{why} Let the observer cover all values.", yaml, _fitted_step(e) / math.sqrt(12))
    if e.quant_max == (1 << e.bits) - 1 and e.min is not None and e.min < 0:  # unsigned: a fixed scale starts at zero
        wider = wider_type(e)
        return replace(wider, action=f"{why} {wider.action}")
    largest = rounded_up(e.largest)
    scale = f"{largest:g}/{e.quant_max}"
    yaml = override(e.point, False, fixed_scale=scale)
    return predicted(e, f"{why} Or fix the scale: {scale}.", yaml, largest / e.quant_max / math.sqrt(12))


def wider_range(e: PointEvidence) -> Remedy:
    """Represent everything that was seen: by the observer if that suffices, else with a wider type as well."""
    factor = promised(e, _fitted_step(e) / math.sqrt(12)) if e.fixed_scale is None else None
    if factor is None or (factor < WORTHWHILE and e.bits < 16):
        return wider_type(e)
    yaml = override(e.point, e.role == "weight", observer="minmax")
    return predicted(e, "Let the observer cover all values.", yaml, _fitted_step(e) / math.sqrt(12))


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
