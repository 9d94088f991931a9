"""Running an exported graph with onnxruntime, and what its optimizations make of the graph."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lightning_qat.export.verification_result import EXACT_MATMUL

OPTIMIZATIONS: Mapping[str, tuple[str, dict[str, str]]] = {
    "off": ("ORT_DISABLE_ALL", {}),
    "basic": ("ORT_ENABLE_BASIC", {}),
    "full": ("ORT_ENABLE_ALL", {}),
    "full, exact MatMul": ("ORT_ENABLE_ALL", {EXACT_MATMUL: "1"}),
}
"""Settings of onnxruntime: the level of its optimizations, and entries of the session configuration."""


def run(proto: Any, inputs: Mapping[str, NDArray[Any]], optimization: str) -> list[NDArray[Any]]:
    """Run a graph with onnxruntime on the CPU.

    Args:
        proto: the graph.
        inputs: by name.
        optimization: one of :data:`OPTIMIZATIONS`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    level, entries = OPTIMIZATIONS[optimization]
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    values: list[NDArray[Any]] = session.run(None, {name: v for name, v in inputs.items() if name in wanted})
    return values


def integer_ops(proto: Any) -> tuple[tuple[str, int, int], ...]:
    """Count the ops that onnxruntime computes on integers on this machine's CPU, with all optimizations.

    Args:
        proto: the graph.

    Returns:
        For convolutions, matrix products and additions: the name, how many are integer ops, and how many there are.
        Empty if onnxruntime does not load the graph.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        try:
            onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception:  # the row of this setting says why
            return ()
        counts = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    found = []
    for name, (on_integers, in_float) in _OPS.items():
        integer = sum(counts[kind] for kind in on_integers)
        found.append((name, integer, integer + sum(counts[kind] for kind in in_float)))
    return tuple(row for row in found if row[2])


_OPS = {
    "convolutions": (("QLinearConv", "ConvInteger"), ("Conv", "FusedConv", "ConvTranspose", "NhwcFusedConv")),
    "matrix products": (
        ("QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
        ("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits"),
    ),
    "additions": (("QLinearAdd",), ("Add",)),
}
"""Ops of onnxruntime that compute on integers, and those that compute the same in float."""
