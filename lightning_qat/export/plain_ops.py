"""Quantizers in plain operators of torch, for programs that are loaded where this package is not installed."""

from __future__ import annotations

from torch import Tensor

from lightning_qat.export.deployed_ops import NO_AXIS, DeployedOps, dequantized
from lightning_qat.quantization.fake_quant.fake_quantize_function import broadcast_to_axis


def quantize_dequantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int, use: str
) -> Tensor:
    """Quantize an activation to codes of an integer type, and dequantize them.

    Args:
        x: float32.
        scale: float32, ``()`` or ``(channels,)``.
        zero_point: of the type of the codes.
        quant_min: smallest code.
        quant_max: largest code.
        axis: of the channels; -1 without.
        use: the name of the quantization.
    """
    along = None if axis == NO_AXIS else axis
    scale, zero = broadcast_to_axis(x, scale, along), broadcast_to_axis(x, zero_point.float(), along)
    codes = ((x / scale).round() + zero).clamp(quant_min, quant_max).to(zero_point.dtype)
    return (codes.float() - zero) * scale


PLAIN_OPS = DeployedOps(quantize_dequantize, dequantized)
