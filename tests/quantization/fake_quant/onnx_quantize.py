"""ONNX Runtime's QuantizeLinear and DequantizeLinear of opset 21."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from torch import Tensor

TYPES = {
    "int8": (TensorProto.INT8, np.int8),
    "uint8": (TensorProto.UINT8, np.uint8),
    "int16": (TensorProto.INT16, np.int16),
    "uint16": (TensorProto.UINT16, np.uint16),
}


def onnx_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, dtype: str, axis: int | None = None) -> np.ndarray:
    """Codes of float32 values, of the numpy type of the same name.

    Args:
        x: float32 values.
        scale: ``()``, or ``(channels,)`` with ``axis``.
        zero_point: of the same shape.
        dtype: int8, uint8, int16 or uint16.
        axis: the channel axis.
    """
    values = {"x": x.numpy(), "scale": scale.numpy(), "zero_point": zero_point.numpy().astype(TYPES[dtype][1])}
    codes: np.ndarray = _session("QuantizeLinear", dtype, axis).run(None, values)[0]
    return codes


def onnx_dequantize(
    codes: np.ndarray, scale: Tensor, zero_point: Tensor, dtype: str, axis: int | None = None
) -> np.ndarray:
    """The float32 values that codes stand for."""
    values = {"x": codes, "scale": scale.numpy(), "zero_point": zero_point.numpy().astype(TYPES[dtype][1])}
    result: np.ndarray = _session("DequantizeLinear", dtype, axis).run(None, values)[0]
    return result


@lru_cache
def _session(op: str, dtype: str, axis: int | None) -> onnxruntime.InferenceSession:
    code_type = TYPES[dtype][0]
    x, y = (TensorProto.FLOAT, code_type) if op == "QuantizeLinear" else (code_type, TensorProto.FLOAT)
    node = helper.make_node(op, ["x", "scale", "zero_point"], ["y"], **({} if axis is None else {"axis": axis}))
    shape = [] if axis is None else [None]
    inputs = [
        helper.make_tensor_value_info("x", x, None),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("zero_point", code_type, shape),
    ]
    graph = helper.make_graph([node], op, inputs, [helper.make_tensor_value_info("y", y, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
