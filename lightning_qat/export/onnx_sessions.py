"""Running an exported graph with onnxruntime, and what its optimizations make of the graph."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lightning_qat.export.verification_result import EXACT_MATMUL, ROUNDED_BIASES

OPTIMIZATIONS: Mapping[str, tuple[str, dict[str, str], list[str]]] = {
    "off": ("ORT_DISABLE_ALL", {}, []),
    "basic": ("ORT_ENABLE_BASIC", {}, []),
    "basic, float biases": ("ORT_ENABLE_BASIC", {}, [ROUNDED_BIASES]),
    "full": ("ORT_ENABLE_ALL", {}, []),
    "full, exact MatMul": ("ORT_ENABLE_ALL", {EXACT_MATMUL: "1"}, []),
}
"""Settings of onnxruntime: the level of its optimizations, entries of the session configuration, and optimizers that
are switched off."""


def run(proto: Any, inputs: Mapping[str, NDArray[Any]], optimization: str) -> list[NDArray[Any]]:
    """Run a graph with onnxruntime on the CPU.

    Args:
        proto: the graph, or the path of its file.
        inputs: by name.
        optimization: one of :data:`OPTIMIZATIONS`.
    """
    return session(proto, inputs, optimization)()


def session(proto: Any, inputs: Mapping[str, NDArray[Any]], optimization: str) -> Callable[[], list[NDArray[Any]]]:
    """Load a graph, and return a function that runs it.

    Args:
        proto: the graph, or the path of its file.
        inputs: by name.
        optimization: one of :data:`OPTIMIZATIONS`.
    """
    loaded = load(proto, optimization)
    wanted = {value.name for value in loaded.get_inputs()}
    fed = {name: v for name, v in inputs.items() if name in wanted}
    return lambda: list(loaded.run(None, fed))


def load(proto: Any, optimization: str = "full", optimized: Path | None = None) -> Any:
    """Load a graph, and return the ``onnxruntime.InferenceSession``.

    Args:
        proto: the graph, or the path of its file.
        optimization: one of :data:`OPTIMIZATIONS`.
        optimized: the file in which onnxruntime stores what it makes of the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    level, entries, without = OPTIMIZATIONS[optimization]
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(
        _loadable(proto), options, providers=["CPUExecutionProvider"], disabled_optimizers=without
    )


def _loadable(proto: Any) -> str | bytes:
    """What onnxruntime opens: the bytes of a graph, or the path of a file with weights beside it."""
    if isinstance(proto, Path):
        return str(proto)
    content: bytes = proto.SerializeToString()
    return content


def optimized(proto: Any) -> Any | None:
    """Return the graph that onnxruntime makes of a graph with all optimizations; None if it does not load it."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "optimized.onnx"
        try:
            load(proto, optimized=file)
        except Exception:  # the row of this setting says why
            return None
        return onnx.load(file, load_external_data=False)
