"""What cannot be exported is one clear error, and leaves no file; a wrong file is found (issue 15)."""

from __future__ import annotations

import builtins
import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_qat
import lightning_qat.export.onnx_export as onnx_export
from lightning_qat.atomic_files import NotWrittenError
from lightning_qat.export.export_errors import ExportMismatchError
from lightning_qat.export.onnx_sessions import OPTIMIZATIONS
from lightning_qat.export.verification_result import EXACT_MATMUL, ROUNDED_BIASES, ExportResult, OutputRow, QuantizerRow
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.reporting.reports import text_report
from tests.quantization.models import ZOO, Branching, Wired, calibrated

onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is missing")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is missing")
pytest.importorskip("onnxruntime", reason="the extra 'onnx' is missing")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def refused(model: nn.Module, folder: Path, *inputs: Any, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as error:
        lightning_qat.export_onnx(model, folder / "model.onnx", inputs or X, **options)
    assert not folder.exists() or not any(folder.iterdir()), "nothing is written"
    assert "\n" not in str(error.value)
    return str(error.value)


# -- bad input


def test_what_is_not_quantized_is_refused(tmp_path: Path) -> None:
    model = small()
    assert "Sequential has no fake-quants" in refused(model, tmp_path)
    insert(model, (X,))
    assert "the region Sequential is not calibrated" in refused(model, tmp_path)


def test_types_that_onnx_lacks_are_listed_with_their_points(tmp_path: Path) -> None:
    model = small()
    overrides = [{"match": "0", "weight": {"dtype": "int6"}}, {"match": "1", "activation": {"dtype": "int12"}}]
    calibrated(model, X, overrides=overrides)
    message = refused(model, tmp_path)
    assert "0.weight (int6), 1.output (int12)." in message
    assert "int8, uint8, int16, uint16, int4, uint4" in message


def test_float64_is_refused_and_float16_is_not_called_wrong(tmp_path: Path) -> None:
    """Codes of float64 data differ from those of float32; codes of float16 data are computed in float32."""
    model = small().double()
    calibrated(model, X.double())
    assert "has float64 parameters" in refused(model, tmp_path / "double", X.double())
    model = small().half()
    calibrated(model, X.half(), qconfig={"activation": {"dtype": "int16"}})
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", X.half())
    assert {row.equal for row in result.rows} == {1.0}


@pytest.mark.parametrize(("opset", "message"), [(20, "ONNX opset 20 has no quantized types"), (13, "opset 13 cannot")])
def test_opsets_without_the_types_are_refused(opset: int, message: str, tmp_path: Path) -> None:
    model = small()
    calibrated(model, X, qconfig={"activation": {"dtype": "int16"}})
    assert message in refused(model, tmp_path, opset=opset)


def test_a_branch_on_the_data_is_named_with_its_line(tmp_path: Path) -> None:
    model, args = ZOO["branching"].make()
    calibrated(model, *args)
    line = Branching.forward.__code__.co_firstlineno + 2  # if x.sum() > 0
    message = refused(model, tmp_path, *args)
    assert f"depends on the values of its tensors at tests/quantization/models.py:{line}:" in message


def test_an_op_that_onnx_cannot_express_is_named(tmp_path: Path) -> None:
    model = Wired(lambda m, x: torch.linalg.cholesky(m.fc(x.T @ x) * 0 + torch.eye(4)), fc=nn.Linear(4, 4))
    calibrated(model, X)
    message = refused(model, tmp_path)
    assert "cannot be expressed in ONNX" in message
    assert "cholesky" in message
    assert " at tests/quantization/models.py:" in message  # the forward of Wired


def test_a_result_that_torch_does_not_know_is_named(tmp_path: Path) -> None:
    """As the caches of language models."""

    class Cache:
        pass

    model = Wired(lambda m, x: (m.fc(x), Cache()), fc=nn.Linear(4, 4))
    calibrated(model, X)
    message = refused(model, tmp_path)
    assert re.search(r"Wired returns a \S*Cache, which torch.export does not know", message)
    assert "use_cache=False" in message


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *args)

    original = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", importing)
    model = small()
    calibrated(model, X)
    assert f"needs {missing}: pip install 'lightning-qat[onnx]'" in refused(model, tmp_path)


def test_the_package_is_imported_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name.partition(".")[0] not in ("onnx", "onnxscript", "onnxruntime", "onnx_ir")
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", importing)
    importlib.reload(onnx_export)


def test_a_path_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    model = small()
    calibrated(model, X)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWrittenError, match=r"model\.onnx cannot be written"):
        lightning_qat.export_onnx(model, tmp_path / "file" / "model.onnx", X)
    assert os.listdir(tmp_path) == ["file"]


def test_inputs_that_miss_the_region_are_refused(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = small()

        def forward(self, x: Tensor, use: bool = False) -> Tensor:
            y: Tensor = self.part(x) if use else x + 1.0
            return y

    model = Model()
    calibrated(model.part, X)
    assert "did not run on the example inputs" in refused(model, tmp_path)


# -- the proof


def _negated_scale(proto: Any) -> str:
    (tensor,) = [t for t in proto.graph.initializer if t.name == "1.output.scale"]
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
    return r"at 1\.output, the first quantizer that differs, \d+ of 24 codes"


def _flipped_code(proto: Any) -> str:
    (tensor,) = [t for t in proto.graph.initializer if t.name == "2.weight.codes"]
    codes = onnx.numpy_helper.to_array(tensor).copy()
    codes[0, 3] += 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(codes, tensor.name))
    return r"at 2\.weight, the first quantizer that differs, 1 of 16 codes"


