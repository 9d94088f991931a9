"""Where a weight holds the output channels of its op: what one scale per channel is about."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from lightning_qat.quantization.numerics.channel_groups import channel_rows
from lightning_qat.quantization.tracing.op_graph import Op, Operand

SHARED = "fewer scales than output channels"
"""Begins the reason of a weight whose scales are coarser than one per output channel, although that was asked for."""

_SPATIAL_AXES = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
_LAST_TWO = frozenset(["matmul", "rmatmul", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv"])


@dataclass(frozen=True)
class WeightChannels:
    """The output channels of a weight.

    Args:
        axis: the axis that holds them; None if there is none, or not a single one.
        groups: of a transposed convolution: axis 1 holds the channels of one group, and channel ``g * columns + j`` is
            column ``j`` of the rows of group ``g`` in axis 0.
        shared: why a scale along the axis serves several output channels, if it does.
    """

    axis: int | None = None
    groups: int = 1
    shared: str = ""

    def count(self, shape: tuple[int, ...]) -> int | None:
        """Return the number of channels that a weight of this shape has a scale for; None for one scale."""
        return None if self.axis is None else shape[self.axis] * self.groups

    def rows(self, weight: Tensor) -> Tensor:
        """View a weight as one row of values per output channel, ``(channels, n)``; one row without an axis."""
        return channel_rows(weight, self.axis if self.groups == 1 else 0, self.groups)


def weight_channels(op: Op, operand: Operand) -> WeightChannels:
    """Find the output channels in a weight.

    Args:
        op: the op that reads it.
        operand: the weight.
    """
    dimensions = len(operand.shape)
    if op.weight_axis is not None:
        transposed = op.kind in _SPATIAL_AXES or (op.kind == "convolution" and op.weight_axis == 1)
        return _transposed(op, operand) if transposed else WeightChannels(op.weight_axis)
    if dimensions < 2 or not op.gemm:
        return WeightChannels()  # a table of values; or one number per output, whose scale would be the number
    if op.kind in _LAST_TWO:
        matrices = [o for o in op.operands if o.role != "parameter"][1 if op.kind in _WITH_ADDEND else 0 :]
        # columns of a right operand and rows of a left one are the output channels
        is_left = (operand is matrices[0]) != (op.kind == "rmatmul")
        shared = "all matrices of the batch share them" if any(n > 1 for n in operand.shape[:-2]) else ""
        return WeightChannels(dimensions - (2 if is_left else 1), shared=shared)
    if op.kind == "chain_matmul":
        return WeightChannels(0 if operand is op.operands[0] else 1)
    return _by_free_axes(op, operand)


_WITH_ADDEND = frozenset(["addmm", "baddbmm", "addbmm", "addmv"])


def _transposed(op: Op, operand: Operand) -> WeightChannels:
    """The weight is ``(in, out / groups, *kernel)``."""
    rows, columns, *kernel = operand.shape
    groups = op.outputs[0][1][-len(kernel) - 1] // columns
    if groups == rows and columns == 1:
        return WeightChannels(0)  # depthwise: a row is a channel
    return WeightChannels(1, groups)


def _by_free_axes(op: Op, operand: Operand) -> WeightChannels:
    """Products with any number of axes: those of the weight that are in the result, and in no other operand."""
    free, batch = _free_axes(op, operand)
    if len(free) != 1:
        return WeightChannels(shared=f"{len(free) or 'no'} axes of it hold output channels")
    return WeightChannels(free[0], shared="all matrices of the batch share them" if batch else "")


def _free_axes(op: Op, operand: Operand) -> tuple[list[int], bool]:
    """The axes of a weight that hold output channels, and whether another one numbers several products."""
    if op.kind == "einsum":
        return _einsum_axes(str(op.options.get("equation", "")).replace(" ", ""), operand)
    if op.kind == "inner":
        return list(range(len(operand.shape) - 1)), False
    result, others = op.outputs[0][1], [o for o in op.operands if o is not operand]
    contracted = (sum(len(o.shape) for o in op.operands) - len(result)) // 2  # tensordot
    free = len(operand.shape) - contracted
    ends = result[:free] if others and others[0].index > operand.index else result[len(result) - free :]
    candidates = [axis for axis, length in enumerate(operand.shape) if length in ends]
    return candidates, False


def _einsum_axes(equation: str, operand: Operand) -> tuple[list[int], bool]:
    read, arrow, result = equation.partition("->")
    terms = read.split(",")
    if operand.index >= len(terms) or "." in terms[operand.index]:
        return [], False
    if not arrow:
        result = "".join(label for label, times in Counter(read.replace(",", "")).items() if times == 1)
    own = terms[operand.index]
    others = {label for index, term in enumerate(terms) if index != operand.index for label in term}
    lengths = dict(zip(own, operand.shape, strict=False))
    kept = [axis for axis, label in enumerate(own) if label in result]
    batch = any(own[axis] in others and lengths[own[axis]] > 1 for axis in kept)
    return [axis for axis in kept if own[axis] not in others], batch
