"""Running a module's forward under a torch function mode that sees every op.

``target.forward`` becomes an :class:`Intercepted` object on the instance; nothing else of the module changes. State is
fresh for every entry, so an exception in mid-forward leaves nothing behind.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, ClassVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_qat.quantization.functions.function_lookup import is_interceptable, spec_of
from lightning_qat.quantization.functions.op_spec import OpSpec
from lightning_qat.quantization.interception.op_identity import OpIdentity

CapturedForward = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""A forward whose arguments are a tuple and a dictionary."""


class InterceptionMode(TorchFunctionMode):
    """A torch function mode that knows which op of the region it handles. One object per entry of the region.

    Args:
        identity: identifies the ops of this entry.
        recomputing: the entry repeats a forward for activation checkpointing.

    Attributes:
        keeps_activations: checkpointing inside is switched off.
    """

    keeps_activations: ClassVar[bool] = False

    def __init__(self, identity: OpIdentity, recomputing: bool = False) -> None:
        super().__init__()
        self.identity = identity
        self.recomputing = recomputing

    def resumed(self, frame: FrameType, scope: Any) -> InterceptionMode | None:
        """Return a mode that continues in a scope, for activations that are recomputed in the backward."""
        raise NotImplementedError

    def run_composite(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a Python function of torch so that the mode sees the functions it calls instead of the function."""
        with self:
            return decomposed(func)(*args, **kwargs)


def active_mode(owner: object | None = None) -> InterceptionMode | None:
    """Return the innermost interception mode that the current thread runs under.

    Args:
        owner: look for a mode of the region that this object identifies (:attr:`OpIdentity.owner`) only.
    """
    for mode in reversed(torch.overrides._get_current_function_mode_stack()):
        if isinstance(mode, InterceptionMode) and (owner is None or mode.identity.owner is owner):
            return mode
    return None


class CapturedMode(TorchFunctionMode):
    """A mode of a forward that ``torch.compile`` captures."""

    def check_end(self) -> None:
        """Refuse a forward that ended too early."""
        raise NotImplementedError


class Opener:
    """Decides what happens when the target's forward is entered: a region, a tracer or an analysis.

    Attributes:
        is_off: the plain forward runs.
        is_compiled: compiled code runs, by :meth:`run_compiled`.
    """

    is_off: bool = False
    is_compiled: bool = False

    def open(self, frame: FrameType) -> InterceptionMode | None:
        """Return the mode for this entry, or None to run the plain forward."""
        raise NotImplementedError

    def run(
        self, mode: InterceptionMode, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run ``forward`` under ``mode``."""
        raise NotImplementedError

    def run_compiled(
        self, captured: CapturedForward, eager: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run what ``torch.compile`` makes of ``captured``; run ``eager`` if it is not known yet what that does."""
        raise NotImplementedError

    def captured(self) -> CapturedMode | None:
        """Return the mode for a forward that ``torch.compile`` captures, or None to run it in eager mode."""
        return None


class Intercepted:
    """Replaces ``target.forward``: runs the previous forward, under the opener's mode if there is one.

    A callable object rather than a closure, so that deepcopy gives the copy its own and pickle works.

    Args:
        target: the module.
        opener: supplies the mode.
    """

    def __init__(self, target: nn.Module, opener: Opener) -> None:
        self.target = target
        self.opener = opener
        self.previous: Callable[..., Any] | None = target.__dict__.get("forward")

    @classmethod
    def install(cls, target: nn.Module, opener: Opener) -> Intercepted:
        """Put an interception on ``target.forward``; an already patched forward is wrapped, not bypassed."""
        intercepted = cls(target, opener)
        target.forward = intercepted
        return intercepted

    def uninstall(self) -> None:
        """Put back the previous forward.

        Raises:
            RuntimeError: other code has replaced the forward since.
        """
        current = self.target.__dict__.get("forward")
        if current is not self:
            raise RuntimeError(
                f"{type(self.target).__name__}.forward was patched again after fake-quant was inserted (now "
                f"{current!r}): undo that patch before removing the fake-quants."
            )
        if self.previous is None:
            del self.target.__dict__["forward"]
        else:
            self.target.__dict__["forward"] = self.previous

    @property
    def forward(self) -> Callable[..., Any]:
        """The forward that is wrapped, bound to the target."""
        if self.previous is not None:
            return self.previous
        return functools.partial(type(self.target).forward, self.target)

    @property
    def __code__(self) -> CodeType:  # Lightning compares code objects to see whether forward is overridden
        function: types.FunctionType = inspect.unwrap(type(self.target).forward)
        return function.__code__

    @property
    def __signature__(self) -> inspect.Signature:  # torch.export matches dynamic shapes to argument names
        return inspect.signature(self.forward)

    @property
    def __name__(self) -> str:
        return "forward"

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return type(self.target).forward.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._captured(args, kwargs)
        self._refuse_replica(sys._getframe(1))
        if self.opener.is_off:
            return self.forward(*args, **kwargs)
        if self.opener.is_compiled:
            return self.opener.run_compiled(self._captured, self._enter, args, kwargs)
        return self._enter(args, kwargs)

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = self.opener.open(sys._getframe())
        if mode is None:
            return self.forward(*args, **kwargs)
        return self.opener.run(mode, self.forward, args, kwargs)

    def _captured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run while ``torch.compile`` captures."""
        if self.opener.is_off:
            return self.forward(*args, **kwargs)
        mode = self.opener.captured()
        if mode is None:
            return self._quantized_region_runs_eagerly(args, kwargs)
        with mode:
            result = self.forward(*args, **kwargs)
        mode.check_end()
        return result

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _quantized_region_runs_eagerly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The name is what the error of ``fullgraph=True`` shows."""
        return self._enter(args, kwargs)

    def _refuse_replica(self, caller: FrameType) -> None:
        """A shallow copy shares this object and would silently run the original's weights."""
        if caller.f_code.co_filename != nn.modules.module.__file__:
            return
        module = caller.f_locals.get("self")
        if module is not None and module is not self.target and isinstance(module, type(self.target)):
            raise RuntimeError(
                f"this {type(module).__name__} is a shallow copy of a module with fake-quants (copy.copy, "
                "DataParallel): it would run the weights of the original. Use copy.deepcopy, or "
                "DistributedDataParallel."
            )


class SpecCache:
    """Remembers the table row of each function met, so that the hot path is one dictionary look-up."""

    def __init__(self) -> None:
        self._specs: dict[Callable[..., Any], OpSpec | None] = {}

    def get(self, func: Callable[..., Any]) -> OpSpec | None:
        """Return the row of a function that can carry quantizers, None for all others."""
        try:
            return self._specs[func]
        except KeyError:
            spec = spec_of(func)
            self._specs[func] = found = spec if is_interceptable(spec) else None
            return found


@functools.lru_cache(maxsize=64)
def decomposed(func: Callable[..., Any], unchecked: bool = False) -> Callable[..., Any]:
    """Return a twin of a Python function of torch that does its work instead of dispatching to the mode.

    The twin runs torch's own code with ``has_torch_function`` answering no, so it computes exactly what torch computes
    while the functions inside are seen one by one.

    Args:
        func: the function.
        unchecked: leave out the check of attention masks, which ``torch.compile`` cannot capture.
    """
    assert isinstance(func, types.FunctionType), func
    twin_globals = {**func.__globals__, "has_torch_function": lambda *_: False}
    if unchecked:
        twin_globals["_check_key_padding_mask"] = lambda *_: None
    twin = types.FunctionType(func.__code__, twin_globals, func.__name__, func.__defaults__, func.__closure__)
    twin.__kwdefaults__ = func.__kwdefaults__
    return twin
