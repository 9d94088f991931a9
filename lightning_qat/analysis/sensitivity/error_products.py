"""A watcher of a float forward that multiplies each point's error with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from lightning_qat.analysis.sensitivity.sample_axes import SampleAxis
from lightning_qat.analysis.sensitivity.watched_forward import Key, WatchedTensor, WeightUse
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.modules.tensor_leaves import call_leaves
from lightning_qat.quantization.region.bound_points import BoundPoint

_KEPT_BYTES = 2**29
"""Bytes of errors that are kept from one probe to the next; the others are computed again."""


class ErrorProducts:
    """Multiplies each point's error with the gradient of its tensor, when the gradient arrives.

    Args:
        owner: maps every point to the point that owns its quantizer.
        quantizers: the fake-quants to watch, by the owner, each under the name of its results; one that is None stands
            for the fake-quant that the point has.
        probes: how many backward passes there will be.
        overwritten: points whose tensor is written later in the forward: their values are copied.
        shared: points whose tensor other ops may read past the point (operands, results of in-place ops).

    Attributes:
        leaves: the tensors at which gradients start.
        values: the watched tensors.
        axes: the sample axis of a tensor; without one, a product is summed over the batch.
        seen: names of the results whose point was run.
        arrived: those that a gradient reached.
        failed: those whose error could not be computed any more.
    """

    transparent = True

    def __init__(
        self,
        owner: Mapping[str, str],
        quantizers: Mapping[str, Mapping[str, FakeQuantize | None]],
        probes: int,
        overwritten: Container[str] = (),
        shared: Container[str] = (),
    ) -> None:
        self._owner = owner
        self._quantizers = quantizers
        self.left_torch = False
        self.leaves: list[Tensor] = []
        self.values: dict[Key, WatchedTensor] = {}
        self.axes: dict[Key, SampleAxis] = {}
        self.seen: set[str] = set()
        self.arrived: set[str] = set()
        self.failed: set[str] = set()
        self._products: dict[str, Tensor] = {}
        self._kept: dict[tuple[Key, str], Tensor] = {}
        self._errors: dict[str, list[Callable[[], Tensor]]] = {}
        self._overwritten = overwritten
        self._shared = shared
        self._room = _KEPT_BYTES if probes > 1 else 0
        self._hooks: list[RemovableHandle] = []

    def quantizers(self, point: BoundPoint) -> list[tuple[str, FakeQuantize]]:
        """Return the fake-quants to watch at a point."""
        watched = self._quantizers.get(self._owner[point.name], {})
        return [(name, fake_quant or point.fake_quant) for name, fake_quant in watched.items()]

    def on_tensor(self, point: BoundPoint, use: int, tensor: Tensor) -> Tensor:
        """Watch an activation. One without a gradient (a region input, a constant) becomes the start of one."""
        quantizers = self.quantizers(point)
        if not quantizers:
            return tensor
        names = [name for name, _ in quantizers]
        self.seen.update(names)
        if tensor.requires_grad and not _has_derivative(tensor):
            tensor = tensor.detach()
        if not tensor.requires_grad:
            if point.written:  # others may know the tensor: it has to stay the same
                self.failed.update(names)
                return tensor
            tensor = self.differentiable(tensor)
        elif point.name in self._shared and not point.written:
            tensor = tensor.view_as(tensor)  # without the gradient of those that read it past the point
        detached = tensor.detach()
        overwritten = point.rewritten or point.written or point.name in self._overwritten
        value = WatchedTensor(detached.clone() if overwritten else detached)
        for name, fake_quant in quantizers:

            def error(fake_quant: FakeQuantize = fake_quant) -> Tensor:
                return fake_quant.forward(value.tensor) - value.tensor

            self._watch((point.name, use, 0), name, tensor, value, error)
        return tensor

    def differentiable(self, tensor: Tensor) -> Tensor:
        """Return a tensor that takes part in the autograd graph."""
        if tensor.requires_grad:
            return tensor
        leaf = tensor.detach().requires_grad_()
        self.leaves.append(leaf)
        return leaf.clone()

    def on_weight(self, use: int, op: WeightUse) -> None:
        """Watch the results of an op that uses a weight."""
        name = op.name
        self.seen.add(name)
        operands = [WatchedTensor(t) for t in call_leaves(op.args, op.kwargs)]
        for index, result in enumerate(op.results):
            if not result.requires_grad:
                continue
            value = WatchedTensor(result.detach())

            def error(index: int = index, value: WatchedTensor = value) -> Tensor:
                if any(v.written for v in operands) or (value.written and not op.is_linear):
                    self.failed.add(name)
                return op.errors()[index]

            self._watch((op.point.name, use, index), name, result, value, error, needs_value=False)

    def close(self) -> None:
        """Drop all references: a hook that holds its own tensor is a cycle that the garbage collector cannot see."""
        for hook in self._hooks:
            hook.remove()
        for held in (self._hooks, self.leaves, self.values, self._kept, self._errors, self._products):
            held.clear()

    def take(self) -> dict[str, Tensor]:
        """Return the products of one backward pass, by name: one for each sample, or one for the batch."""
        products, self._products = self._products, {}
        return products

    @torch.no_grad()
    def has_error(self, name: str) -> bool:
        """Whether a fake-quant changes its tensor at all."""
        return any(bool(error().any()) for error in self._errors.get(name, ()))

    def _error(self, key: tuple[Key, str], error: Callable[[], Tensor]) -> Tensor:
        """The error of one result at a point; kept for the next probe as long as there is room."""
        kept = self._kept.get(key)
        if kept is None:
            kept = _wide(error())
            size = kept.numel() * kept.element_size()
            if size <= self._room:
                self._room -= size
                self._kept[key] = kept
        return kept

    def _watch(
        self,
        key: Key,
        name: str,
        tensor: Tensor,
        value: WatchedTensor,
        error: Callable[[], Tensor],
        needs_value: bool = True,
    ) -> None:
        self.values[key] = value
        self._errors.setdefault(name, []).append(error)

        def multiply(gradient: Tensor) -> None:  # a backward pass tracks no gradients
            if needs_value and value.written:
                self.failed.add(name)
                return
            d, axis = self._error((key, name), error), self.axes.get(key)
            new = torch.sum(d * gradient).view(1) if axis is None else axis.products(d, gradient)
            old = self._products.get(name)
            if old is not None:  # used several times: the errors act together
                new = old + new if old.numel() == new.numel() else (old.sum() + new.sum()).view(1)
            self._products[name] = new
            self.arrived.add(name)

        self._hooks.append(tensor.register_hook(multiply))


def custom_functions(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """Names of the custom autograd.Function classes, other than torch's own, that a gradient from here passes."""
    found: dict[str, None] = {}
    waiting = [tensor.grad_fn for tensor in tensors]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = _custom_function(node)
        if function is not None and not function.__module__.startswith("torch."):
            found[function.__name__] = None
        waiting += [before for before, _ in node.next_functions]
    return tuple(sorted(found))


def _has_derivative(tensor: Tensor) -> bool:
    """Whether gradients pass the op that made a tensor: a custom autograd.Function may have no backward."""
    function = _custom_function(tensor.grad_fn)
    if function is None:
        return True
    default = torch.autograd.Function
    return function.backward is not default.backward or function.vjp is not default.vjp


def _custom_function(node: Node | None) -> type[torch.autograd.Function] | None:
    """The custom autograd.Function that a node of the autograd graph belongs to."""
    return getattr(type(node), "_forward_cls", None)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
