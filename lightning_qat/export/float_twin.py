"""The exported graph without its quantizers: what it is smaller and faster than."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_qat.export.onnx_sessions import session

_SECONDS = 0.4
"""How long each of the two graphs is timed."""


def float_twin(proto: Any) -> Any:
    """Return a graph with weights in float, and no quantizers.

    Args:
        proto: the exported graph.
    """
    import onnx
    from onnx import helper, numpy_helper, reference

    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    made_by = {name: node for node in proto.graph.node for name in node.output}
    nodes, constants = [], []
    same: dict[str, str] = {}
    """The value in float of each dequantized activation."""
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            source = made_by.get(node.input[0])
            if source is not None:
                same[node.output[0]] = same.get(source.input[0], source.input[0])
                continue
            alone = helper.make_graph(
                [node],
                "weight",
                [],
                [helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)],
                [initializers[name] for name in node.input],
            )
            model = helper.make_model(alone, opset_imports=proto.opset_import, ir_version=proto.ir_version)
            (value,) = reference.ReferenceEvaluator(model).run(None, {})
            constants.append(numpy_helper.from_array(np.asarray(value, np.float32), node.output[0]))
        elif node.op_type != "QuantizeLinear":
            copied = type(node)()
            copied.CopyFrom(node)
            for i, name in enumerate(copied.input):
                copied.input[i] = same.get(name, name)
            nodes.append(copied)
    outputs = {value.name for value in proto.graph.output}
    nodes += [helper.make_node("Identity", [old], [new]) for new, old in same.items() if new in outputs]
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    graph = helper.make_graph(
        nodes, "in_float", proto.graph.input, proto.graph.output, [*kept, *(c for c in constants if c.name in used)]
    )
    return helper.make_model(
        graph, opset_imports=proto.opset_import, ir_version=proto.ir_version, functions=proto.functions
    )


def milliseconds(protos: tuple[Any, Any], inputs: Mapping[str, NDArray[Any]]) -> tuple[float, float]:
    """Return the time that onnxruntime takes for each of two graphs, in milliseconds: the least of several runs.

    The runs alternate, so that other work on the machine slows both.

    Args:
        protos: the graphs.
        inputs: by name.
    """
    runs = [session(proto, inputs, "full") for proto in protos]
    least = [float("inf"), float("inf")]
    end = time.perf_counter() + len(runs) * _SECONDS
    while time.perf_counter() < end or max(least) == float("inf"):  # once at least, however busy the machine is
        for number, run in enumerate(runs):
            start = time.perf_counter()
            run()
            least[number] = min(least[number], time.perf_counter() - start)
    return 1000 * least[0], 1000 * least[1]
