"""Codes that ops only move get a QuantizeLinear and a DequantizeLinear behind the op, with the scale in front of it.

A region quantizes a tensor where it is computed, in front of a reshape. In QDQ graphs, though, an op that only moves
data stands between the two nodes as every other op does, and then moves codes. This changes no value: quantizing whole
multiples of a scale by the same scale returns the same codes.

It matters, as onnxruntime adds these nodes itself where they are missing, with another type of codes. In some versions
int8 becomes uint8, and negative values are lost (issue 27845 of microsoft/onnxruntime). Version 1.32 does not load such
int8 graphs of opset 21 (issue 25526).
"""

from __future__ import annotations

from typing import Any

_MOVING = frozenset(
    [
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Flatten",
        "Gather",
        "Expand",
        "Tile",
        "MaxPool",
        "GlobalMaxPool",
        "ReduceMax",
        "ReduceMin",
    ]
)
"""Ops of ONNX whose result holds values of the first input only."""
_LEAST_BITS = 8
"""These ops have no 4-bit types."""


def quantize_moved(graph: Any) -> None:
    """Add the nodes behind every op that only moves codes of one scale, in place.

    Args:
        graph: the ``onnx_ir.Graph``; chains of such ops are followed.
    """
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type not in _MOVING or node.domain not in ("", "ai.onnx"):
            continue
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if source is None or source.op_type != "DequantizeLinear" or source.inputs[1].shape.rank() != 0:
            continue
        if source.inputs[2].dtype.bitwidth < _LEAST_BITS:
            continue
        moved, (codes, scale, zero_point) = node.outputs[0], source.inputs
        readers = [use for use in moved.uses() if use.node.op_type != "QuantizeLinear"]
        if not readers:
            continue
        quantize = ir.node("QuantizeLinear", [moved, scale, zero_point], name=f"{node.name}.QuantizeLinear")
        quantize.outputs[0].name = f"{moved.name}.codes"
        quantize.outputs[0].type, quantize.outputs[0].shape = codes.type, moved.shape
        dequantize = ir.node(
            "DequantizeLinear", [quantize.outputs[0], scale, zero_point], name=f"{node.name}.DequantizeLinear"
        )
        dequantize.outputs[0].name = f"{moved.name}.dequantized"
        dequantize.outputs[0].type, dequantize.outputs[0].shape = moved.type, moved.shape
        for use in readers:
            use.node.replace_input_with(use.idx, dequantize.outputs[0])
        graph.insert_after(node, [quantize, dequantize])
