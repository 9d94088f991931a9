"""What a region is on a device: weights as integer codes, fused batch norms folded into them, one set of scales.

It is computed from one forward of the region, before anything is exported. Computed inside the export, its arithmetic
would be part of the exported graph.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_qat.export.folding import Folding, folded_batch_norms
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.fake_quant.fake_quantize_function import broadcast_to_axis, codes_before_clipping
from lightning_qat.quantization.numerics.channel_groups import swap_within_groups
from lightning_qat.quantization.numerics.dtypes import ONNX_TYPES, quant_dtype
from lightning_qat.quantization.planning.folded_batch_norm import FoldedBatchNorm, divisor
from lightning_qat.quantization.region.region import Region

STORED = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "uint16": torch.uint16}
"""The types of codes that torch has."""
NARROW = ("int4", "uint4")
"""Types of opset 21 that torch lacks: 8 bits hold their codes until the graph is written."""
FULL_OPSET = 21
"""The first opset whose QuantizeLinear has 16- and 4-bit codes."""
MIN_OPSET = 19
"""The first opset that torch.onnx and QuantizeLinear have in common."""


@dataclass(frozen=True, eq=False)
class QuantizeUse:
    """One quantization of an activation or of a weight.

    Args:
        name: the point; of a point that runs several times in a forward, with ``#1``, ``#2``, ... from the second on.
        point: the point.
        dtype: type of the codes.
        scale: float32, ``()`` or ``(channels,)``.
        zero_point: of the same shape, of the type that holds the codes.
        axis: the axis of the channels, None with one scale.
        codes: of a weight: its codes, in the layout in which ``axis`` counts. None for an activation.
        groups: of the weight of a grouped transposed convolution: swap the first two axes within these groups to get
            its own layout, see :mod:`~lightning_qat.quantization.numerics.channel_groups`.
        factor: of a weight that is quantized with a batch norm folded into it, where the batch norm stays an op of its
            own: the weight is divided by it. It broadcasts against ``(groups, ...)``. None otherwise.
    """

    name: str
    point: str
    dtype: str
    scale: Tensor
    zero_point: Tensor
    axis: int | None = None
    codes: Tensor | None = None
    groups: int = 1
    factor: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Reference:
    """What the region made of a tensor: the data to compare an exported graph with.

    Args:
        value: the tensor in front of the point, float32. Empty for a weight.
        codes: its codes, int32; of a weight with the signs of a folded batch norm.
        scale: by which the codes count, as it broadcasts.
    """

    value: Tensor
    codes: Tensor
    scale: Tensor


@dataclass
class DeployedForm:
    """The deployed form of a region.

    Args:
        uses: every quantization of one forward, by the name of its use, in execution order.
        references: what the region made there; empty if nobody asked for them.
        foldings: the batch norms that are folded, by the name of the layer in front of them.
        kept_norms: fused batch norms that stay an op of their own, with the reason.
        not_calibrated: points without a scale, which stay float as they are in the region.
    """

    uses: dict[str, QuantizeUse] = field(default_factory=dict)
    references: dict[str, Reference] = field(default_factory=dict)
    foldings: dict[str, Folding] = field(default_factory=dict)
    kept_norms: dict[str, str] = field(default_factory=dict)
    not_calibrated: tuple[str, ...] = ()

    @property
    def folded_norms(self) -> frozenset[str]:
        """Names of the batch norm ops that hand their input on."""
        return frozenset(folding.norm for folding in self.foldings.values())


def use_name(point: str, number: int) -> str:
    """Return the name of the use of a point, whose number within the forward counts from 0."""
    return point if number == 0 else f"{point}#{number}"


def held_type(dtype: str) -> torch.dtype:
    """Return the type that holds codes of a quantized type in torch.

    Args:
        dtype: ``int2`` ... ``int16`` or ``uint2`` ... ``uint16``.
    """
    known = quant_dtype(dtype)
    return STORED[f"{'' if known.signed else 'u'}int{8 if known.bits <= 8 else 16}"]


def check_calibrated(regions: Mapping[str, Region]) -> None:
    """Refuse regions that have no deployed form.

    Args:
        regions: by the path of their target.

    Raises:
        ConfigurationError: a region is not calibrated, or computes in float64.
    """
    for path, region in regions.items():
        if not region.is_calibrated:
            raise ConfigurationError(
                f"the region {path or type(region.target).__name__} is not calibrated, so it has no codes to export: "
                "call calibrate(region, batches), or load a checkpoint of a QAT run with load_quantized(...)."
            )
        if any(p.dtype is torch.float64 for p in region.target.parameters()):
            raise ConfigurationError(
                f"the region {path or type(region.target).__name__} has float64 parameters, and the deployed form has "
                "no float64: call model.float() and calibrate again."
            )


def check_onnx_types(regions: Mapping[str, Region], opset: int) -> None:
    """Refuse what ONNX cannot express.

    Args:
        regions: by the path of their target.
        opset: of ONNX.

    Raises:
        ConfigurationError: points have a type that ONNX lacks, or torch.onnx cannot write the opset.
    """
    if opset < MIN_OPSET:
        raise ConfigurationError(f"opset {opset} cannot be written: write {FULL_OPSET}, or {MIN_OPSET} at least.")
    known = ONNX_TYPES if opset >= FULL_OPSET else ("int8", "uint8")
    lacking = [
        f"{f'{path}.' if path else ''}{name} ({fake_quant.dtype})"
        for path, region in regions.items()
        for name, fake_quant in region.points.items()
        if fake_quant.dtype not in known and fake_quant.scale_source is not None
    ]
    if lacking:
        raise ConfigurationError(
            f"ONNX opset {opset} has no quantized types for these points: {', '.join(lacking)}. It has "
            f"{', '.join(known)}: give these points one of them, or leave them in float32."
        )


@torch.no_grad()
def deployed_form(region: Region, forward: Any, fold: bool = True, references: bool = True) -> DeployedForm:
    """Compute the deployed form of a region from one forward.

    Args:
        region: calibrated, in eval mode and in the state ``quantize``.
        forward: runs the model once.
        fold: whether fused batch norms are folded. It changes no code, but the last bits of sums.
        references: whether the data to compare an exported graph with are kept, which takes a copy of every activation.

    Raises:
        ConfigurationError: the region does not run in this forward.
    """
    recorder = _Recorder(region, fold, references)
    with region.tap(recorder):
        forward()
    if not recorder.form.uses and any(f.scale_source is not None for f in region.points.values()):
        raise ConfigurationError(
            f"the quantized region {type(region.target).__name__} did not run on the example inputs: give inputs that "
            "reach it."
        )
    return recorder.form


class _Recorder:
    """A tap that makes the deployed form."""

    def __init__(self, region: Region, fold: bool, references: bool) -> None:
        self.region = region
        self.fold = fold
        self.references = references
        self.form = DeployedForm()
        silent = [n for n, f in region.points.items() if f.scale_source is None or not f.enabled]
        self.form.not_calibrated = tuple(silent)
        if fold:
            found = folded_batch_norms(region, frozenset(silent))
            self.form.foldings, self.form.kept_norms = found
        self._calls: Counter[str] = Counter()

    def __call__(self, point: str, value: Tensor, quantized: Tensor) -> None:
        fake_quant = self.region.points[point]
        if fake_quant.scale_source is None or not fake_quant.enabled:
            return
        name = use_name(point, self._calls[point])
        self._calls[point] += 1
        planned = self.region.plan.by_name[point]
        if not planned.is_weight:
            use = QuantizeUse(name, point, fake_quant.dtype, *_parameters(fake_quant), fake_quant.axis)
            if self.references:
                self.form.references[name] = _activation_reference(use, fake_quant, value, quantized)
        else:
            folding = self._folding(planned.op)
            use = _weight(name, point, fake_quant, value, folding)
            if self.references:
                self.form.references[name] = _weight_reference(use, fake_quant, value, quantized, folding)
            norm = None if self.fold else FoldedBatchNorm.of(self.region.graph, planned, self.region.target)
            if norm is not None:
                use = dataclasses.replace(use, factor=divisor(norm.factor(value)))
        self.form.uses[name] = use

    def _folding(self, op: str) -> Folding | None:
        folding = self.form.foldings.get(op)
        return folding if folding is not None and folding.changes_scale else None


def _activation_reference(use: QuantizeUse, fake_quant: FakeQuantize, value: Tensor, quantized: Tensor) -> Reference:
    scale = broadcast_to_axis(value, use.scale, use.axis)
    if value.dtype is torch.float32:
        codes = _codes_of(quantized, scale, broadcast_to_axis(value, use.zero_point.int(), use.axis))
    else:  # 16-bit floats do not tell 16-bit codes apart
        codes = _codes(fake_quant, value, use.scale, use.zero_point)
    return Reference(value.detach().float().clone(), codes, scale)


def _weight(name: str, point: str, fake_quant: FakeQuantize, value: Tensor, folding: Folding | None) -> QuantizeUse:
    axis, groups = fake_quant.axis, fake_quant.groups
    if groups > 1:
        value = swap_within_groups(value, groups)
    scale, zero_point = _parameters(fake_quant)
    codes = _codes(fake_quant, value, scale, zero_point)
    if folding is not None and axis is not None:
        zero_point = zero_point.int()
        codes = folding.codes(codes, zero_point, fake_quant, axis)
        zero_point = folding.codes(zero_point, zero_point, fake_quant, 0)
        scale = folding.scaled(scale)
    held = held_type(fake_quant.dtype)
    return QuantizeUse(
        name, point, fake_quant.dtype, scale, zero_point.to(held), axis, codes.to(held).contiguous(), groups
    )


def _weight_reference(
    use: QuantizeUse, fake_quant: FakeQuantize, value: Tensor, quantized: Tensor, folding: Folding | None
) -> Reference:
    assert use.codes is not None
    codes, along = use.codes.int(), broadcast_to_axis(use.codes, use.scale, use.axis)
    if value.dtype is torch.float32:
        if use.groups > 1:
            quantized = swap_within_groups(quantized, use.groups)
        scale, zero_point = _parameters(fake_quant)  # with which the region quantized it: nothing is folded
        zero_point = zero_point.int()
        zero = broadcast_to_axis(quantized, zero_point, use.axis)
        codes = _codes_of(quantized, broadcast_to_axis(quantized, scale, use.axis), zero)
        if folding is not None and use.axis is not None:
            codes = folding.codes(codes, zero_point, fake_quant, use.axis)
    return Reference(value.new_empty(0), codes, along)


def _codes(fake_quant: FakeQuantize, value: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    along = broadcast_to_axis(value, scale, fake_quant.axis)
    zero = broadcast_to_axis(value, zero_point.int(), fake_quant.axis)
    codes = codes_before_clipping(value.detach(), along, zero)
    return codes.clamp(fake_quant.quant_min, fake_quant.quant_max).int()


def _parameters(fake_quant: FakeQuantize) -> tuple[Tensor, Tensor]:
    scale = fake_quant.channel_scale.detach().clone()
    return scale, fake_quant.channel_zero_point.detach().to(held_type(fake_quant.dtype))


def _codes_of(quantized: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The codes that fake-quantized values stand for: whole multiples of the scale, less one rounding."""
    return (quantized.detach().double() / scale.double()).round().int() + zero_point
