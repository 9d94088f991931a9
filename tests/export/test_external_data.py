"""Weights that a single ONNX file cannot hold go to a file beside it; tested at a lower limit (issue 15)."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lightning_qat
import lightning_qat.export.external_data as external_data
from lightning_qat.atomic_files import NotWrittenError
from lightning_qat.quantization.errors import ConfigurationError
from tests.quantization.models import ZOO, calibrated
from tests.reporting.test_result_table_processes import FORK

onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is missing")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is missing")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is missing")


def test_weights_are_written_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same proof as of one file; onnx's checker and onnxruntime read both."""
    monkeypatch.setattr(external_data, "_LARGEST_FILE", 1000)
    monkeypatch.setattr(external_data, "_SMALL", 100)
    model, args = ZOO["resnet"].make()
    calibrated(model, *args)
    path = tmp_path / "model.onnx"
    result = lightning_qat.export_onnx(model, path, args)
    names = ["model.onnx", "model.onnx.data", "model_export.json", "model_export.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert {row.equal for row in result.rows} == {1.0}
    assert not any(row.problem for row in result.outputs)
    assert result.bytes == path.stat().st_size + (tmp_path / "model.onnx.data").stat().st_size
    onnx.checker.check_model(str(path), full_check=True)
    outside = [t for t in onnx.load(path, load_external_data=False).graph.initializer if t.external_data]
    assert {t.name for t in outside} >= {"layers.0.conv1.weight.codes", "layers.1.conv2.weight.codes"}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: args[0].numpy()})
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(found, model(*args), atol=0.05)


def test_nothing_is_left_of_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_data, "_LARGEST_FILE", 1000)
    model, args = ZOO["resnet"].make()
    calibrated(model, *args)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWrittenError, match=r"model\.onnx cannot be written"):
        lightning_qat.export_onnx(model, tmp_path / "file" / "model.onnx", args)

    def invalid(*args: object, **kwargs: object) -> None:
        raise onnx.checker.ValidationError("no such op")

    monkeypatch.setattr(onnx.checker, "check_model", invalid)
    with pytest.raises(ConfigurationError, match="nothing is written: no such op"):
        lightning_qat.export_onnx(model, tmp_path / "model.onnx", args)
    assert os.listdir(tmp_path) == ["file"]


def adding(value: float) -> Any:
    """A model that adds the same number to the 2,000 elements of its input."""
    weights = onnx.numpy_helper.from_array(np.full(2000, value, np.float32), "weights")
    kinds = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2000]) for name in ("x", "y")]
    node = onnx.helper.make_node("Add", ["x", "weights"], ["y"])
    graph = onnx.helper.make_graph([node], "graph", kinds[:1], kinds[1:], [weights])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(("place", "left"), [("check", 1.0), ("first move", None), ("second move", None), ("end", 2.0)])
def test_killed_export_leaves_no_model_with_the_weights_of_another(
    tmp_path: Path, place: str, left: float | None
) -> None:
    """A real SIGKILL. The old model stays, or there is none; what is unfinished is removed by the next export."""
    path = tmp_path / "model.onnx"
    external_data.write_with_data(adding(1.0), path)

    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        replace, calls = os.replace, [place == "first move", place == "second move"]

        def move(*paths: Any) -> None:
            if calls.pop(0):
                killed()
            replace(*paths)

        os.replace = move  # type: ignore[assignment]
        if place == "check":
            external_data.check_onnx = killed
        if place == "end":
            external_data.shutil.rmtree = killed  # type: ignore[assignment]
        external_data.write_with_data(adding(2.0), path)

    process = FORK.Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*.unfinished"))) == 1
    assert path.exists() == (left is not None)
    if left is not None:
        (tensor,) = onnx.load(path).graph.initializer
        assert set(onnx.numpy_helper.to_array(tensor)) == {left}
    external_data.write_with_data(adding(3.0), path)
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"]
