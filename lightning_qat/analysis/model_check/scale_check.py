"""Scales and ranges that cost accuracy: degenerate, beyond the type, or unevenly used."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from lightning_qat.analysis.model_check.checked_region import CheckedRegion
from lightning_qat.analysis.model_check.configuration_check import hardware_styles
from lightning_qat.analysis.model_check.finding import Finding, overrides_yaml, shortened
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.analysis.statistics.affine_gain import WORTHWHILE_GAIN, affine_gain
from lightning_qat.analysis.statistics.point_ranges import clipped_share, observed_range, representable_range
from lightning_qat.quantization.numerics.scales import MIN_SCALE
from lightning_qat.quantization.overrides import yaml_name
from lightning_qat.quantization.planning.plan import PointPlan
from lightning_qat.quantization.region.effective_dtypes import FLOAT, bits

FLOAT16_MAX = torch.finfo(torch.float16).max
INT16_STEP_LIMIT = 32768.0
CLIPPED_SHARE = 0.01
"""More than a fixed scale should clip: a hundred times what the ``percentile`` observer leaves out by default."""
_SIGNIFICANT_BITS = {"bf16": 8, "16": 11}
"""Bits of the significand, by the first part of the Trainer's ``precision``."""


def check_scales(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """Look at the scale and the observed range of every point."""
    return [
        *_bad_scales(checked),
        *_without_scale(checked),
        *_starting_at_zero(checked),
        *_wide_ranges(checked),
        *_clipping_scales(checked),
        *_coarse_precision(checked),
        *_one_sided(checked),
    ], []


def points_with_scale(checked: CheckedRegion) -> Iterable[tuple[str, PointPlan]]:
    """The points that quantize with a scale now."""
    for name, plan in checked.plan.by_name.items():
        if plan.same_as is None and checked.points[name].scale_source is not None and checked.points[name].enabled:
            yield name, plan


def _bad_scales(checked: CheckedRegion) -> Iterable[Finding]:
    broken, empty = [], []
    for name, plan in points_with_scale(checked):
        scale = checked.points[name].scale.detach()
        if not bool((scale.isfinite() & (scale > MIN_SCALE)).all()):
            broken.append(name)
        elif checked.points[name].degenerate and not plan.is_weight and not _is_zero_for_good(checked, plan):
            empty.append(name)
    if broken:
        yield Finding(
            severity="error",
            kind="broken scale",
            names=tuple(broken),
            what=f"The scale of {shortened(broken)} is zero, denormal or not finite.",
            why="Dividing by it overflows, and the values behind the point are lost.",
            action="Calibrate again with data of ordinary size; a learned scale that got there needs a smaller "
            "learning rate and no weight decay.",
        )
    if empty:
        yield Finding(
            severity="warning",
            kind="degenerate scale",
            names=tuple(empty),
            what=f"{shortened(empty)}: all values were zero in calibration, so the scale is a stand-in.",
            why="Any other value that comes later is clipped to nearly zero.",
            action="Calibrate with data that reach it, or give it the range it will have with a threshold.",
        )


def _is_zero_for_good(checked: CheckedRegion, point: PointPlan) -> bool:
    """Whether a point quantizes a constant that is not trained: zero is exact with any scale."""
    if point.role != "input":
        return False
    graph = checked.graph.by_name
    pending = [s for o in graph[point.op].operands if o.index == point.operand for s in o.sources]
    seen: set[str] = set()
    while pending:
        source = pending.pop()
        if source.kind in ("op", "mutated"):
            if graph[source.name].data_dependent:
                return False
            if source.name not in seen:
                seen.add(source.name)
                pending.extend(s for o in graph[source.name].operands for s in o.sources)
        elif source.kind not in ("buffer", "constant"):
            return False
    return True


def _without_scale(checked: CheckedRegion) -> Iterable[Finding]:
    if not checked.is_calibrated:
        return
    names = tuple(n for n, p in checked.points.items() if p.scale_source is None and not p.starts_at_zero)
    if names:
        yield Finding(
            severity="warning",
            kind="not calibrated",
            names=names,
            what=f"Calibration did not reach {shortened(names)}, so there is no scale.",
            why="These points stay float when their code runs, and accuracy is measured without their error.",
            action="Calibrate with batches that take this branch, or give them a fixed_scale or a threshold.",
        )


def _starting_at_zero(checked: CheckedRegion) -> Iterable[Finding]:
    names = tuple(n for n, p in checked.points.items() if p.scale_source is None and p.starts_at_zero)
    if names:
        yield Finding(
            severity="info",
            kind="starts at zero",
            names=names,
            what=f"{shortened(names)}: the values do not vary, as a parameter is zero that training moves (a LoRA "
            "adapter, a residual branch or a factor that begins at zero).",
            why="There is no range yet to take a scale from. These points stay float until there is.",
            action="Nothing: they take their scales from training. Deployed without training, the model has none here.",
        )


def _wide_ranges(checked: CheckedRegion) -> Iterable[Finding]:
    wide, overflowing = [], []
    half = checked.options.precision.split("-")[0] == "16"
    for name, plan in points_with_scale(checked):
        if plan.is_weight:
            continue
        point = checked.points[name]
        largest = max(map(abs, representable_range(point)))
        seen = observed_range(point)
        if half and max(map(abs, seen or (0.0,))) > FLOAT16_MAX:
            overflowing.append(name)
        elif bits(point.dtype) == 16 and largest > INT16_STEP_LIMIT * 1.001:
            wide.append(name)
    if overflowing:
        yield Finding(
            severity="error",
            kind="float16 overflow",
            names=tuple(overflowing),
            what=f"{shortened(overflowing)}: calibration saw values above {FLOAT16_MAX:g}, and precision is "
            f"{checked.options.precision}.",
            why="float16 turns them into infinity, and the loss into NaN.",
            action="Train with precision: bf16-mixed or 32-true, or scale the values down.",
        )
    if wide:
        yield Finding(
            severity="warning",
            kind="range beyond int16",
            names=tuple(wide),
            what=f"{shortened(wide)}: the range is above {INT16_STEP_LIMIT:g}, so the step of int16 is more than 1.",
            why="Whole numbers such as indices and coordinates are no longer exact, and small values vanish.",
            action="Scale the values down in the model (metres for millimetres), or clip them with a threshold.",
        )


def _clipping_scales(checked: CheckedRegion) -> Iterable[Finding]:
    shares, larger = {}, []
    for name, plan in points_with_scale(checked):
        point = checked.points[name]
        seen = observed_range(point)
        if plan.is_weight or point.scale_source != "fixed" or seen is None:
            continue
        share = clipped_share(point)
        if share is not None and share > CLIPPED_SHARE:
            shares[name] = share
            largest = max(map(abs, seen))
            larger.append(f"match: {yaml_name(name)}, activation: {{fixed_scale: {largest / point.quant_max:.6g}}}")
    if shares:
        worst = max(shares, key=lambda name: shares[name])
        yield Finding(
            severity="warning",
            kind="clipping scale",
            names=tuple(shares),
            what=f"The fixed scale of {shortened(tuple(shares))} clips what calibration saw: {shares[worst]:.0%} of "
            f"the values at {worst}.",
            why="Clipping is meant for a few outliers. Clipping this much changes the input of the layers behind.",
            action="Leave the scale to calibration, or fix one that covers the range.",
            yaml=overrides_yaml(larger),
        )


def _coarse_precision(checked: CheckedRegion) -> Iterable[Finding]:
    precision = checked.options.precision
    significant = _SIGNIFICANT_BITS.get(precision.split("-")[0])
    if significant is None:
        return
    names = [n for n, d in checked.dtypes.points.items() if d != FLOAT and bits(d) > significant]
    if names:
        yield Finding(
            severity="warning",
            kind="precision below dtype",
            names=tuple(names),
            what=f"precision is {precision}, whose values have {significant} significant bits, and {shortened(names)} "
            "have more.",
            why="The rounding of the float type is coarser than that of the integer type, so training does not see the "
            "precision of the deployed model.",
            action="Train with precision: 32-true, or accept that these points behave like "
            f"{significant}-bit ones in training.",
        )


def _one_sided(checked: CheckedRegion) -> Iterable[Finding]:
    styles = hardware_styles(checked)
    gains = {}
    for name, plan in points_with_scale(checked):
        gain = affine_gain(checked.points[name]) if not plan.is_weight else None
        if gain is not None and gain >= WORTHWHILE_GAIN and "affine" in styles.get(name, ("affine",)):
            gains[name] = gain
    if gains:
        most, least = (20 * math.log10(end(gains.values())) for end in (max, min))
        decibels = f"{most:.2g} dB" if most - least < 0.1 else f"{least:.2g} to {most:.2g} dB"
        yield Finding(
            severity="info",
            kind="one-sided range",
            names=tuple(gains),
            what=f"{shortened(gains)}: all values, or nearly all of the range, have one sign, and the type is "
            "symmetric and signed.",
            why=f"Nearly half of the codes are never used: an affine scheme gains {decibels} (6 dB are one bit), "
            "predicted from the histogram.",
            action="Where the hardware has it, use scheme: affine, or uint8 where no value is negative.",
            yaml=overrides_yaml(f"match: {yaml_name(name)}, activation: {{scheme: affine}}" for name in gains),
        )
