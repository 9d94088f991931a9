"""The mode that handles every op while a region runs: its operands and its result go through their fake-quants."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FrameType, MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_qat.quantization.fake_quant.call_ranges import CallRanges
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.fake_quant.first_scale import follow, takes_first_scale
from lightning_qat.quantization.interception.interception import InterceptionMode, SpecCache
from lightning_qat.quantization.interception.op_identity import OpIdentity
from lightning_qat.quantization.interception.op_sequence import SequenceRecorder
from lightning_qat.quantization.modules.tensor_leaves import call_leaves, is_float, leaves, map_call_leaves
from lightning_qat.quantization.planning.folded_batch_norm import FoldedBatchNorm
from lightning_qat.quantization.region.bound_points import UNPLANNED, BoundPoint, OpQuantizers, parameter_view
from lightning_qat.quantization.region.followed_weights import State, is_current
from lightning_qat.quantization.region.switches import Switches

Operation = Callable[..., Any]


class Runner(Protocol):
    """The parts of a region that its mode needs."""

    @property
    def target(self) -> nn.Module:
        """The module whose forward runs."""

    @property
    def functions(self) -> SpecCache:
        """The table rows of the torch functions met so far."""

    @property
    def switches(self) -> Switches:
        """The state of the region, which scales follow the data, and the taps."""

    @property
    def call_ranges(self) -> CallRanges:
        """Where the ranges of repeated calls are noted."""

    @property
    def weights_are_fresh(self) -> bool:
        """Whether the scales of weights are up to date already."""

    def note_unplanned(self, kind: str, frame: FrameType, of_weights: bool) -> None:
        """Note an op that the plan does not know; ``of_weights`` if it computes from parameters alone."""


class RegionMode(InterceptionMode):
    """Applies the fake-quants of a region while its target's forward runs.

    It keeps the state that the region had at the entry, so activation checkpointing repeats the same function.
    """

    def __init__(
        self,
        runner: Runner,
        identity: OpIdentity,
        repeats: RegionMode | None = None,
        recorder: SequenceRecorder | None = None,
        followed: Mapping[FakeQuantize, State] = MappingProxyType({}),
    ) -> None:
        super().__init__(identity, recomputing=repeats is not None)
        self.runner = runner
        self.recorder = recorder
        self.state: str = runner.switches.state if repeats is None else repeats.state
        self._functions = runner.functions
        self._followed = followed
        self._updates: frozenset[str] = runner.switches.updates if repeats is None else frozenset()
        self._first_scales = runner.switches.first_scales and repeats is None
        self._taps = runner.switches.taps if repeats is None else ()
        self._calls_of_points: dict[str, int] = {}
        self._buffers: dict[int, Tensor] | None = None  # those of the target, once an unplanned op asks
        self._of_weights: dict[int, Tensor] = {}  # what unplanned ops computed from parameters and buffers alone
        # by point: the running variance moves between a forward and its repetition
        self._factors: dict[str, Tensor] = {} if repeats is None else repeats._factors

    def resumed(self, frame: FrameType, scope: Any) -> InterceptionMode | None:
        return RegionMode(self.runner, self.identity.resumed(frame, scope), repeats=self)

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
        quantizers: OpQuantizers | None = self.identity.op(frame, spec.kind)
        if quantizers is None:  # inside a custom autograd.Function: one opaque op
            return func(*args, **kwargs)
        if quantizers is not UNPLANNED:
            result = self.run_op(quantizers, spec.kind, func, args, kwargs)
        else:
            result = func(*args, **kwargs)
            computed = [tensor for tensor in leaves(result) if is_float(tensor)]
            if computed:  # counting and comparing is never quantized
                of_weights = self._are_weights(call_leaves(args, kwargs))
                if of_weights:
                    self._of_weights |= {id(tensor): tensor for tensor in computed}
                self.runner.note_unplanned(spec.kind, frame, of_weights)
        if self.recorder is not None and any(map(is_float, leaves(result))):
            self.recorder.note(spec.kind, quantizers, frame)
        return result

    def _are_weights(self, operands: list[Tensor]) -> bool:
        """Whether all of some tensors are parameters or buffers, or computed from these alone."""
        unknown = [t for t in operands if not isinstance(t, nn.Parameter) and id(t) not in self._of_weights]
        if unknown:
            if self._buffers is None:
                self._buffers = {id(buffer): buffer for buffer in self.runner.target.buffers()}
            unknown = [tensor for tensor in unknown if id(tensor) not in self._buffers]
        return bool(operands) and not unknown

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
            args,
            kwargs,
            lambda index, tensor: self._quantize(inputs[index], tensor) if index in inputs else tensor,
            max(inputs),
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
            self._note_trained(point, weight)
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
                self.runner.call_ranges.observe(point.name, number, tensor)
            return tensor
        moves = point.role in self._updates and not fake_quant.frozen
        if self._first_scales and fake_quant.starts_at_zero and takes_first_scale(fake_quant, moves):
            follow(fake_quant, tensor, point.is_weight)
            if point.is_weight and not fake_quant.learned:
                self._note_trained(point, tensor)
        elif moves:
            if is_current(self._followed.get(fake_quant), tensor):
                fake_quant.outdated = True  # the optimizer may step before the next forward
            else:
                self._move_scale(point, tensor)
        quantized = fake_quant.forward(tensor)
        for tap in self._taps:
            tap(point.name, tensor, quantized)
        return quantized

    def _move_scale(self, point: BoundPoint, tensor: Tensor) -> None:
        fake_quant = point.fake_quant
        if fake_quant.training:
            fake_quant.update_scale(tensor, ema=not point.is_weight)
            if point.is_weight:
                self._note_trained(point, tensor)
        elif fake_quant.outdated:
            fake_quant.update_scale(tensor, ema=False)
            fake_quant.outdated = False

    def _note_trained(self, point: BoundPoint, weight: Tensor) -> None:
        """The optimizer may step before the next forward."""
        point.fake_quant.outdated, point.trained = True, parameter_view(weight)


@torch.no_grad()
def _renormalized(
    indices: Tensor, weight: Tensor, *, max_norm: float, norm_type: float, **others: Any
) -> dict[str, Any]:
    """Rescale the rows that an embedding reads, in the weight itself. The embedding would rescale quantized values.

    Returns:
        The keyword arguments of the embedding without ``max_norm``.
    """
    torch.embedding_renorm_(weight.detach(), indices.contiguous(), max_norm, norm_type)
    return {**others, "max_norm": None, "norm_type": norm_type}
