"""The function behind every quantization point: it chooses how fake-quantization is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.quantization.fake_quant.cpu_kernel import fake_quantize_cpu, round_to_float32
from lightning_qat.quantization.fake_quant.primitives import (
    broadcast_to_axis,
    check_floating_point,
    fake_quantize_primitives,
    fake_quantize_transformable,
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

    There are three ways to compute it, with the same result: ``cpu_kernel.py`` for one scale on the CPU, and
    ``primitives.py`` for everything else: many scales, other devices, ``torch.compile`` and export, and, without an
    autograd.Function, ``torch.func`` and ``torch.jit.trace``. CUDA has a native kernel, which multiplies by the
    inverse: it is not used.

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
    if axis is None and x.device.type == "cpu" and not (compiling or transformed):
        # Numbers read from tensors in CPU memory: this costs nothing, and cannot be stale as a cache of them could.
        s = scale.item() if isinstance(scale, Tensor) else round_to_float32(scale)
        z = int(zero_point.item()) if isinstance(zero_point, Tensor) else zero_point
        return fake_quantize_cpu(x, s, quant_min - z, quant_max - z)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    if axis is not None:
        scale = broadcast_to_axis(x, scale, axis)
        zero_point = broadcast_to_axis(x, zero_point, axis) if isinstance(zero_point, Tensor) else zero_point
    compute = fake_quantize_transformable if transformed else fake_quantize_primitives
    return compute(x, scale, zero_point, quant_min, quant_max)
