"""What happens at every op while a region runs: its operands and its result go through their fake-quants."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.interception.call_path import ScopeNode
from lightning_qat.quantization.interception.interception import CallPathMode
from lightning_qat.quantization.modules.tensor_leaves import is_float, leaves, map_call_leaves
from lightning_qat.quantization.planning.folded_batch_norm import FoldedBatchNorm
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.tracing.op_graph import OpGraph

if TYPE_CHECKING:
    from lightning_qat.quantization.region.region import Region

Operation = Callable[..., Any]
_ParameterView = tuple[nn.Parameter, torch.Size, tuple[int, ...], int]


class BoundPoint:
    """A point of the plan with its fake-quant.

    Args:
        name: name of the point.
        fake_quant: the quantizer.
        is_weight: it quantizes a weight.
        written: the op writes into the operand, or the result of an in-place op is written once more: it must stay
            the same tensor, which others may know under another name.
        rewritten: the operand is written later, so that backward must not rely on its values.
        batch_norm: the batch norm that is folded into the weight before it is quantized.
        repeats: several calls within one forward share it.

    Attributes:
        trained: where the weight of the last training forward is, which the optimizer may have changed since.
    """

    __slots__ = ("batch_norm", "fake_quant", "is_weight", "name", "repeats", "rewritten", "role", "trained", "written")

    def __init__(
        self,
        name: str,
        fake_quant: FakeQuantize,
        is_weight: bool = False,
        written: bool = False,
        rewritten: bool = False,
        batch_norm: FoldedBatchNorm | None = None,
        repeats: bool = False,
    ) -> None:
        self.name = name
        self.fake_quant = fake_quant
        self.is_weight = is_weight
        self.role = "weight" if is_weight else "activation"
        self.written = written
        self.rewritten = rewritten
        self.batch_norm = batch_norm
        self.repeats = repeats and not is_weight
        self.trained: _ParameterView | None = None

    @torch.no_grad()
    def refresh(self, parameters: Container[int]) -> None:
        """Take the scale of a weight as the next evaluation would, if only the optimizer made it outdated.

        Args:
            parameters: identities of the parameters that the target has now.
        """
        fake_quant, norm = self.fake_quant, self.batch_norm
        if self.trained is None or not fake_quant.outdated or fake_quant.frozen:
            return
        if id(self.trained[0]) not in parameters:  # another one was put into its place
            return
        weight = torch.as_strided(*self.trained)
        fake_quant.update_scale(weight if norm is None else norm.fold(weight, norm.factor(weight)), ema=False)
        fake_quant.outdated = False


class OpQuantizers:
    """The fake-quants of one op, in the form interception needs; ``op`` is its name."""

    __slots__ = ("inputs", "op", "output")

    def __init__(self, op: str = "") -> None:
        self.op = op
        self.inputs: dict[int, BoundPoint] = {}
        self.output: BoundPoint | None = None


UNPLANNED = OpQuantizers()
"""Stands for an op the plan does not know."""


def bind(
    graph: OpGraph, plan: QuantPlan, points: Mapping[str, FakeQuantize], target: nn.Module
) -> dict[str, OpQuantizers]:
    """Return the fake-quants of every op of the graph by its run-time identity."""
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
            operand = next(o for o in op.operands if o.index == point.operand)
            norm = FoldedBatchNorm.of(graph, point, target)
            bound[op.key].inputs[point.operand] = BoundPoint(
                point.name,
                fake_quant,
                point.is_weight,
                operand.written and not point.is_weight,  # an embedding with max_norm: see _renormalized
                operand.rewritten,
                norm,
                op.calls > 1,
            )
    return bound


class RegionMode(CallPathMode):
    """Applies the fake-quants of a region while its target's forward runs.

    The region's state is that of the entry: a backward pass that repeats the forward repeats the same function.
    """

    def __init__(
        self, region: Region, frame: FrameType, node: ScopeNode | None = None, repeats: RegionMode | None = None
    ) -> None:
        super().__init__(region.call_paths, frame, node, recomputing=repeats is not None)
        self.region = region
        self.state: str = region.current_state if repeats is None else repeats.state
        self._functions = region.functions
        self._updates: frozenset[str] = region.updates if repeats is None else frozenset()
        self._taps = region.taps if repeats is None else ()
        self._calls_of_points: dict[str, int] = {}
        # by point: the running variance moves between a forward and its repetition
        self._factors: dict[str, Tensor] = {} if repeats is None else repeats._factors

    def resumed(self, frame: FrameType, node: ScopeNode) -> CallPathMode | None:
        return RegionMode(self.region, frame, node, repeats=self)

    def __torch_function__(
        self, func: Operation, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        spec = self._functions.get(func)
        if spec is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if spec.role == "composite":
            return self.run_composite(func, args, kwargs)
        frame = sys._getframe(1)
        quantizers: OpQuantizers | None = self.calls.op(frame, spec.kind)
        if quantizers is None:  # inside a custom autograd.Function: one opaque op
            return func(*args, **kwargs)
        if quantizers is UNPLANNED:
            result = func(*args, **kwargs)
            if any(map(is_float, leaves(result))):  # counting and comparing is never quantized
                self.region.note_unplanned(spec.kind, frame)
            return result
        return self.run_op(quantizers, spec.kind, func, args, kwargs)

    def run_op(
        self, quantizers: OpQuantizers, kind: str, func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an op of the plan.

        Args:
            quantizers: its fake-quants.
            kind: the canonical name of the torch function.
            func: the torch function.
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        if quantizers.inputs:
            args, kwargs = self._quantize_operands(quantizers.inputs, args, kwargs)
        result = func(*args, **kwargs)
        if quantizers.output is None:
            return result
        if isinstance(result, Tensor):
            return self._quantize(quantizers.output, result)
        if type(result) is tuple and isinstance(result[0], Tensor):  # lstm: the point is that of the first result
            return (self._quantize(quantizers.output, result[0]), *result[1:])
        return result

    def _quantize_operands(
        self, inputs: dict[int, BoundPoint], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("max_norm") is not None:
            kwargs = _renormalized(*args[:2], **kwargs)
        return map_call_leaves(
            args, kwargs, lambda index, tensor: self._quantize(inputs[index], tensor) if index in inputs else tensor
        )

    def _quantize(self, point: BoundPoint, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if point.batch_norm is not None:
            return self._quantize_folded(point, point.batch_norm, tensor)
        if self.state == "observe" or not (point.written or point.rewritten):
            return self._apply(point, tensor)
        quantized = self._apply(point, tensor.clone())
        return tensor.copy_(quantized) if point.written else quantized

    def _quantize_folded(self, point: BoundPoint, batch_norm: FoldedBatchNorm, weight: Tensor) -> Tensor:
        factor = self._factors.get(point.name)
        if factor is None:
            self._factors[point.name] = factor = batch_norm.factor(weight)
        folded = batch_norm.fold(weight, factor)
        quantized = self._apply(point, folded)
        if point.fake_quant.outdated:
            point.trained = _parameter_view(weight)
        return weight if quantized is folded else batch_norm.unfold(quantized, factor, weight)

    def _apply(self, point: BoundPoint, tensor: Tensor) -> Tensor:
        fake_quant = point.fake_quant
        if self.state == "observe":
            # a weight does not change while observing: once is enough
            once = point.is_weight and fake_quant.statistics.batches
            if not (self.recomputing or once or fake_quant.keeps_scale):
                fake_quant.observe(tensor)
            if point.repeats and not self.recomputing:
                number = self._calls_of_points.get(point.name, 0)
                self._calls_of_points[point.name] = number + 1
                self.region.call_ranges.observe(point.name, number, tensor)
            return tensor
        if self._updates and not fake_quant.frozen and point.role in self._updates:
            if fake_quant.training:
                fake_quant.update_scale(tensor, ema=not point.is_weight)
                if point.is_weight:  # the optimizer may step before the next forward
                    fake_quant.outdated, point.trained = True, _parameter_view(tensor)
            elif fake_quant.outdated:
                fake_quant.update_scale(tensor, ema=False)
                fake_quant.outdated = False
        quantized = fake_quant.forward(tensor)
        for tap in self._taps:
            tap(point.name, tensor, quantized)
        return quantized


def _parameter_view(weight: Tensor) -> _ParameterView | None:
    """Where in a parameter a weight is; None for one that is computed anew in every forward."""
    base = weight._base if weight._is_view() else weight
    if not isinstance(base, nn.Parameter):
        return None
    return base, weight.size(), weight.stride(), int(weight.storage_offset())


@torch.no_grad()
def _renormalized(
    indices: Tensor, weight: Tensor, *, max_norm: float, norm_type: float, **others: Any
) -> dict[str, Any]:
    """Rescale the rows that an embedding reads in the weight itself, which the embedding would do to quantized values.

    Returns:
        The keyword arguments of the embedding, which has nothing to rescale any more.
    """
    torch.embedding_renorm_(weight.detach(), indices.contiguous(), max_norm, norm_type)
    return {**others, "max_norm": None, "norm_type": norm_type}
