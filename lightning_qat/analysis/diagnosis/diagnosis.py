"""What kind of error a point makes, and what to do about it (B4, B5, B7): ``diagnose(comparison)``.

Pure: it looks at the numbers that :func:`~lightning_qat.analysis.comparison.comparison.compare` has gathered, at the
sensitivity if it is given, and at nothing else.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_qat.analysis.comparison.comparison_result import CHOSEN, LayerComparisonResult
from lightning_qat.analysis.comparison.point_evidence import PointEvidence
from lightning_qat.analysis.diagnosis.diagnosis_result import Diagnosis, DiagnosisResult, Verdict, severest_first
from lightning_qat.analysis.diagnosis.remedies import Remedy, override, split, wider_type
from lightning_qat.analysis.diagnosis.remedy_choice import (
    against_bad_scale,
    against_clipping,
    against_rounding,
    is_shared_unevenly,
    is_too_wide,
)
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult
from lightning_qat.quantization.errors import ConfigurationError, near_names
from lightning_qat.quantization.numerics.scales import MIN_SCALE
from lightning_qat.quantization.overrides import glob_covers

LOST_BITS = 3.0
"""Values spread evenly over the whole range have a relative error of ``2**-bits``. A bell-shaped distribution costs a
bit or two, a sign that is never used one more: what is worse than three bits has another cause."""
LEAST_DIVISOR_PRECISION = 1 / 32
"""Relative error of a divisor's small values: with less than four significant bits, quotients are off by percents."""
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
SENSITIVE_FACTOR = 4.0
"""A point whose score is this many times the median would need two bits more to be like the others. In a deep model
many are: what is found has to matter to the output as well."""
LEAST_EFFECT = 1 / 32
"""Relative change of the output by one point of 8 bits or less: 30 dB, what a tensor quantized well has itself. Of a
point with more bits, 60 dB."""


def diagnose(
    comparison: LayerComparisonResult,
    sensitivity: SensitivityResult | None = None,
    ranges: Mapping[str, Sequence[float]] | None = None,
) -> DiagnosisResult:
    """Say of every point which kind of error it makes, with the evidence and an action.

    Args:
        comparison: of the quantized model with the float model.
        sensitivity: the order of the list, if given: a point that is quantized well and is far more sensitive than the
            others is a culprit too. Without it, the order is that of the relative errors.
        ranges: physical ranges that the values of points have, by a glob over point names:
            ``{"*.ref_point*": [-100, 1]}``.

    Raises:
        ConfigurationError: a declared range is not one, or its pattern matches no point.

    Example:
        >>> import torch
        >>> from lightning_qat.analysis.comparison.comparison import compare
        >>> from lightning_qat.quantization.region.calibration import calibrate
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> too_wide = [{"match": "0.input0", "activation": {"fixed_scale": 1.0}}]
        >>> x = torch.linspace(-1, 1, 32).reshape(8, 4)
        >>> region = insert(model, (x,), overrides=too_wide)
        >>> _ = calibrate(region, [x])
        >>> worst = diagnose(compare(region, [x])).culprits[0]
        >>> worst.point, worst.verdict, worst.factor > 10
        ('0.input0', 'rounding', True)
        >>> print(worst.yaml)
        overrides:
          - {match: "0.input0", activation: {fixed_scale: 1/127}}
    """
    declared = _declared(comparison, ranges or {})
    origins = {row.point: row.origin for row in comparison.rows if row.point}
    scores = {row.point: row.score for row in sensitivity.rows} if sensitivity is not None else {}
    known = [score for score in scores.values() if math.isfinite(score)]
    usual = statistics.median_low(known) if known else math.inf
    reshaped = sensitivity.reshaped if sensitivity is not None else ()
    same_output = sensitivity is not None and sensitivity.output == comparison.output
    size = comparison.output_size if same_output else None
    whole = comparison.by_name.get(CHOSEN) if same_output else None
    broken = whole is None or (whole.MSE is not None and math.isnan(whole.MSE))
    rows = []
    for e in comparison.evidence:
        score = scores.get(e.point)
        effect = _effect(e, score, usual, size) if score is not None else ""
        unstable = score is not None and (math.isnan(score) or e.point in reshaped)
        if unstable and not broken:
            effect = ""  # how much the output selects follows the values: any error changes its shape
        row = replace(_judged(e, declared.get(e.point), effect), score=score, loop=e.loop)
        if row.verdict == "fine" and origins.get(e.point) == "inherited":
            row = replace(row, verdict="inherited", evidence=f"{row.evidence} Most of its error comes from before.")
        rows.append(row)
    return DiagnosisResult(tuple(sorted(rows, key=severest_first)))


