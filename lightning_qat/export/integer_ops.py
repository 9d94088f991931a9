"""Which ops onnxruntime computes on integers, and why it does not compute the others so.

The causes are the conditions of onnxruntime's own graph transformers (``qdq_selectors.cc``, ``qdq_s8_to_u8.cc``), read
from the graph that is exported.
"""

from __future__ import annotations

import re
from typing import Any

from lightning_qat.export.onnx_sessions import optimized
from lightning_qat.export.verification_result import OpRow

_KINDS = {
    "Conv": "convolution",
    "ConvTranspose": "convolution",
    "MatMul": "matrix product",
    "Gemm": "matrix product",
    "Add": "addition",
}
_INTEGER = frozenset(
    ["QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QLinearAdd"]
)
_BITS = {"INT16": 16, "UINT16": 16, "INT4": 4, "UINT4": 4}


def integer_ops(proto: Any, source: Any) -> tuple[OpRow, ...]:
    """Look at the convolutions, matrix products and additions that onnxruntime computes on this machine's CPU.

    The addition of a bias to a matrix product is part of that product.

    Args:
        proto: the exported graph.
        source: what onnxruntime opens: the graph, or the path of its file.

    Returns:
        One row per op, in the order of the graph. Empty if onnxruntime does not load the graph.
    """
    found = optimized(source)
    if found is None:
        return ()
    on_integers = {_origin(node.name) for node in found.graph.node if node.op_type in _INTEGER}
    graph = _Graph(proto.graph)
    rows = []
    for node in proto.graph.node:
        if node.op_type not in _KINDS or graph.adds_bias(node):
            continue
        integer = node.name in on_integers
        cause = "" if integer else graph.cause(node) or "onnxruntime does not say why"
        rows.append(OpRow(node.name, _KINDS[node.op_type], integer, cause))
    return tuple(rows)


def _origin(name: str) -> str:
    """The name of the node that onnxruntime made a node of."""
    return re.sub(r"(_token_\d+|/\w+/?)+$", "", name)


class _Graph:
    def __init__(self, graph: Any) -> None:
        self.producers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}

    def adds_bias(self, node: Any) -> bool:
        """Whether a node is part of the convolution or matrix product in front of it."""
        if node.op_type != "Add" or not any(name in self.initializers for name in node.input):
            return False
        producers = [self.producers.get(name) for name in node.input]
        return any(p is not None and p.op_type != "Add" and p.op_type in _KINDS for p in producers)

    def cause(self, node: Any) -> str:
        """Why a node is no integer op; empty if no condition is known that it does not meet."""
        dequantize = [self._dequantize(name) for name in node.input[:2]]
        for number, producer in enumerate(dequantize):
            if producer is None or producer.op_type != "DequantizeLinear":
                return f"its input {number} is in float ({self._maker(producer, node.input[number])})"
        types = [self._type(producer) for producer in dequantize]
        wide = next((kind for kind in types if kind in _BITS), None)
        if wide is not None:
            return f"an input has {_BITS[wide]}-bit codes, and onnxruntime's integer ops have 8 bits"
        kind = _KINDS[node.op_type]
        if kind == "convolution" and self._followed_by_bias(node):
            return "int32 does not hold its bias, as the weight of a channel is near zero"
        if node.op_type == "ConvTranspose":
            return "onnxruntime has no integer transposed convolution"
        if kind == "addition" and types[0] != types[1]:
            return f"its inputs have different types, {types[0].lower()} and {types[1].lower()}"
        if kind != "addition" and types[0] == "INT8" and types[1] != "INT8":
            return "a signed input needs a signed weight"
        return self._behind(node, types[0]) or self._before(node, types)

    def _before(self, node: Any, types: list[str]) -> str:
        if node.op_type == "Gemm" and len(node.input) > 2:
            bias = self.producers.get(node.input[2])
            if bias is None or bias.op_type != "DequantizeLinear":
                return "its bias is in float: a profile with 'bias: int32' quantizes it"
        if types[0] == "INT8" or (node.op_type == "Add" and "INT8" in types):
            return (
                "its input is int8: the integer ops of this CPU take uint8, and onnxruntime makes uint8 only of some "
                "codes that one op reads. Quantize activations as uint8 (scheme: affine)"
            )
        return ""

    def _behind(self, node: Any, kind: str) -> str:
        """What stands between the result and its quantizer."""
        floats_allowed = node.op_type in ("MatMul", "Gemm")
        last, clip = node, None
        readers = self.readers.get(node.output[0], [])
        if node.op_type == "MatMul" and self._followed_by_bias(node):
            return ""  # the product has a float result
        if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
            clip = readers[0]
            last, readers = clip, self.readers.get(clip.output[0], [])
        quantizers = [reader for reader in readers if reader.op_type == "QuantizeLinear"]
        if len(quantizers) != 1 or len(readers) != 1 or last.output[0] in self.outputs:
            if floats_allowed and not quantizers and clip is None:
                return ""
            names = ", ".join(sorted({reader.op_type for reader in readers})) or "the end of the model"
            return f"its result is not quantized right behind it, but read by {names}"
        made = self._type(quantizers[0])
        if made in _BITS:
            return f"its result has {_BITS[made]}-bit codes, and onnxruntime's integer ops have 8 bits"
        if made != kind:
            return f"its result is {made.lower()} and its input {kind.lower()}"
        if clip is not None and not self._is_lowest(quantizers[0], made):
            return (
                f"{clip.op_type} stands between it and the quantizer: onnxruntime drops it only where the lowest code "
                "stands for 0, as with uint8 activations (scheme: affine)"
            )
        return ""

    def _followed_by_bias(self, node: Any) -> bool:
        readers = self.readers.get(node.output[0], [])
        return len(readers) == 1 and self.adds_bias(readers[0])

    def _dequantize(self, name: str) -> Any:
        """The node that makes a value; in front of a transposed weight, the node in front."""
        node = self.producers.get(name)
        if node is not None and node.op_type == "Transpose":
            before = self.producers.get(node.input[0])
            if before is not None and before.op_type == "DequantizeLinear" and before.input[0] in self.initializers:
                return before
        return node

    def _is_lowest(self, quantize: Any, kind: str) -> bool:
        from onnx import numpy_helper

        zero = int(numpy_helper.to_array(self.initializers[quantize.input[2]]))
        return zero == (-128 if kind == "INT8" else 0)

    def _type(self, node: Any) -> str:
        from onnx import TensorProto

        return str(TensorProto.DataType.Name(self.initializers[node.input[2]].data_type))

    def _maker(self, producer: Any, name: str) -> str:
        return name if producer is None else f"from {producer.name}"
