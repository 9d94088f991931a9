"""Batch norms that a device has folded into the layer in front of them.

The factor ``f = gamma / sqrt(running_var + eps)`` of a channel becomes part of the weight's scale, and its sign part of
the codes. The bias becomes ``(bias - running_mean) * f + beta``, and the batch norm hands its input on. So no code
changes, except that those of a channel with a negative factor are mirrored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.fake_quant.fake_quantize_function import broadcast_to_axis
from lightning_qat.quantization.numerics.scales import MIN_SCALE
from lightning_qat.quantization.planning.folded_batch_norm import FoldedBatchNorm, norm_behind, norm_channels
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.tracing.op_graph import Op


@dataclass(frozen=True, eq=False)
class Folding:
    """A batch norm and the layer it is folded into.

    Args:
        layer: name of the layer's op.
        norm: name of the batch norm op.
        factor: ``(channels,)`` float32.
        bias: what the layer adds in place of its bias, ``(channels,)`` float32.
        changes_scale: whether the weight has a scale per channel, which takes the factor up. Otherwise the region has
            folded the factor into the weight before it was quantized.
    """

    layer: str
    norm: str
    factor: Tensor
    bias: Tensor
    changes_scale: bool

    def scaled(self, scale: Tensor) -> Tensor:
        """Return the scales of the folded weight. A channel with the factor 0 keeps its own, as its codes are zero."""
        return torch.where(self.factor == 0, scale, scale * self.factor.abs())

    def codes(self, codes: Tensor, zero_point: Tensor, fake_quant: FakeQuantize, axis: int) -> Tensor:
        """Return the codes of the folded weight; with zero points for codes, those of the folded weight.

        Args:
            codes: int32.
            zero_point: int32 ``(channels,)``.
            fake_quant: the quantizer of the weight.
            axis: the channel axis of the codes.
        """
        factor = broadcast_to_axis(codes, self.factor, axis)
        zero = broadcast_to_axis(codes, zero_point, axis)
        mirrored = fake_quant.quant_min + fake_quant.quant_max - codes
        return torch.where(factor == 0, zero, torch.where(factor < 0, mirrored, codes))


def folded_batch_norms(region: Region, in_float: Container[str]) -> tuple[dict[str, Folding], dict[str, str]]:
    """Find the batch norms that are folded in the deployed form of a region.

    Args:
        region: the region, with its present weights.
        in_float: points that are not quantized.

    Returns:
        The foldings by the name of the layer; and the fused batch norms that are kept, with the reason.
    """
    foldings: dict[str, Folding] = {}
    kept: dict[str, str] = {}
    for group in region.plan.fusions:
        ops = [region.graph.by_name[name] for name in group.ops]
        norm = next((op for op in ops[1:] if op.kind == "batch_norm"), None)
        if norm is None:
            continue
        layers = {s.name for operand in norm.operands if operand.role == "data" for s in operand.sources}
        found: list[Folding] = []
        for op in (op for op in ops if op.name in layers):
            folding, reason = _folding(region, op, norm, in_float)
            if folding is None:
                kept[norm.name] = reason
            else:
                found.append(folding)
        if len(found) == len(layers):  # the batch norm serves all of them
            foldings |= {folding.layer: folding for folding in found}
        else:
            kept.setdefault(norm.name, "it also reads other ops than the layers in front of it")
            _refuse_half_folded(region, layers, norm.name, kept[norm.name])
    return foldings, kept


@torch.no_grad()
def _folding(region: Region, op: Op, norm: Op, in_float: Container[str]) -> tuple[Folding | None, str]:
    point = next((p for p in region.plan.by_op.get(op.name, ()) if p.is_weight), None)
    if point is None or point.name in in_float:
        return None, f"the weight of {op.name} is not quantized"
    operand = op.operand(point.operand)
    group = next(g for g in region.plan.fusions if op.name in g.ops)
    behind, reason = norm_behind(region.graph, group, op, operand)
    if behind is not norm:
        return None, reason or f"{op.name} is not in front of it"
    fake_quant = region.points[point.name]
    channels = norm_channels(norm)
    if point.batch_norm is None and fake_quant.channel_scale.numel() != channels:
        return None, f"the weight of {op.name} has other scales than one per channel"
    planned = dataclasses.replace(point, batch_norm=norm.name)
    folded = FoldedBatchNorm.of(region.graph, planned, region.target)
    assert folded is not None
    module = region.target.get_submodule(folded.path)
    bias, known = _bias(region.target, op)
    if not known:
        return None, f"the bias of {op.name} is not a parameter"
    factor = folded.factor(torch.empty(operand.shape, device="meta")).flatten()
    shifted = (bias - module.running_mean.float()) * factor  # type: ignore[operator]
    shift = shifted if module.bias is None else shifted + module.bias.float()  # type: ignore[operator]
    folding = Folding(op.name, norm.name, factor, shift, changes_scale=point.batch_norm is None)
    reason = _obstacle(folding, fake_quant.channel_scale)
    return (None, reason) if reason else (folding, "")


def _refuse_half_folded(region: Region, layers: Container[str], norm: str, reason: str) -> None:
    """The region has folded it into the codes: without it they stand for another weight."""
    points = [p.name for p in region.plan.points if p.op in layers and p.batch_norm == norm]
    if points:
        raise ConfigurationError(
            f"{norm} is folded into {', '.join(points)} before quantization, and cannot be folded in the deployed "
            f"form, as {reason}. Give this weight one scale per channel (granularity: per_channel)."
        )


def _obstacle(folding: Folding, scale: Tensor) -> str:
    if not (folding.factor.isfinite().all() and folding.bias.isfinite().all()):
        return "its factors are not finite"
    if folding.changes_scale:
        scales = folding.scaled(scale)
        if not (scales.isfinite() & (scales >= MIN_SCALE)).all():
            return "the scales of the folded weight would not be normal numbers"
    return ""


def _bias(target: nn.Module, op: Op) -> tuple[Tensor | float, bool]:
    """The bias of a layer, and whether it is known before the forward."""
    operand = next((o for o in op.operands if o.name == "bias"), None)
    if operand is None:
        return 0.0, True
    parameters = dict(target.named_parameters(remove_duplicate=False))
    names = {source.name for source in operand.sources if source.kind == "parameter"}
    if len(names) != 1 or len(operand.sources) != 1 or not names <= parameters.keys():
        return 0.0, False
    return parameters[names.pop()].detach().float(), True
