"""Weights that share one scale over channels which a batch norm multiplies by different factors.

Deployed, the factor ``gamma / sqrt(running_var + eps)`` of a fused batch norm is folded into the weight before the
weight is quantized (Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018, section
3.2.2). With a scale per output channel, folding changes no code. With one scale for several channels it does: then the
folded weight is quantized, and divided by the factor again for the batch norm that follows. Training, too, computes the
factor from the running statistics, because these are deployed. For gradients the factor is a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.quantization.errors import PlanMismatchError
from lightning_qat.quantization.planning.fusion import FusionGroup
from lightning_qat.quantization.planning.plan import PointPlan
from lightning_qat.quantization.tracing.op_graph import Op, Operand, OpGraph

_STATISTICS = ["running_mean", "running_var"]


def batch_norm_to_fold(
    graph: OpGraph, group: FusionGroup | None, op: Op, operand: Operand, scales: int | None
) -> tuple[str | None, str]:
    """Decide whether the batch norm behind a GEMM layer has to be folded into its weight.

    Args:
        graph: the traced ops.
        group: the fused group of the layer, if it is in one.
        op: the layer.
        operand: its weight.
        scales: how many channels have a scale of their own; None for one scale, or one for several of them.

    Returns:
        The name of the batch norm op to fold, or None; and the reason why a batch norm is not folded, or an empty text.
    """
    norm, reason = norm_behind(graph, group, op, operand)
    if norm is None or scales == norm_channels(norm):
        return None, reason  # one scale per factor: folding would change no code
    return norm.name, ""


def norm_behind(graph: OpGraph, group: FusionGroup | None, op: Op, operand: Operand) -> tuple[Op | None, str]:
    """Find the batch norm that a device folds into a GEMM layer, whether or not this changes the layer's codes.

    Args:
        graph: the traced ops.
        group: the fused group of the layer, if it is in one.
        op: the layer.
        operand: its weight.

    Returns:
        The batch norm op, or None; and the reason why one is not folded, or an empty text.
    """
    ops = [graph.by_name[name] for name in group.ops] if group is not None else []
    norm = next((o for o in ops if o.kind == "batch_norm"), None)
    if norm is None or norm is op or op.weight_axis is None:
        return None, ""
    not_folded = f"so {norm.name} is not folded into the weight"
    if not any(source.name == op.name for o in norm.operands for source in o.sources):
        return None, ""
    if statistics_path(norm) is None:
        return None, f"the batch norm has no running statistics of a module, {not_folded}"
    channels = norm_channels(norm)
    is_channel_axis = op.kind != "linear" or len(op.outputs[0][1]) == 2
    if not is_channel_axis or operand.shape[op.weight_axis] * _groups(op, operand, channels) != channels:
        return None, f"the batch norm has other channels than the layer, {not_folded}"
    return norm, ""


def norm_channels(norm: Op) -> int:
    """Return how many channels a batch norm op has."""
    return next(o.shape[0] for o in norm.operands if o.role == "parameter")


class FoldedBatchNorm:
    """Folds a batch norm into the weight in front of it, and takes it out again.

    Args:
        target: the module whose forward is the region.
        path: path of the batch norm module below it.
        axis: axis of the output channels in the weight.
    """

    def __init__(self, target: nn.Module, path: str, axis: int) -> None:
        self.target = target
        self.path = path
        self.axis = axis

    @classmethod
    def of(cls, graph: OpGraph, point: PointPlan, target: nn.Module) -> FoldedBatchNorm | None:
        """Return the batch norm that the plan folds into the weight of a point; None if there is none.

        Raises:
            PlanMismatchError: the graph does not have what folding needs.
        """
        if point.batch_norm is None:
            return None
        path, axis = statistics_path(graph.by_name[point.batch_norm]), graph.by_name[point.op].weight_axis
        if path is None or axis is None:
            raise PlanMismatchError(
                f"{point.name}: {point.batch_norm} cannot be folded into the weight, because the graph does not know "
                "its running statistics. Insert fake-quant anew and calibrate."
            )
        return cls(target, path, axis)

    @torch.no_grad()
    def factor(self, weight: Tensor) -> Tensor:
        """Return ``gamma / sqrt(running_var + eps)`` in float32, in a shape that multiplies the weight's groups.

        Args:
            weight: the weight, for its shape.

        Returns:
            The factor in the shape that :meth:`fold` needs: ``(groups, channels, 1, ...)``, with the channels of a
            group at the weight's channel axis (``(groups, 1, channels, 1, ...)`` for a transposed convolution).
        """
        norm: Any = self.target.get_submodule(self.path)  # looked up late: a copied target is not complete at first
        factor = torch.rsqrt(norm.running_var.float() + norm.eps)
        if norm.weight is not None:
            factor = factor * norm.weight.float()
        groups = factor.numel() // weight.shape[self.axis]
        shape = [1] * weight.dim()
        shape[self.axis] = weight.shape[self.axis]
        return factor.reshape(groups, *shape)

    def fold(self, weight: Tensor, factor: Tensor) -> Tensor:
        """Multiply the weight by the factor. A channel whose factor is not finite becomes zero."""
        usable = torch.where(factor.isfinite(), factor, 0.0)
        return (grouped(weight, factor) * usable).reshape(weight.shape)

    def unfold(self, folded: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
        """Divide by the factor again. A channel whose factor is 0 or not finite adds nothing, and keeps its weight."""
        divided = grouped(folded, factor) / divisor(factor)
        return torch.where(_is_usable(factor), divided, grouped(weight, factor)).reshape(weight.shape).to(weight.dtype)


def grouped(weight: Tensor, factor: Tensor) -> Tensor:
    """Return the weight in the shape that the factor of :meth:`FoldedBatchNorm.factor` broadcasts against.

    Transposed convolutions hold the input channels of all groups in axis 0, the outputs of one in axis 1.
    """
    groups = factor.shape[0]
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])


def divisor(factor: Tensor) -> Tensor:
    """Return what a folded weight is divided by: the factor, but 1 where it is 0 or not finite."""
    return torch.where(_is_usable(factor), factor, 1.0)


def _is_usable(factor: Tensor) -> Tensor:
    return factor.isfinite() & (factor != 0)


def statistics_path(norm: Op) -> str | None:
    """Return the path of the module whose running statistics a batch norm op uses; None if it is not always one."""
    buffers = [
        source.name.rpartition(".")
        for operand in norm.operands
        for source in operand.sources
        if operand.role == "parameter" and source.kind == "buffer"
    ]
    paths = {path for path, _, _ in buffers}
    names = sorted(name for _, _, name in buffers)
    return paths.pop() if len(paths) == 1 and names == _STATISTICS else None


def _groups(op: Op, operand: Operand, channels: int) -> int:
    """Groups of a transposed convolution, whose weight holds the output channels of one group."""
    return channels // operand.shape[1] if op.weight_axis == 1 and channels % operand.shape[1] == 0 else 1
