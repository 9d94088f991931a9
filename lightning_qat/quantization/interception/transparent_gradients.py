"""Letting gradients through ``detach``, ``.data`` and ``no_grad``, for an analysis that differentiates a model.

A model uses them to keep training from learning through a value (iterative refinement detaches its reference points).
The value still flows on, and so does its quantization error: a derivative that stops there is silently too small.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_qat.quantization.interception.call_path import FUNCTION_CODE

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class TransparentGradients(TorchFunctionMode):
    """Runs code that does not know about the analysis (post-processing of an output) with gradients let through.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> with TransparentGradients(), torch.no_grad():
        ...     y = (x * 2).detach() * x.data
        >>> torch.autograd.grad(y.sum(), x)[0]
        tensor([4., 4.])
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = handler_of(func)
        return func(*args, **(kwargs or {})) if handler is None else handler(func, args, kwargs or {})


def handler_of(func: Callable[..., Any]) -> Handler | None:
    """Return the replacement for a torch function that would cut the gradient; None for all other functions."""
    return _HANDLERS.get(func)


def leaves_torch(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a function turns a tensor with a gradient into Python or numpy values, which cannot carry one."""
    return func in _TO_PYTHON and isinstance(args[0], Tensor) and args[0].requires_grad


def inside_function(frame: FrameType | None) -> bool:
    """Whether a frame runs inside a custom ``autograd.Function``, whose own code decides about gradients."""
    while frame is not None:
        if frame.f_code is FUNCTION_CODE:
            return True
        frame = frame.f_back
    return False


def _alias(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.detach()``, ``x.data``: another tensor with the same memory, and the same gradient."""
    tensor = args[0]
    return tensor.view_as(tensor) if tensor.requires_grad else func(*args, **kwargs)


def _same(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.detach_()``, ``x.requires_grad_(False)``: nothing happens to a tensor that was computed."""
    tensor = args[0]
    return tensor if tensor.requires_grad and not tensor.is_leaf else func(*args, **kwargs)


def _grad_mode(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``no_grad`` does nothing, and neither does its end, which restores the previous mode."""
    if args[0] or not torch.is_grad_enabled() or inside_function(sys._getframe(1)):
        return func(*args, **kwargs)
    return None


def _detached(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.numpy()``, ``float(x)``: refused (or warned of) by torch for tensors with a gradient."""
    return func(args[0].detach(), *args[1:], **kwargs)


def _copied(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``copy.deepcopy(x)``: torch refuses it for tensors that were computed."""
    tensor = args[0]
    return tensor.clone() if tensor.requires_grad and not tensor.is_leaf else func(*args, **kwargs)


_TO_PYTHON: frozenset[Callable[..., Any]] = frozenset(
    [
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.__array__,
        Tensor.__float__,
        Tensor.__int__,
        Tensor.__index__,
    ]
)
_HANDLERS: dict[Callable[..., Any], Handler] = {
    Tensor.detach: _alias,
    torch.detach: _alias,
    Tensor.data.__get__: _alias,  # type: ignore[attr-defined]
    Tensor.detach_: _same,
    torch.detach_: _same,
    Tensor.requires_grad_: _same,
    Tensor.requires_grad.__set__: _same,  # type: ignore[attr-defined]
    Tensor.__deepcopy__: _copied,
    torch._C._set_grad_enabled: _grad_mode,
    **dict.fromkeys(_TO_PYTHON, _detached),
}
