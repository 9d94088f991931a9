"""OpenVINO's front end opens exported files, and its CPU plugin gives the classes of fake-quant (issue 15, line 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_qat
from tests.harness.small_digits import MEAN, STD, Digits, digits

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install openvino")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is missing")


@pytest.mark.parametrize(
    ("qconfig", "profile"),
    [
        ({"activation": {"dtype": "int8"}}, None),
        ({"activation": {"dtype": "int16"}}, None),
        ({"activation": {"dtype": "uint8", "scheme": "affine"}}, "onnxruntime_qdq"),
    ],
    ids=["int8", "int16", "uint8 affine"],
)
def test_openvino_computes_what_fake_quant_computes(
    qconfig: dict[str, Any], profile: str | None, tmp_path: Path
) -> None:
    """Outputs within 1 % (measured: 1e-7 at int8, 0.1 % under the profile, 0.5 % at int16), and the same classes."""
    torch.manual_seed(0)
    images = (digits()[0][:200] - MEAN) / STD
    model = Digits().eval()
    region = lightning_qat.insert(model, (images[:64],), qconfig=qconfig, profile=profile)
    lightning_qat.calibrate(region, [images])
    path = tmp_path / "digits.onnx"
    lightning_qat.export_onnx(model, path, images[:64], dynamic_shapes=({0: "batch"},))
    read = openvino.Core().read_model(str(path))
    compiled = openvino.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled(images.numpy())[0])
    with torch.no_grad():
        quantized = model(images)
    assert float((found - quantized).norm() / quantized.norm()) < 0.01
    assert float((found.argmax(1) == quantized.argmax(1)).float().mean()) >= 0.98
