"""The function behind every quantization point, and its arithmetic in plain torch operators.

Every code in the package comes from :func:`codes_before_clipping` or, on the CPU, from ``cpu_kernel.py``.
Both divide by the scale, so the codes are those of ONNX's ``QuantizeLinear``, bit for bit. Torch's own fake-quantize
operators multiply by the inverse of the scale, which gives another code for about two values in 10,000 at 16 bits.

Compiled by inductor for the CPU, the codes are the same. For CUDA, inductor rounds divisions as eager mode does only
with ``torch._inductor.config.eager_numerics.division_rounding``; that has not been measured here.

Source of the gradient: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
Computation" (2013).
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.cpu_kernel import (
    NATIVE,
    fake_quantize_channels_cpu,
    fake_quantize_cpu,
    round_to_float32,
)


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    """Quantize and dequantize: ``(clip(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``.

    Ties round to even. The codes, ``clip(...)``, are those of ONNX's ``QuantizeLinear``, bit for bit. Torch's own
    operators multiply by the inverse of the scale: their code may differ by one where ``x / scale`` is very close to a
    tie. NaN stays NaN; infinite and huge values saturate by their sign (torch's operators turn NaN, and per
    channel also ``inf``, into ``quant_min``). float16 and bfloat16 are computed in float32 and returned in their own
    type; float64 is computed in float64.

    The gradient is handed through where the code before clipping is in range and is zero elsewhere, at NaN too. There
    is no gradient for scale and zero point.

    There are three ways to compute it, with the same result: ``cpu_kernel.py`` on the CPU,
    :func:`fake_quantize_primitives` for other devices, ``torch.compile`` and export, and
    :func:`fake_quantize_transformable` for ``torch.func`` and ``torch.jit.trace``. CUDA has a native kernel, which
    multiplies by the inverse: it is not used.

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
    compiling = torch.compiler.is_compiling()
    transformed = not compiling and (
        torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
    )
    on_cpu = x.is_cpu and not (compiling or transformed)
    if axis is None and on_cpu:
        # Numbers read from tensors in CPU memory: this costs nothing, and cannot be stale as a cache of them could.
        s = scale.item() if isinstance(scale, Tensor) else round_to_float32(scale)
        z = int(zero_point.item()) if isinstance(zero_point, Tensor) else zero_point
        divisor = scale.detach() if isinstance(scale, Tensor) and scale.is_cpu else None
        return fake_quantize_cpu(x, s, quant_min - z, quant_max - z, divisor)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    if axis is not None:
        scale = broadcast_to_axis(x, scale, axis)
        zero_point = broadcast_to_axis(x, zero_point, axis) if isinstance(zero_point, Tensor) else zero_point
    if on_cpu and x.requires_grad and torch.is_grad_enabled():
        result = fake_quantize_channels_cpu(x, scale, zero_point, quant_min, quant_max)
        if result is not None:
            return result
    compute = fake_quantize_transformable if transformed else fake_quantize_primitives
    return compute(x, scale, zero_point, quant_min, quant_max)


def fake_quantize_primitives(
    x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int
) -> Tensor:
    """Fake-quantize with scale and zero point that broadcast against ``x``; never waits for an accelerator.

    Args:
        x: Floating-point tensor.
        scale: float32 tensor on the device of ``x``. Not a number, and not a CPU tensor for an ``x`` elsewhere: CUDA
            multiplies by the inverse of those.
        zero_point: int, or integer tensor that broadcasts like the scale.
        quant_min: Smallest code.
        quant_max: Largest code.

    Returns:
        A new tensor of the shape and type of ``x``, with the straight-through gradient.

    Example:
        >>> fake_quantize_primitives(torch.tensor([[0.3], [0.3]]), torch.tensor([[0.5], [0.2]]), 0, -8, 7)
        tensor([[0.5000],
                [0.4000]])
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return quantize_dequantize(x, scale, zero_point, quant_min, quant_max)
    return cast(
        Tensor,
        _PrimitivesFakeQuantize.apply(x, scale, zero_point, quant_min, quant_max),  # type: ignore[no-untyped-call]
    )


def fake_quantize_transformable(
    x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int
) -> Tensor:
    """Compute :func:`fake_quantize_primitives` without an autograd.Function: for ``vmap``, ``grad`` and ``jvp``."""
    value = x.detach()
    zero = zero_point.to(torch.float32) if isinstance(zero_point, Tensor) else zero_point
    codes = codes_before_clipping(value, scale, zero)
    inside = (codes >= quant_min) & (codes <= quant_max)
    represented = (codes.clamp(quant_min, quant_max) - zero) * scale + 0.0
    return represented.to(x.dtype) + torch.where(inside, x - value, 0.0)


def codes_before_clipping(x: Tensor, scale: Tensor, zero_point: Tensor | int) -> Tensor:
    """Return ``round(x / scale) + zero_point`` with ties to even, as whole floating-point numbers.

    NaN stays NaN; infinite values, and huge ones, are infinite codes.

    Args:
        x: Floating-point tensor; types other than float64 are computed in float32.
        scale: float32 tensor that broadcasts against ``x``, on its device.
        zero_point: int, or tensor that broadcasts likewise.

    Returns:
        A new float32 or float64 tensor.

    Example:
        >>> codes_before_clipping(torch.tensor([0.25, 0.75, 100.0]), torch.tensor(0.5), 1)
        tensor([  1.,   3., 201.])
    """
    work = x if x.dtype in NATIVE else x.float()
    codes = work.div(scale).round_()
    return codes if isinstance(zero_point, int) and zero_point == 0 else codes.add_(zero_point)


def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int) -> Tensor:
    """Compute the value of :func:`fake_quantize_primitives` from the same arguments, without a gradient."""
    zero = zero_point.to(torch.float32) if isinstance(zero_point, Tensor) else zero_point
    codes = codes_before_clipping(x, scale, zero).clamp_(quant_min, quant_max)
    if isinstance(zero, Tensor) or zero:
        codes = codes.sub_(zero)
    return codes.mul_(scale).add_(0.0).to(x.dtype)  # the sum makes 0.0 of -0.0, as in torch's operators


def straight_through(grad: Tensor, codes: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Hand the gradient through where the code before clipping is in range; zero elsewhere and at NaN.

    Args:
        grad: Gradient of the result.
        codes: Codes before clipping, of the shape and type of ``grad``; they are overwritten.
        quant_min: Smallest code.
        quant_max: Largest code.
    """
    if torch.compiler.is_compiling():  # inductor computes nan_to_num value by value
        return torch.where(codes == codes.clamp(quant_min, quant_max), grad, 0.0)  # NaN differs from itself
    codes = codes.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    # Codes are whole numbers, and the bounds of hardtanh_backward are exclusive. (`where` and a product with a bool
    # mask are several times slower on the CPU.)
    return cast(Tensor, torch.ops.aten.hardtanh_backward(grad, codes, quant_min - 1, quant_max + 1))


def input_for_backward(x: Tensor, grad: Tensor) -> Tensor:
    """Return the saved input of a fake-quant, to compute in the backward with it.

    For ``torch.compile``, it is made to depend on the gradient, so that no part of that work moves into the forward.
    There, a mask would be saved instead of the input, as it has fewer bytes. But on the CPU inductor writes a mask
    value by value: that took 40 times as long as to fake-quantize (torch 2.13).
    """
    return torch.where(grad == grad, x, x) if torch.compiler.is_compiling() else x.detach()


def check_floating_point(x: Tensor) -> None:
    """Refuse a tensor that is not floating-point.

    Raises:
        ConfigurationError: If ``x`` is not floating-point.
    """
    if not x.is_floating_point():
        raise ConfigurationError(f"only floating-point tensors can be quantized, not {x.dtype}: leave this point out.")


def broadcast_to_axis(x: Tensor, values: Tensor, axis: int | None) -> Tensor:
    """View ``(channels,)`` values so that they broadcast along an axis of ``x``; return them as they are without one.

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


class _PrimitivesFakeQuantize(torch.autograd.Function):
    """The gradient, in operators that ``torch.compile`` captures."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int) -> Tensor:
        zero = zero_point.to(torch.float32, copy=True) if isinstance(zero_point, Tensor) else None
        ctx.save_for_backward(x, scale.clone(), zero)  # copies: the buffers may be updated before the backward
        ctx.constants = (zero_point if zero is None else 0, quant_min, quant_max)
        return quantize_dequantize(x, scale, zero_point, quant_min, quant_max)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, scale, zero = ctx.saved_tensors
        number, quant_min, quant_max = ctx.constants
        codes = codes_before_clipping(input_for_backward(x, grad), scale, number if zero is None else zero)
        result = straight_through(grad.to(codes.dtype), codes, quant_min, quant_max)
        return result.to(grad.dtype), None, None, None, None