def _other_weight_scale(proto: Any) -> str:
    (tensor,) = [t for t in proto.graph.initializer if t.name == "0.weight.scale"]
    scale = onnx.numpy_helper.to_array(tensor).copy()
    scale[5] = np.nextafter(scale[5], np.float32(1))
    tensor.CopyFrom(onnx.numpy_helper.from_array(scale, tensor.name))
    return r"at 0\.weight, the first quantizer that differs, the scale or the zero point"


@pytest.mark.parametrize("damage", [_negated_scale, _flipped_code, _other_weight_scale])
def test_a_file_with_other_codes_is_found(damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first quantizer that differs is named. The file stays, to look at."""
    model = small()
    calibrated(model, X)
    messages = []
    write = onnx_export.write_onnx

    def damaged(proto: Any, path: Any) -> Path:
        messages.append(damage(proto))
        return write(proto, path)

    monkeypatch.setattr(onnx_export, "write_onnx", damaged)
    with pytest.raises(ExportMismatchError) as error:
        lightning_qat.export_onnx(model, tmp_path / "model.onnx", X)
    assert re.search(messages[0], str(error.value)), error.value
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    lightning_qat.export_onnx(model, tmp_path / "model.onnx", X, verify=False)


def test_a_wrong_op_between_quantizers_shows_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantizers themselves are right: only their codes behind the op differ, by many steps."""
    model = small()
    calibrated(model, X)
    write = onnx_export.write_onnx

    def damaged(proto: Any, path: Any) -> Path:
        (relu,) = [node for node in proto.graph.node if node.op_type == "Relu"]
        relu.op_type = "Exp"
        return write(proto, path)

    monkeypatch.setattr(onnx_export, "write_onnx", damaged)
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", X)
    (row,) = [row for row in result.rows if row.point == "1.output"]
    assert row.equal == 1.0
    assert (row.steps_behind_op or 0) > 10
    assert (row.equal_behind_op or 0) < 0.5
    assert all(o.difference > 5 * o.quantization for o in result.outputs)


# -- the report


def test_report_is_written_beside_the_file(tmp_path: Path) -> None:
    model = small()
    region = calibrated(model, X)
    result = lightning_qat.export_onnx(model, tmp_path / "digits.onnx", X)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits.onnx", "digits_export.json", "digits_export.txt"]
    stored = json.loads((tmp_path / "digits_export.json").read_text())
    assert [row["point"] for row in stored["rows"]] == list(region.points)
    assert {row["optimization"] for row in stored["outputs"]} == set(OPTIMIZATIONS)
    assert stored["bytes"] == (tmp_path / "digits.onnx").stat().st_size
    text = (tmp_path / "digits_export.txt").read_text()
    assert text.strip() == text_report(result).strip()
    assert all(name in text for name in region.points)
    codes = sum(row.codes for row in result.rows)
    assert f"all {codes} codes of {len(region.points)} quantizers equal those of the region" in text


def outputs(
    off: float, basic: float, full: float, exact: float, problem: str = "", unrounded: float | None = None
) -> tuple[OutputRow, ...]:
    biases = basic if unrounded is None else unrounded
    levels = {"off": off, "basic": basic, "basic, float biases": biases, "full": full, "full, exact MatMul": exact}
    assert levels.keys() == OPTIMIZATIONS.keys()
    return tuple(
        OutputRow("y", name, None, None, 9.0, 9.0, value, 0.01, problem if name.startswith("full") else "")
        for name, value in levels.items()
    )


@pytest.mark.parametrize(
    ("rows", "said", "unsaid"),
    [
        (outputs(1e-7, 1e-7, 1e-7, 1e-7), "", "optimization changes"),
        (outputs(2e-3, 2e-3, 5e-3, 5e-3), "", "optimization changes"),  # flips of single codes
        (outputs(1e-7, 1e-7, 1e-5, 1e-5), "", "optimization changes"),  # nothing beside quantization
        (outputs(1e-6, 1e-6, 0.02, 1e-6), f'add_session_config_entry("{EXACT_MATMUL}", "1")', "Basic"),
        (outputs(1e-6, 1e-6, 0.02, 0.02), "Full optimization changes more than basic", "The cause"),
        (outputs(1e-6, 0.5, 0.5, 0.5), "Basic optimization changes the result", "Full"),
        (outputs(1e-6, 0.5, 0.5, 0.5), "Basic optimization changes the result", "The cause"),
        (outputs(1e-6, 0.5, 0.5, 0.5, "", 1e-6), f'disabled_optimizers=["{ROUNDED_BIASES}"]', "MatMulNBits"),
        (
            outputs(0, 0, 0, 0, "output_dtype INT8 does not match y_zero_point type UINT8"),
            "export with opset=20",
            "cannot run",
        ),
        (outputs(0, 0, 0, 0, "no such op"), "cannot run the file with optimizations full: no such op", "opset=20"),
    ],
)
def test_note_names_what_optimizations_change(rows: tuple[OutputRow, ...], said: str, unsaid: str) -> None:
    row = QuantizerRow("a", "activation", "int8", 3, 1.0, 1.0, 0)
    note = ExportResult((row,), outputs=rows, file="model.onnx").note
    assert said in note
    assert unsaid not in note.replace("optimizations off", "")


def test_16_bit_activations_in_front_of_a_matmul_keep_their_precision_only_on_request(tmp_path: Path) -> None:
    """onnxruntime computes such a MatMul with 8-bit inputs by default. The report says so, with the setting."""
    model, args = ZOO["attention_weights"].make()
    calibrated(model, *args, qconfig={"activation": {"dtype": "int16", "observer": "minmax"}})
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", args)
    worst = {row.optimization: row.difference for row in result.outputs[::2]}
    assert worst["full, exact MatMul"] <= 1e-6
    assert (worst["full"] > 1e-4) == (EXACT_MATMUL in result.note)
