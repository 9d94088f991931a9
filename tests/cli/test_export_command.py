"""``python -m lightning_qat export`` writes the model of a checkpoint, and its proof (issue 15)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_qat import Calibration, QuantizationAwareTraining, load_quantized, read_encodings
from lightning_qat.cli.command_line import main
from tests.harness.classifier import Classifier, loader

pytest.importorskip("onnx", reason="the extra 'onnx' is missing")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is missing")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is missing")

SCRIPT = """
import sys
from pathlib import Path
from typing import Any
from lightning.pytorch import Trainer
from lightning_qat import Calibration, QuantizationAwareTraining
from tests.harness.classifier import Classifier, loader

trainer = Trainer(
    callbacks=[QuantizationAwareTraining(), Calibration(batches=2)], max_epochs=1, accelerator="cpu",
    default_root_dir=sys.argv[1], logger=False, enable_checkpointing=False, enable_progress_bar=False,
)
trainer.fit(Classifier(), loader(), loader(16))
Path(sys.argv[1], "trained").touch()
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    trainer = Trainer(
        callbacks=[QuantizationAwareTraining(), Calibration(batches=2)],
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path / "run",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), loader(), loader(16))
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    return tmp_path / "best.ckpt"


def test_export_writes_the_model_of_a_checkpoint(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file computes what load_quantized gives for the checkpoint; nothing is trained."""
    (tmp_path / "train.py").write_text(SCRIPT)
    command = ["export", str(tmp_path / "train.py"), str(tmp_path / "out"), "--format", "onnx", "--dynamic-batch"]
    assert main([*command, "--ckpt_path", str(checkpoint), f"--output={tmp_path / 'files'}"]) == 0
    assert sorted(p.name for p in (tmp_path / "files").iterdir()) == [
        "model.onnx", "model_export.json", "model_export.txt",
    ]  # fmt: skip
    assert not (tmp_path / "out" / "trained").exists()
    stored = json.loads((tmp_path / "files" / "model_export.json").read_text())
    assert {row["equal"] for row in stored["rows"]} == {1.0}
    (row,) = [row for row in stored["task"] if row["metric"] == "val_loss"]
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    (expected,) = trainer.validate(load_quantized(Classifier, checkpoint), loader(16), verbose=False)
    assert row["fake_quant"] == pytest.approx(expected["val_loss"], abs=1e-6)
    assert row["onnxruntime"] == pytest.approx(row["fake_quant"], abs=0.05)
    assert "val_loss: " in " ".join((tmp_path / "files" / "model_export.txt").read_text().split())
    assert "equal those of the region" in " ".join(capsys.readouterr().out.split())
    model = load_quantized(Classifier, checkpoint).eval()
    images = next(iter(loader(5)))[0][:5]
    session = onnxruntime.InferenceSession(str(tmp_path / "files" / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(images), atol=0.05)


def test_export_writes_a_program(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = ["export", str(tmp_path / "train.py"), str(tmp_path / "out"), "--format", "program", "--dynamic-batch"]
    assert main([*command, "--ckpt_path", str(checkpoint), f"--output={tmp_path / 'files'}"]) == 0
    assert [p.name for p in (tmp_path / "files").iterdir()] == ["model.pt2"]
    assert "its outputs equal those of the model, bit for bit" in " ".join(capsys.readouterr().out.split())
    model = load_quantized(Classifier, checkpoint).eval()
    images = next(iter(loader(5)))[0][:5]
    program = torch.export.load(tmp_path / "files" / "model.pt2")
    with torch.no_grad():
        assert torch.equal(program.module()(images), model(images))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("qnn", "model.encodings"), ("horizon", "quant_config.json"), ("tidl", "quant_params.prototxt")],
)
def test_export_writes_encodings(
    kind: Any, name: str, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = ["export", str(tmp_path / "train.py"), str(tmp_path / "out"), "--format", kind]
    assert main([*command, "--ckpt_path", str(checkpoint), f"--output={tmp_path / 'files'}"]) == 0
    assert [p.name for p in (tmp_path / "files").iterdir()] == [name]
    assert read_encodings(tmp_path / "files" / name, kind)
    assert "It has no place for" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_exported_is_one_line(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = ["export", str(tmp_path / "train.py"), str(tmp_path / "out"), "--ckpt_path", str(checkpoint)]
    assert main([*command, "--opset", "13", f"--output={tmp_path / 'files'}"]) == 2
    assert "opset 13 cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "files").exists()
