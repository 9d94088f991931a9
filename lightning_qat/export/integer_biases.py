"""Biases as int32 codes with the scale of the input times that of the weight, for hardware that adds them so.

Source of the scheme: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (2018), section 2.4.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np

from lightning_qat.export.deployed_ops import USE_KEY
from lightning_qat.export.graph_repairs import LARGEST_CODE, accumulator_scale, add_initializer

_LAYERS = ("Conv", "ConvTranspose", "Gemm")


def quantize_biases(graph: Any, uses: Container[str]) -> None:
    """Make int32 codes of the biases of layers, in place; those whose codes int32 does not hold stay in float.

    Args:
        graph: the ``onnx_ir.Graph``.
        uses: the quantizations of the weights of the layers for which it is done; others do no harm.
    """
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type not in _LAYERS or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        bias, scale = node.inputs[2].const_value, accumulator_scale(node)
        if bias is None or scale is None or bias.shape.rank() != 1:
            continue
        if node.inputs[1].producer().metadata_props.get(USE_KEY) not in uses:
            continue
        codes = np.rint(bias.numpy().astype(np.float64) / scale)
        if scale.size not in (1, codes.size) or not (np.abs(codes) <= LARGEST_CODE).all():
            continue
        name = node.inputs[2].name
        name = name if name.endswith(".bias") else f"{node.name}.bias"
        held = [add_initializer(graph, f"{name}.codes", codes.astype(np.int32))]
        held.append(add_initializer(graph, f"{name}.scale", scale.astype(np.float32)))
        axis = {} if scale.ndim == 0 else {"axis": 0}
        dequantize = ir.node("DequantizeLinear", held, attributes=axis, name=f"{name}.DequantizeLinear")
        dequantize.outputs[0].name = f"{name}.dequantized"
        dequantize.outputs[0].type, dequantize.outputs[0].shape = node.inputs[2].type, node.inputs[2].shape
        graph.insert_before(node, dequantize)
        node.replace_input_with(2, dequantize.outputs[0])
