"""How values flow through a step: which module's results go into which module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_qat.quantization.modules.preservation import replaced_attribute
from lightning_qat.quantization.modules.tensor_leaves import call_leaves, leaves

WEIGHTS = "(weights)"
"""Stands for parameters that are in none of the modules, such as those of the LightningModule itself."""


class ModuleFlow(TorchFunctionMode):
    """Follows the results of modules through the steps that run in :meth:`watching`.

    The output of a torch function counts as a result of the module that its inputs come from. Values that leave torch
    (numpy, numbers) are not followed.

    Args:
        modules: the modules by path. What happens inside of them is not looked at.
        weights: identities of further parameters; an op that they meet a result in counts as their call.
        around: a module that holds all the others, if there is one.

    Attributes:
        inputs: by path, for each call, where its arguments came from.
        inside: paths of the modules that the forward of ``around`` calls.
        joined: where the operands of an op came from, for ops that the forward of ``around`` runs on the results of
            several modules. Losses, which are single numbers, are left out.
    """

    def __init__(self, modules: dict[str, nn.Module], weights: set[int], around: nn.Module | None = None) -> None:
        super().__init__()
        self.inputs: dict[str, list[frozenset[str]]] = {}
        self.inside: set[str] = set()
        self.joined: list[frozenset[str]] = []
        self._around = around
        self._is_inside = False
        self._modules = modules
        self._weights = weights
        self._depth = 0
        self._origins: dict[int, tuple[Tensor, frozenset[str]]] = {}  # keeps them alive: identities are not reused

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the calls of a block."""
        with ExitStack() as stack:
            if self._around is not None:
                noted = self._noting_inside(self._around.forward)
                stack.enter_context(replaced_attribute(self._around, "forward", noted))
            for path, module in self._modules.items():
                stack.enter_context(replaced_attribute(module, "forward", self._watched(path, module.forward)))
            stack.enter_context(self)
            stack.callback(self._origins.clear)
            yield

    def reaches(self, path: str, targets: set[str]) -> bool:
        """Whether a result of a module goes into one of the targets."""
        return any(path in origins for target in targets for origins in self.inputs.get(target, ()))

    def continues(self, path: str, targets: set[str]) -> bool:
        """Whether every call of a module gets a result of one of the targets."""
        calls = self.inputs.get(path, [])
        return bool(calls) and all(origins & targets for origins in calls)

    def joins(self, path: str, targets: set[str]) -> bool:
        """Whether an op inside of ``around`` makes one value of results of a module and of one of the targets."""
        return any(path in origins and origins & targets for origins in self.joined)

    def _noting_inside(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            before, self._is_inside = self._is_inside, True
            try:
                return forward(*args, **kwargs)
            finally:
                self._is_inside = before

        return noting

    def _watched(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return forward(*args, **kwargs)
            if self._is_inside:
                self.inside.add(path)
            self.inputs.setdefault(path, []).append(self._origins_of(call_leaves(args, kwargs)))
            self._depth += 1
            try:
                result = forward(*args, **kwargs)
            finally:
                self._depth -= 1
            self._note(leaves(result), frozenset({path}))
            return result

        return watched

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._depth:
            return result
        operands = call_leaves(args, kwargs)
        origins = self._origins_of(operands)
        if origins:
            if any(id(operand) in self._weights for operand in operands):
                self.inputs.setdefault(WEIGHTS, []).append(origins)
            if self._is_inside and len(origins) > 1 and any(t.dim() for t in leaves(result)):
                self.joined.append(origins)
            written = operands[:1] if result is None else []  # x[0] = y
            self._note([*leaves(result), *written], origins)
        return result

    def _origins_of(self, tensors: list[Tensor]) -> frozenset[str]:
        return frozenset().union(*(self._origins[id(t)][1] for t in tensors if id(t) in self._origins))

    def _note(self, tensors: list[Tensor], origins: frozenset[str]) -> None:
        for tensor in tensors:
            known = self._origins[id(tensor)][1] if id(tensor) in self._origins else frozenset()
            self._origins[id(tensor)] = tensor, known | origins
