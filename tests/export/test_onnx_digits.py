"""A trained classifier of the scanned digits keeps its accuracy in onnxruntime, and shrinks (issue 15)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lightning_qat
from tests.harness.small_digits import MEAN, STD, Digits, digits

onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is missing")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is missing")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is missing")


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return (images - MEAN) / STD, labels


@pytest.fixture(scope="module")
def state(data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Trained in float for three epochs."""
    torch.manual_seed(0)
    images, labels = data
    model = Digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(3):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(
    ("qconfig", "overrides"),
    [
        ({"activation": {"dtype": "int8"}}, []),
        ({"activation": {"dtype": "int16"}}, []),
        ({"activation": {"dtype": "uint8", "scheme": "affine"}}, []),
        ({}, [{"match": "conv2", "weight": {"dtype": "int16"}}, {"match": "relu_0", "activation": {"dtype": "int16"}}]),
    ],
    ids=["int8", "int16", "uint8 affine", "mix"],
)
def test_accuracy_is_that_of_fake_quant(
    qconfig: dict[str, Any],
    overrides: list[dict[str, Any]],
    data: tuple[Tensor, Tensor],
    state: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    """On all 1797 digits, with onnxruntime as users run it: within 0.1 points, after three steps of QAT."""
    images, labels = data
    model = Digits()
    model.load_state_dict(state)
    region = lightning_qat.insert(model, (images[:64],), qconfig=qconfig, overrides=overrides)
    lightning_qat.calibrate(region, [images[:256]])
    region.set_state("quantize")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for batch in torch.arange(192).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    path = tmp_path / "digits.onnx"
    result = lightning_qat.export_onnx(model, path, images[:64], dynamic_shapes=({0: "batch"},))
    assert {row.equal for row in result.rows} == {1.0}
    assert set(result.folded) == {"bn1", "bn2"}
    assert "optimization changes" not in result.note, "codes that flip are no fault"
    model.eval()
    with torch.no_grad():
        expected = model(images).numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    accuracy = [(scores.argmax(1) == labels.numpy()).mean() for scores in (found, expected)]
    assert accuracy[1] > 0.95
    assert abs(accuracy[0] - accuracy[1]) <= 0.001
    held = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.name.endswith(".codes")]
    weights = [p for name, p in model.named_parameters() if p.dim() > 1 and "_quantization" not in name]
    assert sum(codes.size for codes in held) == sum(weight.numel() for weight in weights)
    assert sum(codes.nbytes for codes in held) <= sum(w.numel() * 4 for w in weights) / (2 if overrides else 4)
    assert path.stat().st_size < sum(w.numel() * 4 for w in weights) or overrides
    assert np.isfinite(found).all()
