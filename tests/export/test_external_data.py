"""Weights that a single ONNX file cannot hold go to a file beside it; tested at a lower limit (issue 15)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_qat
import lightning_qat.export.external_data as external_data
from lightning_qat.atomic_files import NotWrittenError
from lightning_qat.quantization.errors import ConfigurationError
from tests.quantization.models import ZOO, calibrated

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
