"""Which remedy fits an error, by where the scale of the point comes from."""

from __future__ import annotations

from dataclasses import replace

from lightning_qat.analysis.comparison.point_evidence import PointEvidence
from lightning_qat.analysis.diagnosis.remedies import (
    affine_scheme,
    exceeds_calibration,
    fitted_scale,
    scale_per_channel,
    wider_range,
    wider_type,
)
from lightning_qat.analysis.diagnosis.remedy import Remedy, percent
from lightning_qat.analysis.diagnosis.split_remedy import split
from lightning_qat.analysis.model_check.calls_check import SHARED_RANGE_RATIO

LEAVE_OUT = "leave it out, and calibrate."
REMOVE_SCALE = "Remove its fixed scale."
"""Ends of what is advised where a fixed scale of the user is to blame."""
UNUSED_FACTOR = 4.0
"""A range this many times wider than the values wastes two bits, which no margin for rare values needs."""


def against_clipping(e: PointEvidence, declared: tuple[float, float] | None) -> Remedy:
    """Choose what to do about values outside the range."""
    if declared is not None or is_shared_unevenly(e):
        return _for_calls(e, wider_type(e, declared))
    if e.role == "weight":
        channels, wider = scale_per_channel(e), wider_range(e)
        better = channels is not None and channels.after is not None and channels.after <= (wider.after or 0.0)
        return channels if channels is not None and (better or not wider.yaml) else wider
    if e.fixed_scale is not None:
        fitted = fitted_scale(e, f"Its fixed scale is too small: {LEAVE_OUT}")
        return fitted if fitted.factor is not None else wider_type(e)
    if not exceeds_calibration(e):
        return wider_range(e)
    fitted = fitted_scale(e, _more_data(e))
    return fitted if fitted.outcome else Remedy(_more_data(e))  # a scale for all of them would cost more than it gains


def against_bad_scale(e: PointEvidence) -> Remedy:
    """Choose what to do about a scale that does not fit the values."""
    if e.fixed_scale is not None:
        size = "small" if e.clipping > e.rounding else "large"
        return fitted_scale(e, f"Its fixed scale is too {size}: {LEAVE_OUT}")
    return fitted_scale(e, _more_data(e) if exceeds_calibration(e) else "Calibrate with data of ordinary size.")


def against_rounding(e: PointEvidence, declared: tuple[float, float] | None, enough: float = 0.0) -> Remedy:
    """Choose what to do about a step that is too coarse.

    Args:
        e: the point.
        declared: its declared range.
        enough: relative error that is small enough: then a cheaper remedy than a wider type will do.
    """
    if declared is None and e.role != "weight" and is_too_wide(e):
        why = REMOVE_SCALE if e.fixed_scale is not None else "Calibrate with representative data."
        return fitted_scale(e, f"Its range is {max(map(abs, e.representable)) / e.largest:.3g} times too wide. {why}")
    if (channels := scale_per_channel(e)) is not None:
        return channels
    wider = wider_type(e, declared)
    affine = affine_scheme(e) if declared is None and not is_shared_unevenly(e) else None
    if affine is None or affine.after is None:
        return _for_calls(e, wider)
    if affine.after <= enough or not wider.yaml:
        return affine
    return replace(
        wider, outcome=f"{wider.outcome} With scheme: affine at {e.dtype} to {percent(affine.after)}.".strip()
    )


def against_vanishing(e: PointEvidence, declared: tuple[float, float] | None) -> Remedy:
    """Choose what to do about values that become zero because a few large ones set the scale."""
    return scale_per_channel(e) or split(e) or wider_type(e, declared)


def is_shared_unevenly(e: PointEvidence) -> bool:
    """Whether calls with one scale see ranges that differ by more than a bit."""
    widths = [max(-low, high, 0.0) for low, high in e.calls]
    return len(widths) > 1 and max(widths) > SHARED_RANGE_RATIO * min(widths)


def is_too_wide(e: PointEvidence) -> bool:
    """Whether two bits or more of the range are never used."""
    return bool(e.largest) and max(map(abs, e.representable)) >= UNUSED_FACTOR * e.largest


def _for_calls(e: PointEvidence, remedy: Remedy) -> Remedy:
    if not is_shared_unevenly(e):
        return remedy
    advice = (
        "Let every call have a scale of its own: take the code out of the dynamic block (call "
        "lightning_qat.split_shared_modules if the module is registered several times). Otherwise: "
    )
    return replace(remedy, action=advice + remedy.action)


def _more_data(e: PointEvidence) -> str:
    assert e.calibrated is not None  # there is no range to exceed otherwise
    low, high = e.calibrated
    return (
        f"Calibration saw only {low:.4g} to {high:.4g}: give it more, or more representative, batches. If training has "
        "moved the values, let the scales follow (activation_scales: ema or learned)."
    )
