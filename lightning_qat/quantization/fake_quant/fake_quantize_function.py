"""The arithmetic of fake-quantization: round to the codes of an integer type and back; straight-through gradient.

Source of the gradient: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
Computation" (2013); of the arithmetic: the CPU kernels of ``torch.fake_quantize_per_tensor_affine`` and
``torch.fake_quantize_per_channel_affine``.
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

from lightning_qat.quantization.errors import ConfigurationError

NATIVE = (torch.float32, torch.float64)
"""Types that are computed in themselves; the others in float32."""


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    """Quantize and dequantize: ``(clip(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``.

    The quotient is the product with the inverse of the scale, and ties round to even. On finite input this equals
    torch's operators bit for bit where those do not overflow. NaN stays NaN; infinite and huge values saturate by their
    sign (torch's operators turn NaN, and per channel also ``inf``, into ``quant_min``). float16 and bfloat16 are
    computed in float32 and returned in their own type; float64 is computed in float64 (torch's per-tensor operator
    rounds its result to float32).

    The gradient is handed through where the code before clipping is in range, as in torch, and is zero elsewhere, at
    NaN too. There is no gradient for scale and zero point.

    Args:
        x: Floating-point tensor of any shape and strides; it is not modified. Dense memory formats are kept.
        scale: Positive and normal float32; a single value, or ``(channels,)`` with ``axis``.
        zero_point: The code of zero, in ``quant_min ... quant_max``; int or integer tensor, of the scale's shape. An
            int 0 is faster than a tensor of zeros.
        quant_min: Smallest code.
        quant_max: Largest code.
        axis: The channel axis of ``x``; ``None`` quantizes with one scale.

    Returns:
        A new tensor of the shape and type of ``x``.

    Raises:
        ConfigurationError: If ``x`` is not floating-point, or its axis does not have as many channels as the scale.

    Example:
        >>> fake_quantize(torch.tensor([0.24, 0.25, 0.75, 100.0]), torch.tensor(0.5), 0, -8, 7)
        tensor([0.0000, 0.0000, 1.0000, 3.5000])
    """
    check_floating_point(x)
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    compiling = torch.compiler.is_compiling()
    transformed = not compiling and torch._C._are_functorch_transforms_active()
    if axis is None and x.device.type == "cpu" and not (compiling or transformed):
        # Numbers read from tensors in CPU memory: this costs nothing, and cannot be stale as a cache of them could.
        s = scale.item() if isinstance(scale, Tensor) else _float32(scale)
        z = int(zero_point.item()) if isinstance(zero_point, Tensor) else zero_point
        if needs_grad:
            return cast(
                Tensor,
                _ScalarFakeQuantize.apply(x, s, quant_min - z, quant_max - z),  # type: ignore[no-untyped-call]
            )
        return _scalar_forward(x, s, quant_min - z, quant_max - z)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    if axis is not None:
        scale = broadcast_to_axis(x, scale, axis)
        zero_point = broadcast_to_axis(x, zero_point, axis) if isinstance(zero_point, Tensor) else zero_point
    if transformed:
        return _differentiable(x, scale, zero_point, quant_min, quant_max)
    if needs_grad:
        return cast(
            Tensor,
            _TensorFakeQuantize.apply(x, scale, zero_point, quant_min, quant_max),  # type: ignore[no-untyped-call]
        )
    return tensor_forward(x, scale, zero_point, quant_min, quant_max)


def check_floating_point(x: Tensor) -> None:
    """Refuse a tensor that has no fractions to round.

    Raises:
        ConfigurationError: If ``x`` is not floating-point.
    """
    if not x.is_floating_point():
        raise ConfigurationError(f"only floating-point tensors can be quantized, not {x.dtype}: leave this point out.")


def broadcast_to_axis(x: Tensor, values: Tensor, axis: int | None) -> Tensor:
    """View ``(channels,)`` values so that they broadcast along an axis of ``x``; as they are without an axis.

    Raises:
        ConfigurationError: If the axis does not have as many channels.
    """
    if axis is None:
        return values
    if x.dim() == 0 or x.shape[axis] != values.numel():
        raise ConfigurationError(
            f"a tensor of shape {tuple(x.shape)} does not have {values.numel()} channels at axis {axis}."
        )
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def tensor_forward(x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int) -> Tensor:
    """Quantize and dequantize by primitives; scale and zero point broadcast against ``x``."""
    zero = zero_point.to(torch.float32) if isinstance(zero_point, Tensor) else (zero_point or None)
    work = x if x.dtype in NATIVE else x.float()
    codes = _codes(work, scale.reciprocal(), zero).clamp_(quant_min, quant_max)
    if zero is not None:
        codes = codes.sub_(zero)
    result = codes.mul_(scale).add_(0.0)
    return result if work is x else result.to(x.dtype)


def straight_through(grad: Tensor, codes: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Hand the gradient through where the code before clipping is in range; zero elsewhere and at NaN.

    ``codes`` is overwritten.
    """
    codes = codes.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    # Codes are whole numbers, and the bounds of hardtanh_backward are exclusive. (`where` and a product with a bool
    # mask are several times slower on the CPU.)
    return cast(Tensor, torch.ops.aten.hardtanh_backward(grad, codes, quant_min - 1, quant_max + 1))


class _ScalarFakeQuantize(torch.autograd.Function):
    """One scale, on the CPU: four passes forward, and one backward over nothing but the saved input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.range = (_float32(1.0 / scale), low, high)
        return _scalar_forward(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        inverse, low, high = ctx.range
        x, dtype = x.detach(), grad.dtype
        if dtype not in NATIVE:
            x, grad = x.float(), grad.float()
        lower, upper = _gradient_bounds(inverse, low, high, x.dtype is torch.float64)
        result = torch.ops.aten.hardtanh_backward(grad, x, lower, upper)
        # The vectorized kernel blocks the gradient at NaN, its scalar remainder does not. A sum is the cheapest check.
        if math.isnan(x.sum().item()):
            result = result.masked_fill(x.isnan(), 0.0)
        return result.to(dtype), None, None, None


class _TensorFakeQuantize(torch.autograd.Function):
    """Any number of scales, any device, no synchronization, only primitives: also what ``torch.compile`` captures."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int) -> Tensor:
        inverse = scale.reciprocal()  # not the buffers themselves: they may be updated before the backward
        zero = zero_point.to(torch.float32, copy=True) if isinstance(zero_point, Tensor) else None
        ctx.save_for_backward(x, inverse, zero)
        ctx.range = (quant_min, quant_max)
        return tensor_forward(x, scale, zero_point, quant_min, quant_max)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, inverse, zero = ctx.saved_tensors
        quant_min, quant_max = ctx.range
        x, dtype = x.detach(), grad.dtype
        if dtype not in NATIVE:
            x, grad = x.float(), grad.float()
        result = straight_through(grad, _codes(x, inverse, zero), quant_min, quant_max)
        return result.to(dtype), None, None, None, None


def _differentiable(x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int) -> Tensor:
    """The same value and gradient without an autograd.Function, for ``torch.func``: ``vmap``, ``grad``, ``jvp``."""
    value = x.detach()
    zero = zero_point.to(torch.float32) if isinstance(zero_point, Tensor) else zero_point
    codes = _codes(value if value.dtype in NATIVE else value.float(), scale.reciprocal(), zero)
    inside = (codes >= quant_min) & (codes <= quant_max)
    represented = (codes.clamp(quant_min, quant_max) - zero) * scale + 0.0
    return represented.to(x.dtype) + torch.where(inside, x - value, 0.0)


_ZERO = torch.zeros((), device="cpu")  # whatever the default device is


def _scalar_forward(x: Tensor, scale: float, low: int, high: int) -> Tensor:
    # Clamping to the range less the zero point spares adding and subtracting it; whole numbers below 2**24 are exact.
    work = x if x.dtype in NATIVE else x.float()
    codes = work.mul(_float32(1.0 / scale)).round_().clamp_(low, high)
    # 0 + scale * codes instead of codes * scale: the result for -0.1 is 0.0 as in torch, not -0.0.
    result = torch.add(_ZERO, codes, alpha=scale, out=codes)
    return result if work is x else result.to(x.dtype)


def _codes(x: Tensor, inverse: Tensor, zero: Tensor | int | None) -> Tensor:
    """Codes before clipping, in a new tensor."""
    codes = x.mul(inverse).round_()
    return codes if zero is None else codes.add_(zero)


@lru_cache(maxsize=8192)
def _gradient_bounds(inverse: float, low: int, high: int, double: bool) -> tuple[float, float]:
    """The largest value below and the smallest above all ``x`` with ``low <= round(x * inverse) <= high``.

    Multiplication and rounding are monotone, so these two numbers describe torch's gradient mask completely. They are
    searched from a first guess, as the product is itself rounded.
    """
    upper = _first_reaching(_tie_after(high, double), inverse, double)
    lower = -_first_reaching(_tie_after(-low, double), inverse, double)
    return lower, upper


def _tie_after(code: int, double: bool) -> float:
    """The smallest product that rounds to more than ``code``: ties go to the even neighbour."""
    tie = code + 0.5
    return tie if code % 2 else _next(tie, double)


def _first_reaching(product: float, inverse: float, double: bool) -> float:
    """The smallest ``x`` whose rounded product with ``inverse`` is at least ``product``; ``inf`` if none is."""
    rounded: Callable[[float], float] = float if double else _float32
    x = rounded(product / inverse)
    while math.isfinite(x) and rounded(x * inverse) < product:  # a product of two float32 is exact in Python's float
        x = _next(x, double)
    while rounded(_next(x, double, -1) * inverse) >= product:
        x = _next(x, double, -1)
    return x


def _float32(value: float) -> float:
    """Round to float32; too large values become infinite."""
    return ctypes.c_float(value).value


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
