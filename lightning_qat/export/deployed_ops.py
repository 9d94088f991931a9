"""The two ops that quantizers become in an exported graph, and what they are in ONNX.

While a model is exported, each quantization is one op of torch. ``torch.onnx`` then translates it into QuantizeLinear
and DequantizeLinear, whatever is around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qat.quantization.fake_quant.fake_quantize_function import broadcast_to_axis, fake_quantize

USE_KEY = "lightning_qat.use"
"""The metadata of a node that says which use of a point it computes."""
NO_AXIS = -1


class DeployedOps(NamedTuple):
    """How quantizers are computed while a model is exported.

    Args:
        quantize_dequantize: called as :func:`quantize_dequantize`.
        dequantize: called as :func:`dequantize`.
    """

    quantize_dequantize: Callable[..., Any]
    dequantize: Callable[..., Any]


@torch.library.custom_op("lightning_qat::quantize_dequantize", mutates_args=())
def quantize_dequantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int, use: str
) -> Tensor:
    """Fake-quantize an activation.

    Args:
        x: float32.
        scale: float32, ``()`` or ``(channels,)``.
        zero_point: of the type of the codes.
        quant_min: smallest code.
        quant_max: largest code.
        axis: of the channels; -1 without.
        use: the name of the quantization.
    """
    return fake_quantize(x, scale, zero_point.int(), quant_min, quant_max, None if axis == NO_AXIS else axis)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int, use: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lightning_qat::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int, use: str) -> Tensor:
    """Return the weight that codes stand for.

    Args:
        codes: of one of the integer types.
        scale: float32, ``()`` or ``(channels,)``.
        zero_point: of the type of the codes.
        axis: of the channels; -1 without.
        use: the name of the quantization.
    """
    return dequantized(codes, scale, zero_point, axis, use)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int, use: str) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int, use: str) -> Tensor:
    """Compute :func:`dequantize` in plain operators."""
    along = None if axis == NO_AXIS else axis
    wide = codes.float() - broadcast_to_axis(codes, zero_point.float(), along)
    return wide * broadcast_to_axis(codes, scale, along)


CUSTOM_OPS = DeployedOps(torch.ops.lightning_qat.quantize_dequantize, torch.ops.lightning_qat.dequantize)
"""What translations() makes QuantizeLinear and DequantizeLinear of."""


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the table for ``torch.onnx.export(custom_translation_table=...)``; onnxscript has to be installed.

    Args:
        opset: of the exported graph. Torch's exporter makes opsets newer, but not older.
    """
    import onnxscript

    op = onnxscript.opset21 if opset >= 21 else onnxscript.opset19

    def marked(value: Any, use: str) -> Any:
        value.producer().metadata_props[USE_KEY] = use
        return value

    def options(axis: int) -> dict[str, int]:
        return {} if axis == NO_AXIS else {"axis": axis}

    def quantize_linear(
        x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, axis: int, use: str
    ) -> Any:
        codes = marked(op.QuantizeLinear(x, scale, zero_point, **options(axis)), use)
        return marked(op.DequantizeLinear(codes, scale, zero_point, **options(axis)), use)

    def dequantize_linear(codes: Any, scale: Any, zero_point: Any, axis: int, use: str) -> Any:
        return marked(op.DequantizeLinear(codes, scale, zero_point, **options(axis)), use)

    return {
        torch.ops.lightning_qat.quantize_dequantize.default: quantize_linear,
        torch.ops.lightning_qat.dequantize.default: dequantize_linear,
    }
