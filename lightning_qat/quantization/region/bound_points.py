"""The points of a plan bound to a target: each op's fake-quants, with the facts that interception needs."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.planning.folded_batch_norm import FoldedBatchNorm
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.tracing.op_graph import Operand, OpGraph

ParameterView = tuple[nn.Parameter, torch.Size, tuple[int, ...], int]
"""A part of a parameter: the parameter, and size, strides and offset of the part."""


class BoundPoint:
    """A point of the plan with its fake-quant.

    Args:
        name: name of the point.
        fake_quant: the quantizer.
        is_weight: it quantizes a weight.
        written: the op writes into the operand, or the result of an in-place op is written once more. The tensor must
            then stay the same object, because the model may hold it under another name.
        rewritten: the operand is written later, so that backward must not rely on its values.
        batch_norm: the batch norm that is folded into the weight before it is quantized.
        repeats: several calls within one forward share it.
        parameter: name of the parameter that the weight is, None for a weight that is computed in every forward.

    Attributes:
        trained: the view of the parameter that the last training forward used; the optimizer may have changed it since.
    """

    __slots__ = (
        "batch_norm",
        "fake_quant",
        "is_weight",
        "name",
        "parameter",
        "repeats",
        "rewritten",
        "role",
        "trained",
        "written",
    )

    def __init__(
        self,
        name: str,
        fake_quant: FakeQuantize,
        is_weight: bool = False,
        written: bool = False,
        rewritten: bool = False,
        batch_norm: FoldedBatchNorm | None = None,
        repeats: bool = False,
        parameter: str | None = None,
    ) -> None:
        self.name = name
        self.fake_quant = fake_quant
        self.is_weight = is_weight
        self.role = "weight" if is_weight else "activation"
        self.written = written
        self.rewritten = rewritten
        self.batch_norm = batch_norm
        self.repeats = repeats and not is_weight
        self.parameter = parameter
        self.trained: ParameterView | None = None

    def quantized_by(self, fake_quant: FakeQuantize) -> BoundPoint:
        """Return the same point with another fake-quant."""
        point = copy.copy(self)
        point.fake_quant = fake_quant
        return point

    @torch.no_grad()
    def refresh(self, parameters: Container[int]) -> None:
        """Compute the scale of a weight again, as the next evaluation would, if an optimizer step made it outdated.

        Args:
            parameters: identities of the parameters that the target has now.
        """
        fake_quant, norm = self.fake_quant, self.batch_norm
        if self.trained is None or not fake_quant.outdated or fake_quant.frozen:
            return
        if id(self.trained[0]) not in parameters:  # another one was put into its place
            self.trained = None
            return
        weight = torch.as_strided(*self.trained)
        fake_quant.update_scale(weight if norm is None else norm.fold(weight, norm.factor(weight)), ema=False)
        fake_quant.outdated = False

    @torch.no_grad()
    def observe_again(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the statistics of a weight that a checkpoint left out from the present weight.

        Args:
            parameters: the parameters of the target by name.
        """
        if self.fake_quant.forgotten and self.parameter is not None and self.parameter in parameters:
            weight, norm = parameters[self.parameter].detach(), self.batch_norm
            self.fake_quant.observe(weight if norm is None else norm.fold(weight, norm.factor(weight)))


class OpQuantizers:
    """The fake-quants of one op, in the form interception needs; ``op`` is its name."""

    __slots__ = ("inputs", "op", "output")

    def __init__(self, op: str = "") -> None:
        self.op = op
        self.inputs: dict[int, BoundPoint] = {}
        self.output: BoundPoint | None = None


def refresh(points: Iterable[BoundPoint], target: nn.Module) -> None:
    """Compute the outdated scales of weights of a target again, see :meth:`BoundPoint.refresh`."""
    outdated = [point for point in points if point.trained is not None and point.fake_quant.outdated]
    parameters = set(map(id, target.parameters())) if outdated else set()
    for point in outdated:
        point.refresh(parameters)


UNPLANNED = OpQuantizers()
"""Stands for an op the plan does not know."""


def bind(
    graph: OpGraph, plan: QuantPlan, points: Mapping[str, FakeQuantize], target: nn.Module
) -> dict[str, OpQuantizers]:
    """Map the run-time identity of every op of the graph to its fake-quants."""
    bound = {op.key: OpQuantizers(op.name) for op in graph.ops}
    bound |= {twin: bound[op.key] for op in graph.ops for twin in op.twins}
    operands = (operand for op in graph.ops for operand in op.operands if operand.written)
    written = {s.name for operand in operands for s in operand.sources if s.kind == "op"}
    for point in plan.points:
        op, fake_quant = graph.by_name[point.op], points[point.name]
        if point.role == "output":
            written_again = op.inplace and op.name in written
            bound[op.key].output = BoundPoint(point.name, fake_quant, written=written_again, repeats=op.calls > 1)
        else:
            operand = op.operand(point.operand)
            norm = FoldedBatchNorm.of(graph, point, target)
            bound[op.key].inputs[point.operand] = BoundPoint(
                point.name,
                fake_quant,
                point.is_weight,
                operand.written and not point.is_weight,  # an embedding with max_norm, see RegionMode
                operand.rewritten,
                norm,
                op.calls > 1,
                _parameter_name(operand) if point.is_weight else None,
            )
    return bound


def _parameter_name(operand: Operand) -> str | None:
    names = {source.name if source.kind == "parameter" else None for source in operand.sources}
    return names.pop() if len(names) == 1 else None


def parameter_view(weight: Tensor) -> ParameterView | None:
    """Return which part of a parameter a weight is; None for a weight that is computed in every forward."""
    base = weight._base if weight._is_view() else weight
    if not isinstance(base, nn.Parameter):
        return None
    return base, weight.size(), weight.stride(), int(weight.storage_offset())
