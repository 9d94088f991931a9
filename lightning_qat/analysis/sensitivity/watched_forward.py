"""A float forward that shows a watcher the tensor at every quantization point, without fake-quantization."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.interception.interception import InterceptionMode
from lightning_qat.quantization.interception.op_identity import OpIdentity
from lightning_qat.quantization.interception.transparent_gradients import handler_of, leaves_torch
from lightning_qat.quantization.modules.tensor_leaves import map_call_leaves
from lightning_qat.quantization.region.bound_points import BoundPoint, OpQuantizers
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.region.region_mode import Operation, Runner
from lightning_qat.quantization.region.replaced_forward import InspectingMode, ReplacedForward

Key = tuple[str, int, int]
"""A watched tensor: point, number of its use, number of the op's result."""


class Watcher(Protocol):
    """Interface of an object that is shown every point. A point is met again under the next ``use`` if its op runs more
    than once."""

    transparent: bool
    """Whether gradients go through ``detach`` and ``no_grad``."""
    left_torch: bool
    """Whether a tensor became Python numbers."""

    def quantizers(self, point: BoundPoint) -> Iterable[tuple[str, FakeQuantize]]:
        """Return the fake-quants whose error at a point is looked at, each under the name of its result."""

    def on_tensor(self, point: BoundPoint, use: int, tensor: Tensor) -> Tensor:
        """Look at an activation, and return the tensor with which the forward continues."""

    def differentiable(self, tensor: Tensor) -> Tensor:
        """Return a tensor, from which a gradient starts if it has none."""

    def on_weight(self, use: int, op: WeightUse) -> None:
        """Look at an op that uses a weight."""


class WatchedTensor:
    """A tensor, and its version when the forward reached it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._version = tensor._version

    @property
    def written(self) -> bool:
        """Whether it was written since."""
        return self.tensor._version != self._version


class WeightUse:
    """One use of a weight: the op, with which the error of its result can be computed.

    Args:
        point: the weight's point.
        name: the name of the result.
        func: the torch function.
        kind: its canonical name.
        args: positional arguments, all tensors detached.
        kwargs: keyword arguments, likewise.
        index: number of the weight among the tensor leaves.
        quantized: the weight after fake-quantization.
        weight: the weight.
        results: the floating-point tensors that the op returned.
    """

    # fmt: off
    LINEAR = frozenset({
        "conv1d", "conv2d", "conv3d", "convolution", "linear", "conv_transpose1d", "conv_transpose2d",
        "conv_transpose3d", "matmul", "rmatmul", "bmm", "mv", "dot", "inner", "outer", "einsum", "tensordot",
        "embedding",
    })
    # fmt: on
    """Kinds whose result is linear in the weight, but for a bias."""

    def __init__(
        self,
        point: BoundPoint,
        name: str,
        func: Operation,
        kind: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        index: int,
        quantized: Tensor,
        weight: Tensor,
        results: list[Tensor],
    ) -> None:
        self.point = point
        self.name = name
        self.func = func
        self.results = results
        self.is_linear = kind in self.LINEAR
        replacement = quantized - weight if self.is_linear else quantized

        def replaced(i: int, tensor: Tensor) -> Tensor:
            return replacement if i == index else tensor.detach()

        self.args, self.kwargs = map_call_leaves(args, kwargs, replaced)
        if kind in ("conv1d", "conv2d", "conv3d", "convolution", "linear") or kind.startswith("conv_transpose"):
            if len(self.args) > 2:
                self.args = (*self.args[:2], None, *self.args[3:])
            self.kwargs.pop("bias", None)

    def errors(self) -> list[Tensor]:
        """Return the error that quantizing the weight adds to each result: the op with ``fq(W) - W`` in place of ``W``.

        No operand has a gradient.
        """
        value = self.func(*self.args, **self.kwargs)
        if self.is_linear:
            return [value]
        parts = [value] if isinstance(value, Tensor) else [v for v in value if isinstance(v, Tensor)]
        floats = [v for v in parts if v.is_floating_point()]
        return [v - result.detach() for v, result in zip(floats, self.results, strict=True)]


class WatchingMode(InspectingMode):
    """Shows a watcher every point while the target's forward runs in float."""

    def __init__(self, runner: Runner, identity: OpIdentity, watcher: Watcher) -> None:
        super().__init__(runner, identity)
        self.watcher = watcher
        self._uses: Counter[str] = Counter()

    @override
    def __torch_function__(
        self, func: Operation, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = handler_of(func) if self.watcher.transparent else None
        if handler is None:
            return super().__torch_function__(func, types, args, kwargs)
        self.watcher.left_torch = self.watcher.left_torch or leaves_torch(func, args)
        return handler(func, args, kwargs or {})

    @override
    def run_op(
        self, quantizers: OpQuantizers, kind: str, func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        weights: list[tuple[int, BoundPoint, Tensor]] = []
        if quantizers.inputs:

            def operand(index: int, tensor: Tensor) -> Tensor:
                point = quantizers.inputs.get(index)
                if point is None:
                    return tensor
                if point.is_weight:
                    weights.append((index, point, tensor))
                    return tensor
                return self._watched(point, tensor)

            args, kwargs = map_call_leaves(args, kwargs, operand)
        result = func(*args, **kwargs)
        for index, point, weight in weights:
            result = self._weight_used(point, func, kind, args, kwargs, index, weight, result)
        if quantizers.output is None:
            return result
        if isinstance(result, Tensor):
            return self._watched(quantizers.output, result)
        if type(result) is tuple and isinstance(result[0], Tensor):
            return (self._watched(quantizers.output, result[0]), *result[1:])
        return result

    def _watched(self, point: BoundPoint, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return self.watcher.on_tensor(point, self._use(point), tensor)

    def _use(self, point: BoundPoint) -> int:
        self._uses[point.name] += 1
        return self._uses[point.name] - 1

    def _weight_used(
        self,
        point: BoundPoint,
        func: Operation,
        kind: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        index: int,
        weight: Tensor,
        result: Any,
    ) -> Any:
        if not weight.is_floating_point():
            return result
        parts = [result] if isinstance(result, Tensor) else [r for r in result if isinstance(r, Tensor)]
        floats = [r for r in parts if r.is_floating_point()]
        if isinstance(result, Tensor) and result.is_floating_point():
            result = self.watcher.differentiable(result)  # an embedding: nothing before it has a gradient
            floats = [result]
        weight, use = weight.detach(), self._use(point)
        for name, fake_quant in self.watcher.quantizers(point):
            with torch.no_grad():
                quantized = self._quantize(point.quantized_by(fake_quant), weight)
            if quantized is not weight:
                operands = (args, kwargs, index, quantized, weight, floats)
                self.watcher.on_weight(use, WeightUse(point, name, func, kind, *operands))
        return result


class WatchedForward(ReplacedForward):
    """Context manager in which forwards of a region's target run in float, shown to a watcher.

    Args:
        region: a calibrated region, in the state that quantizes.
        watcher: the object that is shown the points.
    """

    def __init__(self, region: Region, watcher: Watcher) -> None:
        super().__init__(region)
        self.watcher = watcher

    @override
    def mode(self, identity: OpIdentity) -> InterceptionMode:
        return WatchingMode(self.region.runner, identity, self.watcher)