def check_declared_range(pattern: str, ends: Sequence[float], points: Sequence[str]) -> list[str]:
    """Return the points that a declared range is about.

    Raises:
        ConfigurationError: it is not a range, or is about no point.

    Example:
        >>> check_declared_range("*.ref_point*", [-100, 1], ["conv.weight", "decoder.ref_point.input0"])
        ['decoder.ref_point.input0']
    """
    numbers = isinstance(ends, (list, tuple)) and len(ends) == 2 and all(isinstance(end, (int, float)) for end in ends)
    if not numbers or not all(math.isfinite(end) for end in ends) or not ends[0] < ends[1]:
        raise ConfigurationError(f"ranges[{pattern!r}] must be the two ends of a range such as [-100, 1], not {ends}.")
    matching = [point for point in points if glob_covers(pattern, point)]
    if not matching:
        near = near_names(pattern, points)
        hint = f" Near names: {', '.join(near)}." if near else ""
        raise ConfigurationError(f"ranges: {pattern!r} matches no quantization point.{hint}")
    return matching


def _effect(e: PointEvidence, score: float, usual: float, size: float | None) -> str:
    """What makes a point sensitive, in words; nothing if it is not.

    Some points always lead the list: they are culprits only if each, alone, does something to the output.
    """
    if math.isnan(score):
        return "Alone, it turns the output into NaN or changes its structure."
    if not score >= SENSITIVE_FACTOR * usual > 0:
        return ""
    ahead = f"{score / usual:.3g} times as much as the median point"
    if not size:
        return f"Alone, it changes the output by {score:.3g} (root mean square), {ahead}."
    if score < size * (LEAST_EFFECT if e.bits <= 8 else LEAST_EFFECT**2):
        return ""
    return f"Alone, it changes the output by {_percent(score / size)}, {ahead}."


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if abs(share) < 0.995 else f"{100 * share:.3g} %"


def _judged(e: PointEvidence, declared: tuple[float, float] | None, effect: str) -> Diagnosis:
    """The first verdict that holds: what makes the others meaningless comes first."""
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
            f"{e.scale:.4g}, so that the smallest are off by {_percent(small)} though none is far outside the range."
        )
        return _with(split(e) or wider_type(e), e, "non-uniform", evidence, max(small, severity))
    if (cluster := _small_cluster(e)) is not None and (declared is None or not effect):
        share, error, largest = cluster
        evidence = (
            f"{_percent(share)} of the values are below {largest:g}, far from the others, and off by "
            f"{_percent(error)}: the large ones, up to {e.largest:.4g}, set the step of {e.scale:.4g}."
        )
        remedy = split(e) or wider_type(e, declared)
        missing = " If the large ones mark what is missing, mask them in the model before they are quantized."
        remedy = replace(remedy, action=remedy.action + missing)
        return _with(remedy, e, "non-uniform", evidence, max(error, severity))
    if not effect and severity <= 2.0 ** (LOST_BITS - e.bits):
        return Diagnosis(e.point, "fine", f"Relative error {_percent(severity)} at {e.dtype}.", severity=severity)
    numbers = f"{_numbers(e, severity)} {effect}".rstrip()
    if e.clipping > e.rounding:
        return _with(against_clipping(e, declared), e, "clipping", numbers, severity)
    if e.vanished > 0.5 and not is_too_wide(e) and not is_shared_unevenly(e):
        evidence = (
            f"{100 * e.vanished:.3g} % of the values other than zero become zero: a few large ones set the scale."
        )
        return _with(split(e) or wider_type(e, declared), e, "non-uniform", evidence, severity)
    return _with(against_rounding(e, declared), e, "rounding", numbers, severity)


def _with(remedy: Remedy, e: PointEvidence, verdict: Verdict, evidence: str, severity: float) -> Diagnosis:
    return Diagnosis(e.point, verdict, evidence, remedy.action, remedy.yaml, remedy.factor, remedy.relative, severity)


def _numbers(e: PointEvidence, severity: float) -> str:
    """The split of the error, and the ranges."""
    total = e.rounding + e.clipping
    share = 100 * e.clipping / total if total else 0.0
    low, high = e.representable
    text = (
        f"Relative error {_percent(severity)} at {e.dtype}; {share:.3g} % of its energy is clipping, of "
        f"{_percent(e.clipped_share)} of the values. Represents {low:.4g} to {high:.4g}, saw {e.min:.4g} to "
        f"{e.max:.4g}, step {e.scale:.4g}."
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


def _declared(
    comparison: LayerComparisonResult, ranges: Mapping[str, Sequence[float]]
) -> dict[str, tuple[float, float]]:
    points = [e.point for e in comparison.evidence]
    found: dict[str, tuple[float, float]] = {}
    for pattern, ends in ranges.items():
        matching = check_declared_range(pattern, ends, points)
        found |= dict.fromkeys(matching, (float(ends[0]), float(ends[1])))
    return found
