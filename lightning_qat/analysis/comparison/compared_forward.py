"""Forwards of a region's target that show every tensor of a layer comparison to a listener.

Two kinds. In the *float* forward every op runs as in the float model, and a second time on the same inputs with only
its own fake-quants on (a fused group as a whole): the difference is the op's own error. In the *quantized* forward
everything is on: the difference to the float forward is the accumulated error.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_qat.quantization.interception.interception import InterceptionMode
from lightning_qat.quantization.interception.op_identity import OpIdentity
from lightning_qat.quantization.modules.tensor_leaves import call_leaves, is_float, map_call_leaves
from lightning_qat.quantization.region.bound_points import BoundPoint, OpQuantizers
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.region.region_mode import Operation
from lightning_qat.quantization.region.replaced_forward import InspectingMode, ReplacedForward


class Listener(Protocol):
    """Interface of an object that is shown the tensors. ``name`` is that of a point, or ``<op>.output`` for a result
    without one."""

    def on_value(self, name: str, value: Tensor) -> None:
        """Take the tensor of this model: of the float model, or of the quantized one (after fake-quantization)."""

    def on_own(self, name: str, base: Tensor, analy: Tensor, direct: Tensor | None) -> None:
        """Take a float tensor (``base``) and the same tensor with only the op's own fake-quants on (``analy``).

        At a point of the plan, ``direct`` is the tensor that arrived at its fake-quant.
        """


class ComparedForward(ReplacedForward):
    """Context manager in which the forwards of a region's target are shown to a listener.

    Use it inside :func:`~lightning_qat.analysis.captured_calls.analysis_mode`.

    Args:
        region: a calibrated region, in the state that quantizes.
        listener: the object that is shown the tensors.
        quantized: run the quantized model, not the float one.
        own: in the float forward, also run every op with its own fake-quants.
    """

    def __init__(self, region: Region, listener: Listener, quantized: bool, own: bool = False) -> None:
        super().__init__(region)
        self.listener = listener
        self.quantized = quantized
        self.own = own
        self.inner = {name for group in region.plan.fusions for name in group.ops[:-1]}
        self.group = {name: index for index, group in enumerate(region.plan.fusions) for name in group.ops}
        self.inplace = {op.name for op in region.graph.ops if op.inplace}

    @override
    def mode(self, identity: OpIdentity) -> InterceptionMode:
        return (_QuantizedMode if self.quantized else _FloatMode)(self, identity)


class _QuantizedMode(InspectingMode):
    """The quantized model, as the region runs it."""

    def __init__(self, forward: ComparedForward, identity: OpIdentity) -> None:
        super().__init__(forward.region.runner, identity)
        self.listener = forward.listener
        self._taps = (lambda name, _, quantized: self.listener.on_value(name, quantized),)

    @override
    def run_op(
        self, quantizers: OpQuantizers, kind: str, func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = super().run_op(quantizers, kind, func, args, kwargs)
        if quantizers.output is None and (first := _first(result)) is not None:
            self.listener.on_value(f"{quantizers.op}.output", first)
        return result


class _FloatMode(InspectingMode):
    """The float model, and beside it every op with its own fake-quants on."""

    def __init__(self, forward: ComparedForward, identity: OpIdentity) -> None:
        super().__init__(forward.region.runner, identity)
        self.forward = forward
        self.listener = forward.listener
        self._taps = (self._note_direct,)
        self._direct: tuple[Tensor, Tensor] | None = None
        # results inside a fused group, by group and identity: as in float, and with the group's fake-quants
        self._beside: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}

    def _note_direct(self, name: str, value: Tensor, quantized: Tensor) -> None:
        self._direct = value, quantized

    @override
    def run_op(
        self, quantizers: OpQuantizers, kind: str, func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        own = self.forward.own
        beside, changed = self._beside_operands(quantizers, args, kwargs)
        if changed and own and quantizers.op in self.forward.inplace:
            beside = map_call_leaves(*beside, lambda _, tensor: tensor.clone())
        second = None
        if changed and own:
            devices = {t.device for t in call_leaves(args, kwargs) if t.device.type == "cuda"}
            with torch.random.fork_rng(devices):
                second = _first(func(*beside[0], **beside[1]))
        result = func(*args, **kwargs)
        first = _first(result)
        if first is None:
            return result
        second = first if second is None else second
        group = self.forward.group.get(quantizers.op)
        if quantizers.op in self.forward.inner and group is not None:
            self._beside.setdefault(group, {})[id(first)] = (first, second)
            return result
        if group is not None:
            self._beside.pop(group, None)
        self._show_result(quantizers, first, second)
        return result

    def _beside_operands(
        self, quantizers: OpQuantizers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], bool]:
        """The operands of the op with its own fake-quants, and whether they differ from those of the float model."""
        known = self._beside.get(self.forward.group.get(quantizers.op, -1), {})
        if not quantizers.inputs and not known:
            return (args, kwargs), False
        changed = False

        def operand(index: int, tensor: Tensor) -> Tensor:
            nonlocal changed
            point = quantizers.inputs.get(index)
            other = known[id(tensor)][1] if id(tensor) in known else tensor
            if point is not None and is_float(tensor):
                other = self._show_operand(point, tensor)
            changed = changed or other is not tensor
            return other

        return map_call_leaves(args, kwargs, operand), changed

    def _show_operand(self, point: BoundPoint, tensor: Tensor) -> Tensor:
        self._direct = None
        if point.batch_norm is not None:
            quantized = self._quantize_folded(point, point.batch_norm, tensor)
        else:
            quantized = self._apply(point, tensor)
        value, result = self._direct or (tensor, quantized)
        self.listener.on_value(point.name, value)
        if self.forward.own:
            self.listener.on_own(point.name, value, result, value)
        return quantized

    def _show_result(self, quantizers: OpQuantizers, base: Tensor, own: Tensor) -> None:
        name = f"{quantizers.op}.output"
        self.listener.on_value(name, base)
        if not self.forward.own:
            return
        point = quantizers.output
        if point is None:
            self.listener.on_own(name, base, own, None)
        else:
            self.listener.on_own(name, base, self._apply(point, own), base)


def _first(result: Any) -> Tensor | None:
    """The floating-point tensor that an op returns, or the first of several."""
    first = result[0] if type(result) is tuple and result else result
    return first if isinstance(first, Tensor) and is_float(first) else None
