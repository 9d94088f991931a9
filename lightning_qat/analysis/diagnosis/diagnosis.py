"""What kind of error a point makes, and what to do about it: ``diagnose(comparison)``.

Pure: it looks at the numbers that :func:`~lightning_qat.analysis.comparison.comparison.compare` has gathered, at the
sensitivity if it is given, and at nothing else.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_qat.analysis.comparison.comparison_result import CHOSEN, LayerComparisonResult
from lightning_qat.analysis.comparison.point_evidence import PointEvidence
from lightning_qat.analysis.diagnosis.diagnosis_result import DiagnosisResult, severest_first
from lightning_qat.analysis.diagnosis.judgement import judged
from lightning_qat.analysis.diagnosis.remedy import percent
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult
from lightning_qat.quantization.errors import ConfigurationError, near_names
from lightning_qat.quantization.overrides import glob_covers

SENSITIVE_FACTOR = 4.0
"""A point whose score is this many times the median would need two bits more to be like the others. In a deep model
many are: what is found has to matter to the output as well."""
LEAST_EFFECT = 1 / 32
"""Relative change of the output by one point: 30 dB, what a tensor quantized well to 8 bits has itself."""
OFF = 1 / 8
"""Relative error of the output from which a part that is lost somewhere before it is held to matter."""


def diagnose(
    comparison: LayerComparisonResult,
    sensitivity: SensitivityResult | None = None,
    ranges: Mapping[str, Sequence[float]] | None = None,
) -> DiagnosisResult:
    """Say which kind of error every point makes, with the evidence and an action.

    Args:
        comparison: of the quantized model with the float model.
        sensitivity: the order of the list, if given: a point that is quantized well and is far more sensitive than the
            others is a culprit too. Without it, the order is that of the relative errors.
        ranges: physical ranges that the values of points have, by a glob over point names:
            ``{"*.ref_point*": [-100, 1]}``.

    Raises:
        ConfigurationError: a declared range is not two ascending numbers, or its pattern matches no point.

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
    is_off = _is_off(comparison)
    rows = []
    for e in comparison.evidence:
        score = scores.get(e.point)
        effect = _effect(e, score, usual, size) if score is not None else ""
        unstable = score is not None and (math.isnan(score) or e.point in reshaped)
        if unstable and not broken:
            effect = ""  # how much the output selects follows the values: any error changes its shape
        row = replace(
            judged(e, declared.get(e.point), effect, comparison.lost_output, is_off), score=score, loop=e.loop
        )
        if row.verdict == "fine" and origins.get(e.point) == "inherited":
            row = replace(row, verdict="inherited", evidence=f"{row.evidence} Most of its error comes from before.")
        rows.append(row)
    return DiagnosisResult(tuple(sorted(rows, key=severest_first)))


def check_declared_range(pattern: str, ends: Sequence[float], points: Sequence[str]) -> list[str]:
    """Return the points that a declared range applies to.

    Raises:
        ConfigurationError: the ends are not two ascending numbers, or the pattern matches no point.

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
    """Say what makes a point sensitive; empty if it is not.

    Some points always lead the list: they are culprits only if each, alone, does something to the output.
    """
    if math.isnan(score):
        return "Alone, it turns the output into NaN or changes its structure."
    if not score >= SENSITIVE_FACTOR * usual > 0:
        return ""
    ahead = f"{score / usual:.3g} times as much as the median point"
    if not size:
        return f"Alone, it changes the output by {score:.3g} (root mean square), {ahead}."
    if score < size * LEAST_EFFECT:
        return ""
    return f"Alone, it changes the output by {percent(score / size)}, {ahead}."


def _is_off(comparison: LayerComparisonResult) -> bool:
    """Whether the output of the quantized model is far from that of the float model."""
    row, size = comparison.by_name.get(CHOSEN), comparison.output_size
    return row is not None and row.MSE is not None and size is not None and not (OFF * size) ** 2 >= row.MSE


def _declared(
    comparison: LayerComparisonResult, ranges: Mapping[str, Sequence[float]]
) -> dict[str, tuple[float, float]]:
    points = [e.point for e in comparison.evidence]
    found: dict[str, tuple[float, float]] = {}
    for pattern, ends in ranges.items():
        matching = check_declared_range(pattern, ends, points)
        found |= dict.fromkeys(matching, (float(ends[0]), float(ends[1])))
    return found
