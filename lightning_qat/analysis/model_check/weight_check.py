"""Weights whose channels do not fit their scales, and weights that several ops quantize differently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from lightning_qat.analysis.model_check.checked_region import CheckedRegion
from lightning_qat.analysis.model_check.configuration_check import hardware_styles
from lightning_qat.analysis.model_check.finding import Finding, overrides_yaml, shortened
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.quantization.overrides import yaml_name
from lightning_qat.quantization.planning.folded_batch_norm import FoldedBatchNorm
from lightning_qat.quantization.planning.plan import PointPlan
from lightning_qat.quantization.planning.weight_channels import SHARED, WeightChannels, weight_channels
from lightning_qat.quantization.region.effective_dtypes import bits


def check_weights(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """Look at the channels of every weight, and at parameters that several ops read."""
    return [*_channels(checked), *_tied_weights(checked), *_shared_scales(checked)], []


def _channels(checked: CheckedRegion) -> Iterable[Finding]:
    """Channels of weights that are all zero, or much smaller than others."""
    dead: dict[str, int] = {}
    apart: dict[str, float] = {}
    lost: dict[str, int] = {}
    parameters = dict(checked.region.target.named_parameters())
    for point in checked.plan.points:
        if not point.is_weight or point.same_as is not None:
            continue
        op = checked.graph.by_name[point.op]
        operand = op.operand(point.operand)
        weight = next((parameters[s.name] for s in operand.sources if s.name in parameters), None)
        held = WeightChannels(point.axis, point.groups) if point.axis is not None else weight_channels(op, operand)
        if weight is None or held.axis is None or weight.dim() != len(operand.shape) or not weight.numel():
            continue
        largest = held.rows(weight.detach().abs()).amax(dim=1)
        if not bool(largest.all()) and not checked.points[point.name].starts_at_zero:
            dead[point.name] = int((largest == 0).sum())
        if (folded := FoldedBatchNorm.of(checked.graph, point, checked.region.target)) is not None:
            whole = folded.fold(weight, folded.factor(weight)).detach().abs()
            largest = held.rows(whole).amax(dim=1) * _counts(folded, len(largest))
        alive = largest[largest > 0]
        if not len(alive):
            continue
        levels = 2.0 ** (bits(point.dtype) - 1)
        spread = float(alive.max() / alive.min())
        if spread > levels and point.axis is not None:
            apart[point.name] = spread
        elif spread > levels:
            lost[point.name] = int((alive < alive.max() / levels).sum())
    yield from _dead(dead)
    yield from _apart(apart)
    yield from _lost(lost, hardware_styles(checked))


def _counts(folded: FoldedBatchNorm, channels: int) -> Tensor | float:
    """1 for the channels that count; a batch norm that makes a channel small on purpose has small factors for it."""
    gamma: Tensor | None = folded.target.get_submodule(folded.path).weight  # type: ignore[assignment]
    if gamma is None or gamma.numel() != channels:
        return 1.0
    size = gamma.detach().abs()
    return (size * _SMALL_FACTOR >= size.max()).to(size.dtype)


def _dead(dead: dict[str, int]) -> Iterable[Finding]:
    if dead:
        yield Finding(
            severity="info",
            kind="dead channels",
            names=tuple(dead),
            what=f"Channels whose weights are all zero: {shortened(f'{n} ({k})' for n, k in dead.items())}.",
            why="They cost time on the device and give a constant; their scale is a stand-in.",
            action="Remove them from the model, or leave them if they were pruned on purpose.",
        )


def _apart(apart: dict[str, float]) -> Iterable[Finding]:
    if apart:
        formatted = shortened(f"{name} ({spread:.3g})" for name, spread in apart.items())
        yield Finding(
            severity="info",
            kind="channel spread",
            names=tuple(apart),
            what=f"The channels of a weight differ by more than its type has levels (largest / smallest): {formatted}.",
            why="Each channel has its own scale, but the results share one, and the smallest lie below its step.",
            action="Look at the op's output with SensitivityAnalysis(); cross-layer equalization (Nagel et al., 2019, "
            "arXiv:1906.04721) evens the channels out.",
        )


def _lost(lost: dict[str, int], styles: Mapping[str, tuple[str, ...]]) -> Iterable[Finding]:
    if lost:
        able = [name for name in lost if "per_channel" in styles.get(name, ("per_channel",))]
        rules = (f"match: {yaml_name(name)}, weight: {{granularity: per_channel}}" for name in able)
        yield Finding(
            severity="warning",
            kind="lost channels",
            names=tuple(lost),
            what="Channels of weights with one scale that lie below its step: "
            f"{shortened(f'{n} ({k})' for n, k in lost.items())}.",
            why="These channels have no or one code left, so what they compute is lost.",
            action="Give each channel its own scale." if able else _ONE_SCALE,
            yaml=overrides_yaml(rules) if able else "",
        )


_SMALL_FACTOR = 16.0
_ONE_SCALE = (
    "The hardware has one scale per weight here: even the channels out by cross-layer equalization (Nagel et al., "
    "2019, arXiv:1906.04721)."
)


def _tied_weights(checked: CheckedRegion) -> Iterable[Finding]:
    readers: dict[str, list[PointPlan]] = {}
    for point in checked.plan.points:
        if point.is_weight:
            operand = checked.graph.by_name[point.op].operand(point.operand)
            for source in operand.sources:
                if source.kind == "parameter":
                    readers.setdefault(source.name, []).append(point)
    for parameter, points in readers.items():
        dtypes = dict.fromkeys(p.dtype for p in points)
        styles = dict.fromkeys((p.dtype, p.axis, p.observer, p.split_sizes) for p in points)
        if len(styles) < 2:
            continue
        names = tuple(p.name for p in points)
        differs = len(dtypes) > 1
        widest = max(dtypes, key=bits)
        formatted = ", ".join(
            f"{p.name} ({p.dtype}, {'per tensor' if p.axis is None else 'per channel'})" for p in points
        )
        yield Finding(
            severity="warning" if differs else "info",
            kind="tied weight",
            names=names,
            what=f"The parameter {parameter} is quantized in {len(styles)} different ways: {formatted}.",
            why="It is one tensor in training and several when deployed, each rounded in its own way.",
            action="Give them one type, such as the widest."
            if differs
            else "Nothing, unless the device is to store it once.",
            yaml=overrides_yaml(f"match: {yaml_name(n)}, weight: {{dtype: {widest}}}" for n in names)
            if differs
            else "",
        )


def _shared_scales(checked: CheckedRegion) -> Iterable[Finding]:
    reasons = {p.name: p.reason.partition(f"{SHARED}: ")[2].partition(";")[0] for p in checked.plan.points}
    found = {name: reason for name, reason in reasons.items() if reason}
    if found:
        yield Finding(
            severity="info",
            kind="shared scales",
            names=tuple(found),
            what=f"Weights with {SHARED}: {shortened(f'{name} ({reason})' for name, reason in found.items())}.",
            why="The configuration asks for a scale per channel, and a scale can follow one axis only.",
            action="Look at them with SensitivityAnalysis(); a linear layer for each matrix has one per channel.",
        )
