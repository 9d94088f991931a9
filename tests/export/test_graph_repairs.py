"""The graph is written so that what other packages get wrong does no harm (issue 15)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_qat
from lightning_qat.export.graph_repairs import register_constants
from tests.quantization.models import MINMAX, Wired, calibrated

onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is missing")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is missing")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is missing")

TOKENS = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def computed(path: Path, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])  # with all optimizations
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    return found


REST = [pytest.param("int8", 20, marks=pytest.mark.full), pytest.param("int16", 21, marks=pytest.mark.full)]


@pytest.mark.parametrize(("dtype", "opset"), [("int8", 21), *REST])
def test_products_of_more_than_two_axes_are_loaded_with_all_optimizations(
    dtype: str, opset: int, tmp_path: Path
) -> None:
    """onnxruntime 1.32 refused such int8 files of opset 21 with fixed shapes.

    Siblings: several layers on one input, one that ends the model, biases that two layers share, four axes.
    """
    torch.manual_seed(0)
    model = Wired(
        lambda m, x: m.b(torch.relu(m.a(x)) + m.c(x)) + m.d(x[:, None])[:, 0],
        a=nn.Linear(8, 8),
        b=nn.Linear(8, 8),
        c=nn.Linear(8, 8),
        d=nn.Linear(8, 8),
    )
    model.c.bias = model.a.bias  # type: ignore[union-attr]
    calibrated(model, TOKENS, qconfig={**MINMAX, "activation": {"observer": "minmax", "dtype": dtype}})
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", TOKENS, opset=opset)
    assert {row.equal for row in result.rows} == {1.0}
    assert not any(row.problem for row in result.outputs)
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(computed(tmp_path / "model.onnx", TOKENS), model(TOKENS), atol=0.05)
    biases = [t for t in onnx.load(tmp_path / "model.onnx").graph.initializer if ".bias" in t.name]
    assert len(biases) == 3, "a shared bias is stored once"


def test_constants_that_are_not_stored_become_initializers() -> None:
    """torch.onnx leaves such constants behind where its own optimizations replace a node."""
    ir = pytest.importorskip("onnx_ir")
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    least = ir.Value(
        name="least",
        shape=ir.Shape([]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.Tensor(np.float32(0.5).reshape(()), name="least"),
    )
    node = ir.node("Max", [x, least], name="max")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", x.type, x.shape
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 21}, name="graph")
    register_constants(graph)
    register_constants(graph)  # nothing is stored twice
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": np.array([0.0, 1.0], np.float32)})[0], [0.5, 1.0])


def test_codes_that_are_picked_or_repeated_are_quantized_again(tmp_path: Path) -> None:
    """An op behind them is then an integer op, as for codes that are reshaped."""
    model = Wired(lambda m, x: m.b(torch.relu(m.a(x))[:, 0].expand(2, -1)), a=nn.Linear(8, 8), b=nn.Linear(8, 4))
    affine = {"activation": {"observer": "minmax", "dtype": "uint8", "scheme": "affine"}}
    calibrated(model, TOKENS, qconfig=affine, profile="onnxruntime_qdq")
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", TOKENS)
    assert result.integer_counts()["matrix product"] == (2, 2)
