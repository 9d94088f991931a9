"""What other packages get wrong about a graph, and how the graph is written so that they do not."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST_CODE = float(np.iinfo(np.int32).max)
"""Of a bias."""


def register_constants(graph: Any) -> None:
    """Make initializers of the constants that torch.onnx has computed and then forgotten to store, in place.

    Args:
        graph: the ``onnx_ir.Graph``.
    """
    for node in graph:
        for value in node.inputs:
            if value is None or value.const_value is None or value.producer() is not None:
                continue
            if not value.is_graph_input() and graph.initializers.get(value.name) is not value:
                taken = value.name in graph.initializers
                if taken:
                    value.name = f"{value.name}.{node.name}"
                graph.register_initializer(value)


def keep_matrix_products(graph: Any) -> None:
    """Write the bias behind a matrix product of more than two axes with two axes, in place.

    onnxruntime makes a Gemm of MatMul and Add, with Reshape nodes around it. Where int8 codes of opset 21 are in front,
    it then adds a QuantizeLinear that its own type inference refuses, and does not load the graph (issue 25526 of
    microsoft/onnxruntime). It leaves both nodes as they are where the bias is no vector.

    Args:
        graph: the ``onnx_ir.Graph``.
    """
    rows: dict[str, Any] = {}
    for node in list(graph):
        if node.op_type != "Add":
            continue
        for product, bias in ((0, 1), (1, 0)):
            matmul, vector = node.inputs[product].producer(), node.inputs[bias]
            if matmul is None or matmul.op_type != "MatMul" or not _is_quantized(matmul.inputs[0]):
                continue
            if vector.const_value is None or vector.const_value.shape.rank() != 1 or vector.producer() is not None:
                continue
            if vector.name not in rows:
                array = vector.const_value.numpy().reshape(1, -1)
                rows[vector.name] = add_initializer(graph, f"{vector.name}.row", array)
            node.replace_input_with(bias, rows[vector.name])
            break


def _is_quantized(value: Any) -> bool:
    """Whether a value with more than two axes comes from a quantizer."""
    producer = value.producer()
    return (
        producer is not None
        and producer.op_type == "DequantizeLinear"
        and value.shape is not None
        and value.shape.rank() > 2
    )


def part_large_biases(graph: Any) -> None:
    """Add the bias of a convolution behind it where onnxruntime would make a wrong number of it, in place.

    onnxruntime makes int32 codes of biases in float, with the scale of the input times that of the weight. The weight
    of a channel that has died out has a scale near zero. Then int32 does not hold the code, and onnxruntime cuts it off
    without a word. It leaves a bias alone that is added by an op of its own.

    Args:
        graph: the ``onnx_ir.Graph``.
    """
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        bias = node.inputs[2].const_value
        scale = accumulator_scale(node)
        if bias is None or scale is None or bias.shape.rank() != 1:
            continue
        if (np.abs(bias.numpy().astype(np.float64)) <= LARGEST_CODE * scale).all():
            continue
        array = bias.numpy().reshape(-1, *[1] * (node.outputs[0].shape.rank() - 2))
        held = add_initializer(graph, f"{node.inputs[2].name}.column", array)
        node.resize_inputs(2)
        result = node.outputs[0]
        add = ir.node("Add", [result, held], name=f"{node.name}.bias")
        add.outputs[0].name, add.outputs[0].type = f"{result.name}.with_bias", result.type
        add.outputs[0].shape = result.shape
        for use in list(result.uses()):
            if use.node is not add:
                use.node.replace_input_with(use.idx, add.outputs[0])
        graph.insert_after(node, add)
        for number, value in enumerate(graph.outputs):
            if value is result:
                graph.outputs[number] = add.outputs[0]
                result.name, add.outputs[0].name = add.outputs[0].name, result.name


def accumulator_scale(node: Any) -> NDArray[np.float64] | None:
    """Return the scale of the sums of a layer, ``()`` or ``(channels,)``; None if its operands are not quantized so.

    Args:
        node: a convolution or a matrix product, of ``onnx_ir``.
    """
    data, weight = (value.producer() for value in node.inputs[:2])
    if any(p is None or p.op_type != "DequantizeLinear" or p.inputs[1].const_value is None for p in (data, weight)):
        return None
    if data.inputs[1].shape.rank() != 0 or weight.inputs[0].const_value is None:
        return None
    scale: NDArray[np.float64] = (
        data.inputs[1].const_value.numpy().astype(np.float64) * weight.inputs[1].const_value.numpy()
    )
    return scale


def add_initializer(graph: Any, name: str, array: NDArray[Any]) -> Any:
    """Store a constant in a graph, and return its value.

    Args:
        graph: the ``onnx_ir.Graph``.
        name: of the constant; a number is added where it is taken.
        array: the constant.
    """
    import onnx_ir as ir

    free, number = name, 1
    while free in graph.initializers:
        free, number = f"{name}.{number}", number + 1
    tensor = ir.Tensor(array, name=free)
    value = ir.Value(name=free, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
