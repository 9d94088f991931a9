"""Fake-quantization on the CPU: the values and gradients of ``fake_quantize_primitives``, in less time.

With one scale, the forward makes four vectorized passes over one new tensor. The backward makes one pass over the saved
input: division and rounding are monotone, so the values with a code in range lie between two bounds, which are searched
once.

Torch's own ``hardtanh`` has this very backward. So the forward calls it and writes the values into its result. This
costs a pass, and saves a custom ``autograd.Function``, which takes longer: Python for small tensors, and for large ones
a pass that looks for NaN in the backward, where the input is no longer in a cache.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import Parameter

NATIVE = (torch.float32, torch.float64)
"""Types that are computed as they are; all others are computed in float32."""
LARGE = 2**20
"""Above so many values, to keep a weight's codes takes memory, and saves no time."""
_ORDINARY = (Tensor, Parameter)
"""Other types of tensors may not allow to write into their memory."""
_hardtanh = torch._C._nn.hardtanh


def fake_quantize_cpu(x: Tensor, scale: float, low: int, high: int, divisor: Tensor | None = None) -> Tensor:
    """Fake-quantize a CPU tensor with one scale.

    Args:
        x: Floating-point tensor on the CPU.
        scale: A Python float with the value of a float32.
        low: Smallest code minus the zero point.
        high: Largest code minus the zero point.
        divisor: The scale as a tensor, if there is one: torch makes a tensor of a number at every division.

    Returns:
        A new tensor of the shape and type of ``x``, with the straight-through gradient.

    Example:
        >>> fake_quantize_cpu(torch.tensor([0.24, 0.25, 0.75, 100.0]), 0.5, -8, 7)
        tensor([0.0000, 0.0000, 1.0000, 3.5000])
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _quantize_dequantize(x, scale, low, high)
    if type(x) in _ORDINARY and x.dtype in NATIVE:
        result: Tensor = _hardtanh(x, *_gradient_bounds(scale, low, high, x.dtype is torch.float64))
        values = result.detach()  # the same memory: what is written into it has no gradient
        if not _has_nan(values):
            _dequantize_(values.div_(scale if divisor is None else divisor).round_().clamp_(low, high), scale)
            return result
    return cast(Tensor, _CpuFakeQuantize.apply(x, scale, low, high))  # type: ignore[no-untyped-call]


def fake_quantize_channels_cpu(x: Tensor, scale: Tensor, zero: Tensor | int, low: int, high: int) -> Tensor | None:
    """Fake-quantize a CPU tensor that needs a gradient, with scales that broadcast.

    The codes are kept for the backward, not the input and the scales.

    Args:
        x: Floating-point tensor on the CPU.
        scale: float32 tensor that broadcasts against ``x``.
        zero: The code of zero: int, or integer tensor that broadcasts likewise.
        low: Smallest code.
        high: Largest code.

    Returns:
        A new tensor of the shape and type of ``x``, with the straight-through gradient; None for tensors that are too
        large, hold NaN, or are of a type of their own.
    """
    if x.numel() > LARGE or type(x) not in _ORDINARY:
        return None
    copied = x.clone() if x.dtype in NATIVE else x.float()  # hands the gradient through
    codes = copied.detach().div_(scale).round_()
    if _has_nan(codes):
        return None
    if not isinstance(zero, int):
        zero = zero.to(torch.float32)
    if isinstance(zero, Tensor) or zero:
        codes.add_(zero)
    result: Tensor = _hardtanh(copied, low - 1, high + 1)  # codes are whole numbers, and these bounds are exclusive
    values = result.detach().clamp_(low, high)
    if isinstance(zero, Tensor) or zero:
        values.sub_(zero)
    values.mul_(scale).add_(_ZERO)
    return result if x.dtype in NATIVE else result.to(x.dtype)


def round_to_float32(value: float) -> float:
    """Round a number to float32; a value that is too large becomes infinite."""
    return ctypes.c_float(value).value


class _CpuFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.constants = (scale, low, high)
        return _quantize_dequantize(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        scale, low, high = ctx.constants
        x, dtype = x.detach(), grad.dtype
        if dtype not in NATIVE:
            x, grad = x.float(), grad.float()
        lower, upper = _gradient_bounds(scale, low, high, x.dtype is torch.float64)
        result = torch.ops.aten.hardtanh_backward(grad, x, lower, upper)
        if _has_nan(x):  # the vectorized kernel blocks the gradient there, its scalar remainder does not
            result = result.masked_fill(x.isnan(), 0.0)
        return result.to(dtype), None, None, None


_ZERO = torch.zeros((), device="cpu")  # whatever the default device is


def _quantize_dequantize(x: Tensor, scale: float, low: int, high: int) -> Tensor:
    # Clamping to the range less the zero point spares adding and subtracting it; whole numbers below 2**24 are exact.
    work = x if x.dtype in NATIVE else x.float()
    codes = work.div(scale).round_().clamp_(low, high)
    return _dequantize_(codes, scale).to(x.dtype)


def _dequantize_(codes: Tensor, scale: float) -> Tensor:
    # 0 + scale * codes instead of codes * scale: the result for -0.1 is 0.0 as in torch, not -0.0.
    return torch.add(_ZERO, codes, alpha=scale, out=codes)


def _has_nan(x: Tensor) -> bool:
    """Whether there may be a NaN. A sum is the cheapest check."""
    return math.isnan(x.sum().item())


@lru_cache(maxsize=8192)
def _gradient_bounds(scale: float, low: int, high: int, double: bool) -> tuple[float, float]:
    """The largest value below and the smallest above all ``x`` with ``low <= round(x / scale) <= high``.

    They are searched from a first guess, as the quotient is itself rounded before it is rounded to a whole number.
    """
    upper = _first_reaching(_tie_after(high, double), scale, double)
    lower = -_first_reaching(_tie_after(-low, double), scale, double)
    return lower, upper


def _tie_after(code: int, double: bool) -> float:
    """The smallest quotient that rounds to more than ``code``: ties go to the even neighbour."""
    tie = code + 0.5
    return tie if code % 2 else _next(tie, double)


def _first_reaching(quotient: float, scale: float, double: bool) -> float:
    """The smallest ``x`` whose rounded quotient by ``scale`` is at least ``quotient``; ``inf`` if none is."""
    rounded: Callable[[float], float] = float if double else round_to_float32
    x = rounded(quotient * scale)
    # A quotient of two float32 that is rounded to float64 first is rounded correctly: 53 >= 2 * 24 + 2 bits (Figueroa,
    # "When is double rounding innocuous?", 1995).
    while math.isfinite(x) and rounded(x / scale) < quotient:
        x = _next(x, double)
    while rounded(_next(x, double, -1) / scale) >= quotient:
        x = _next(x, double, -1)
    return x


def _next(value: float, double: bool, step: Literal[1, -1] = 1) -> float:
    """The neighbour of ``value`` in float32 or float64, towards ``inf`` or (``step=-1``) ``-inf``."""
    if double:
        return math.nextafter(value, step * math.inf)
    if value == 0.0:
        return step * 2.0**-149
    if math.isinf(value) and value * step > 0:
        return value
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    (result,) = struct.unpack("<f", struct.pack("<i", bits + (step if value > 0 else -step)))
    return float(result)
