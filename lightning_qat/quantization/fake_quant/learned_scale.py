r"""Fake-quantization whose scale has a gradient.

Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153. With the codes :math:`q` between
:math:`-Q_N` and :math:`Q_P`, the gradient of the quantized value with respect to the scale is

.. math:: \frac{\partial \hat v}{\partial s} = \begin{cases}
    -v/s + \mathrm{round}(v/s) & -Q_N < v/s < Q_P \\ -Q_N & v/s \le -Q_N \\ Q_P & v/s \ge Q_P \end{cases}

With a zero point :math:`z` the value is :math:`s (q - z)`, so the same holds with ``quant_min - z`` and
``quant_max - z`` in the place of :math:`-Q_N` and :math:`Q_P`. The sum over all values is multiplied by
:math:`g = 1 / \sqrt{N Q_P}`, so that a scale moves, relative to its size, about as fast as the weights do.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from lightning_qat.quantization.fake_quant.cpu_kernel import NATIVE
from lightning_qat.quantization.fake_quant.fake_quantize_function import (
    broadcast_to_axis,
    check_floating_point,
    input_for_backward,
    quantize_dequantize,
    straight_through,
)


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    gradient_scale: float | Tensor = 1.0,
) -> Tensor:
    """Quantize as ``fake_quantize`` does, bit for bit, with a gradient for the scale.

    The gradient of ``x`` is that of ``fake_quantize`` as well. NaN contributes nothing to the gradient of the scale;
    infinities count as values beyond the range.

    Args:
        x: Floating-point tensor.
        scale: Positive and normal float32; ``()``, or ``(channels,)`` with ``axis``.
        zero_point: The code of zero; int or integer tensor of the scale's shape. It has no gradient.
        quant_min: Smallest code.
        quant_max: Largest code.
        axis: The channel axis of ``x``.
        gradient_scale: Factor of the scale's gradient, see :func:`gradient_scale`; a number or ``(channels,)``.

    Returns:
        A new tensor of the shape and type of ``x``.

    Raises:
        ConfigurationError: If ``x`` is not floating-point, or its axis does not have as many channels as the scale.

    Example:
        >>> scale = torch.tensor(0.5, requires_grad=True)
        >>> fake_quantize_learned(torch.tensor([0.6, 100.0]), scale, 0, -8, 7).sum().backward()
        >>> round(scale.grad.item(), 4)  # round(1.2) - 1.2, and 7 for the clipped value
        6.8
    """
    check_floating_point(x)
    return cast(
        Tensor,
        _LearnedFakeQuantize.apply(  # type: ignore[no-untyped-call]
            x, scale, zero_point, quant_min, quant_max, axis, gradient_scale
        ),
    )


def gradient_scale(
    shape: tuple[int, ...],
    quant_max: int,
    axis: int | None = None,
    batch_axis: int | None = None,
    sizes: tuple[int, ...] | None = None,
) -> tuple[float, ...]:
    r"""Return :math:`g = 1/\sqrt{N Q_P}` of section 2.2 of the paper, for each scale.

    :math:`Q_P` is the largest code, also of affine schemes. :math:`N` is the number of values under one scale: the
    elements of a weight (or of one channel of it), or the elements of one sample of an activation.

    Args:
        shape: Shape of the quantized tensor.
        quant_max: :math:`Q_P`.
        axis: The channel axis, if there is more than one scale.
        batch_axis: The axis of the samples, None for weights.
        sizes: Lengths of the groups of channels that share a scale; None if there are no groups.

    Returns:
        One number, or with ``sizes`` one for each group.

    Example:
        >>> gradient_scale((64, 16, 8, 8), 127, batch_axis=0) == (1 / math.sqrt(16 * 8 * 8 * 127),)
        True
    """
    kept = [a % len(shape) for a in (axis, batch_axis) if a is not None and shape]
    values = 1
    for a, length in enumerate(shape):
        values *= 1 if a in kept else length
    return tuple([1.0 / math.sqrt(max(1, values * size) * quant_max) for size in sizes or (1,)])


class _LearnedFakeQuantize(torch.autograd.Function):
    """Primitives only: any number of scales, any device, and ``torch.compile`` captures it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | int,
        quant_min: int,
        quant_max: int,
        axis: int | None,
        factor: float | Tensor,
    ) -> Tensor:
        wide = broadcast_to_axis(x, scale, axis)
        if isinstance(zero_point, Tensor):
            zero_point = broadcast_to_axis(x, zero_point, axis)
        zero = zero_point.to(torch.float32, copy=True) if isinstance(zero_point, Tensor) else None
        ctx.save_for_backward(x, wide.clone(), zero)  # a copy: an optimizer may change the scale before the backward
        ctx.constants = (zero_point if zero is None else 0, quant_min, quant_max, axis, factor)
        return quantize_dequantize(x, wide, zero_point, quant_min, quant_max)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero = ctx.saved_tensors
        number, quant_min, quant_max, axis, factor = ctx.constants
        zero = number if zero is None else zero
        dtype = grad.dtype
        x = input_for_backward(x, grad)
        if dtype not in NATIVE:
            x, grad = x.float(), grad.float()
        quotient = x.div(scale)
        codes = quotient.round().add_(zero)
        low, high = quant_min - zero, quant_max - zero
        represented = codes.clamp(quant_min, quant_max).sub_(zero)
        grad_x = straight_through(grad, codes, quant_min, quant_max).to(dtype) if ctx.needs_input_grad[0] else None
        inside = (quotient > low) & (quotient < high)
        slope = torch.where(inside, represented - quotient, represented)
        shares = slope.mul_(grad).masked_fill_(x != x, 0.0)  # where it is NaN
        others = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
        total = shares.sum(others) if others else shares
        return grad_x, (total * factor).to(torch.float32), None, None, None, None, None
