"""Which kind of error a point makes: the first verdict whose evidence holds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from lightning_qat.analysis.comparison.point_evidence import PointEvidence
from lightning_qat.analysis.comparison.populations import Population
from lightning_qat.analysis.diagnosis.diagnosis_result import Diagnosis, Verdict
from lightning_qat.analysis.diagnosis.part_remedy import keep_part
from lightning_qat.analysis.diagnosis.remedies import affine_scheme, wider_type
from lightning_qat.analysis.diagnosis.remedy import Remedy, override, percent
from lightning_qat.analysis.diagnosis.remedy_choice import (
    against_bad_scale,
    against_clipping,
    against_rounding,
    against_vanishing,
    is_shared_unevenly,
    is_too_wide,
)
from lightning_qat.analysis.diagnosis.split_remedy import split
from lightning_qat.analysis.model_check.divided_values import LEAST_DIVISOR_PRECISION
from lightning_qat.quantization.numerics.scales import MIN_SCALE

LOST_BITS = 3.0
"""Values spread evenly over the whole range have a relative error of ``2**-bits``. A bell-shaped distribution costs a
bit or two, a sign that is never used one more: what is worse than three bits has another cause."""
LEAST_DYNAMIC_RANGE = 16.0
"""Below four octaves, groups with scales of their own would not gain what they cost."""
RARE = 0.01
"""Magnitudes that fewer of the values have do not count as the smallest ones."""
LEAST_GAP = 4
"""Octaves from one magnitude that occurs to the next: data have no such gap, a -99 for what is missing makes one."""
LEAST_SHARE = 0.1
"""Part of the values other than zero that the small ones have to be."""
MOST_CLUSTER_ERROR = 1 / 8
"""Relative error of the small ones: with less than three bits, little is left of them."""
MOST_ERROR = 1 / 3
"""More is not fine with three bits or more, whose best error of bell-shaped values is a fifth. With two, a half."""
LEAST_ERROR = 1 / 256
"""Less is fine whatever the type: that of 8 bits that values use evenly."""


def judged(
    e: PointEvidence, declared: tuple[float, float] | None, effect: str, lost_output: bool, is_off: bool
) -> Diagnosis:
    """The first verdict that holds: what makes the others meaningless comes first.

    Args:
        e: the point.
        declared: its declared range.
        effect: what makes it sensitive, in words; empty if nothing does.
        lost_output: a part of the output is lost when the whole model is quantized.
        is_off: the output is far from that of the float model.
    """
    severity = e.relative_error
    if e.request:
        yaml = override(e.point, e.role == "weight", dtype=e.requested)
        return Diagnosis(
            e.point,
            "config not applied",
            f"{e.request}.",
            "Put the rule behind the one that wins, or remove that one.",
            yaml,
            severity=severity,
        )
    small = _small_values(e)
    if declared is not None and (problem := _range_problem(e, declared)):
        return _with(wider_type(e, declared), e, "bad scale", problem, severity)
    if problem := _scale_problem(e):
        return _with(against_bad_scale(e), e, "bad scale", problem, severity)
    if e.divides and small > LEAST_DIVISOR_PRECISION and e.dynamic_range >= LEAST_DYNAMIC_RANGE:
        evidence = (
            f"{e.divides[0]} divides by it; its magnitudes span a factor {e.dynamic_range:.3g} with one step of "
            f"{e.scale:.4g}, so that the smallest are off by {percent(small)} though none is far outside the range."
        )
        return _with(split(e) or wider_type(e), e, "non-uniform", evidence, max(small, severity))
    if (cluster := _small_cluster(e)) is not None and (declared is None or not effect):
        share, error, largest = cluster
        evidence = (
            f"{percent(share)} of the values are below {largest:g}, far from the others, and off by "
            f"{percent(error)}: the large ones, up to {e.largest:.4g}, set the step of {e.scale:.4g}."
        )
        remedy = split(e) or wider_type(e, declared)
        missing = " If the large ones mark what is missing, mask them in the model before they are quantized."
        remedy = replace(remedy, action=remedy.action + missing)
        return _with(remedy, e, "non-uniform", evidence, max(error, severity))
    if (part := _lost_part(e, bool(effect) or lost_output, is_off)) is not None and declared is None:
        return _with(
            keep_part(e, part), e, "non-uniform", f"{_lost(e, part)} {effect}".rstrip(), max(part.error, severity)
        )
    if not effect and severity <= allowed_error(e.bits):
        return Diagnosis(e.point, "fine", f"Relative error {percent(severity)} at {e.dtype}.", severity=severity)
    numbers = f"{_numbers(e, severity)} {effect}".rstrip()
    if e.clipping > e.rounding:
        return _with(against_clipping(e, declared), e, "clipping", numbers, severity)
    enough = 0.0 if effect else allowed_error(e.bits)
    spread_out = is_too_wide(e) or is_shared_unevenly(e) or _is_enough(affine_scheme(e), enough)
    if e.vanished > 0.5 and not spread_out:
        evidence = (
            f"{100 * e.vanished:.3g} % of the values other than zero become zero: a few large ones set the scale."
        )
        return _with(against_vanishing(e, declared), e, "non-uniform", evidence, severity)
    return _with(against_rounding(e, declared, enough), e, "rounding", numbers, severity)


def allowed_error(bits: int) -> float:
    """Return the relative error up to which a point of so many bits is fine.

    Example:
        >>> [allowed_error(bits) for bits in (2, 4, 8, 16)]
        [0.5, 0.3333333333333333, 0.03125, 0.00390625]
    """
    most = max(MOST_ERROR, float(2.0 ** (1 - bits)))
    return max(LEAST_ERROR, min(float(2.0 ** (LOST_BITS - bits)), most))


def _is_enough(remedy: Remedy | None, enough: float) -> bool:
    return remedy is not None and remedy.after is not None and remedy.after <= enough


def _with(remedy: Remedy, e: PointEvidence, verdict: Verdict, evidence: str, severity: float) -> Diagnosis:
    return Diagnosis(
        e.point,
        verdict,
        evidence,
        f"{remedy.action} {remedy.outcome}".rstrip(),
        remedy.yaml,
        remedy.factor,
        remedy.relative,
        severity,
        after=remedy.after,
    )


def _lost_part(e: PointEvidence, matters: bool, is_off: bool) -> Population | None:
    """The part of a tensor that quantization destroys and that counts.

    Small values in the middle of a model may mean nothing. They count if they leave the region so, or if the point is
    known to act on an output that suffers (``matters``). Where the output is just far off, those count of which it is
    known that they are something of their own: channels of a weight, inputs of the model, parts of a join.
    """
    is_weight = e.role == "weight"
    apart = [p for p in e.populations if p.apart or (_is_channels(e, p) and len(p.indices) >= LEAST_SHARE * p.length)]
    if not (matters or e.leaves):
        apart = [p for p in apart if is_off and (is_weight or e.given or p.maker)]
    return max(apart, key=lambda p: (bool(p.maker), p.error), default=None)


def _is_channels(e: PointEvidence, part: Population) -> bool:
    """Whether the part are output channels of a weight: each of them computes something of its own."""
    return e.role == "weight" and part.axis == e.channel_axis


def _lost(e: PointEvidence, part: Population) -> str:
    """What becomes of a part, in words."""
    where = f"{part.text}, from {part.maker}," if part.maker else part.text
    what = "become zero" if part.zero else "lose their order"
    text = (
        f"The values at {where} are at most {part.largest:.3g} and {what} (error {percent(part.error)} of their "
        f"spread): the others, up to {part.others:.3g}, set the step of {e.scale:.4g}."
    )
    return f"{text} They leave the region so." if e.leaves else text


def _numbers(e: PointEvidence, severity: float) -> str:
    """The split of the error, and the ranges."""
    total = e.rounding + e.clipping
    share = 100 * e.clipping / total if total else 0.0
    low, high = e.representable
    text = (
        f"Relative error {percent(severity)} at {e.dtype}; {share:.3g} % of the energy of that error is clipping, "
        f"and {percent(e.clipped_share)} of the values are clipped. Represents {low:.4g} to {high:.4g}, "
        f"saw {e.min:.4g} to {e.max:.4g}, step {e.scale:.4g}."
    )
    if is_shared_unevenly(e):
        calls = ", ".join(f"{a:.4g} to {b:.4g}" for a, b in e.calls[:4])
        text += f" Its {len(e.calls)} calls share the scale and see {calls}."
    return text


def _small_values(e: PointEvidence) -> float:
    """Relative error of the smallest octave that is not rare."""
    seen = 0
    for octave in e.octaves:
        seen += octave.count
        if seen >= RARE * e.count:
            return octave.relative_error
    return 0.0


def _small_cluster(e: PointEvidence) -> tuple[float, float, float] | None:
    """Values of an input far smaller than its largest, with nothing between, which the step does not serve.

    Returns:
        Their share, their relative error, and what they are smaller than; None if there are none.
    """
    exponents = [octave.exponent for octave in e.octaves]
    gaps = [(after - before, i) for i, (before, after) in enumerate(itertools.pairwise(exponents), 1)]
    if e.role != "input" or not gaps or max(gaps)[0] < LEAST_GAP:
        return None
    small = e.octaves[: max(gaps)[1]]
    share = sum(o.count for o in small) / sum(o.count for o in e.octaves)
    energy = [o.count * 4.0**o.exponent for o in small]
    error = math.sqrt(sum(w * o.relative_error**2 for w, o in zip(energy, small, strict=True)) / sum(energy))
    if share < LEAST_SHARE or error < MOST_CLUSTER_ERROR:
        return None
    return share, error, 2.0 ** (small[-1].exponent + 1)


def _range_problem(e: PointEvidence, declared: tuple[float, float]) -> str:
    """Why the range that is represented does not fit the declared one; nothing if it does."""
    low, high = e.representable
    half = e.scale / 2  # values so far outside are still rounded to the last code
    largest = max(abs(end) for end in declared)
    text = f"Represents {low:.4g} to {high:.4g} in steps of {e.scale:.4g}, the declared range is {declared[0]:g} to "
    text += f"{declared[1]:g}: "
    if declared[0] < low - half or declared[1] > high + half:
        return (
            f"{text}its ends are clipped, by {max(low - declared[0], declared[1] - high):.3g}"
            f"{', and the step is coarse' if e.bits <= 8 else ''}."
        )
    if max(map(abs, e.representable)) > 2 * largest:  # a bit
        return f"{text}at least one bit of the type is never used."
    return ""


def _scale_problem(e: PointEvidence) -> str:
    if not math.isfinite(e.scale) or e.scale <= MIN_SCALE:
        return f"The scale is {e.scale:.4g}."
    if e.role == "weight" or not e.signal:
        return ""
    if e.codes == 1 and e.min != e.max:
        return f"All values, {e.min:.4g} to {e.max:.4g}, become the same one: the step is {e.scale:.4g}."
    if e.clipped_share > 0.5:
        low, high = e.representable
        return f"{100 * e.clipped_share:.3g} % of the values are clipped: it represents only {low:.4g} to {high:.4g}."
    return ""
