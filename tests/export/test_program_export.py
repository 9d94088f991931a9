"""``export_program`` gives a program that computes what the region computes, without this package (issue 15)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lightning_qat
import lightning_qat.export.program_export as program_export
from lightning_qat.atomic_files import NotWrittenError
from lightning_qat.export.deployed_form import DeployedForm, deployed_form
from lightning_qat.export.export_errors import ExportMismatchError
from lightning_qat.quantization.errors import ConfigurationError
from tests.quantization.models import MINMAX, ZOO, Branching, Wired, calibrated

IMAGE = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
RUNNER = """
import sys

sys.modules["lightning_qat"] = sys.modules["lightning"] = None  # importing them fails
import torch

program = torch.export.load(sys.argv[1])
data = torch.load(sys.argv[2], weights_only=True)
torch.save(program.module()(*data), sys.argv[3])
assert not any(name.partition(".")[0] in ("lightning_qat", "onnx") and module for name, module in sys.modules.items())
"""


def computed(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(*args)) if isinstance(leaf, Tensor)]


def test_program_is_loaded_and_equal_where_the_package_is_missing(tmp_path: Path) -> None:
    """Another process, in which lightning_qat cannot be imported, computes the same bits from other data."""
    model, args = ZOO["resnet"].make()
    calibrated(model, *args)
    lightning_qat.export_program(model, args, tmp_path / "model.pt2", dynamic_shapes=({0: "batch"},))
    (tmp_path / "run.py").write_text(RUNNER)
    x = torch.randn(7, *args[0].shape[1:], generator=torch.Generator().manual_seed(1))
    torch.save([x], tmp_path / "data.pt")
    command = [sys.executable, "run.py", "model.pt2", "data.pt", "found.pt"]
    subprocess.run(command, cwd=tmp_path, check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert torch.equal(found, computed(model, (x,))[0])
    content = (tmp_path / "model.pt2").read_bytes()
    assert str(Path(__file__).parents[1]).encode() not in content, "no path of this machine is in the file"


def test_a_program_keeps_no_copy_of_the_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies to compare a graph with are made for the proof of an ONNX file alone; the rest of the form is the same."""
    model, args = ZOO["shared"].make()
    region = calibrated(model, *args)
    model.eval()
    whole = deployed_form(region, lambda: model(*args))
    assert list(whole.references) == list(whole.uses)
    forms: list[DeployedForm] = []

    def kept(*args: Any, **kwargs: Any) -> DeployedForm:
        forms.append(deployed_form(*args, **kwargs))
        return forms[-1]

    monkeypatch.setattr(program_export, "deployed_form", kept)
    lightning_qat.export_program(model, args)
    (lean,) = forms
    assert lean.references == {}
    assert list(lean.uses) == list(whole.uses)
    for one, other in zip(whole.uses.values(), lean.uses.values(), strict=True):
        assert torch.equal(one.scale, other.scale)
        assert torch.equal(one.zero_point, other.zero_point)
        assert (one.codes is None) == (other.codes is None)
        assert one.codes is None or other.codes is None or torch.equal(one.codes, other.codes)


QUICK = [("resnet_inplace", "uint16"), ("shared", "int6"), ("cameras_annotated", "int16"), ("attention", "int8")]
REST = [(n, dtype) for n in ZOO if n != "branching" for dtype in ("int8", "uint16", "int6") if (n, dtype) not in QUICK]


@pytest.mark.parametrize(("name", "dtype"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.full) for case in REST)])
def test_program_computes_the_bits_of_the_region(name: str, dtype: str) -> None:
    """Also with types that torch and ONNX lack: their codes are held in wider ones."""
    model, args = ZOO[name].make()
    scheme = "affine" if dtype.startswith("u") else "symmetric"
    calibrated(model, *args, qconfig={"activation": {"observer": "minmax", "dtype": dtype, "scheme": scheme}})
    program = lightning_qat.export_program(model, args, verify=False)
    found = [leaf for leaf in tree_leaves(program.module()(*args)) if isinstance(leaf, Tensor)]
    expected = computed(model, args)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("groups", [1, 2])
def test_weights_that_are_quantized_with_their_batch_norm(groups: int) -> None:
    """One scale for all channels: the codes are those of the folded weight, and the batch norm stays."""
    torch.manual_seed(2)
    up = nn.ConvTranspose2d(4, 6, 3, 2, groups=groups)
    model = Wired(lambda m, x: torch.relu(m.bn(m.up(x))), up=up, bn=nn.BatchNorm2d(6))
    nn.init.normal_(model.bn.weight), nn.init.normal_(model.bn.bias)  # type: ignore[arg-type, union-attr]
    x = torch.randn(2, 4, 5, 5)
    calibrated(model, x, qconfig={**MINMAX, "weight": {"granularity": "per_tensor"}})
    program = lightning_qat.export_program(model, x)
    assert torch.equal(program.module()(x), computed(model, (x,))[0])
    assert program.state_dict["up.weight.codes"].dtype is torch.int8


def test_program_holds_codes_and_nothing_that_it_does_not_use() -> None:
    """By the formula, in numpy. Weights in float, observers and example inputs are not in the program."""
    model, args = ZOO["resnet"].make()
    overrides = [{"match": "fc", "weight": {"dtype": "float32"}}]
    region = calibrated(model, *args, overrides=overrides)
    before = set(dict(model.named_modules()))
    program = lightning_qat.export_program(model, args)
    held = program.state_dict
    weight, scale = model.stem.weight.detach().numpy(), region.points["stem.weight"].scale.numpy()
    codes = np.clip(np.rint(weight / scale[:, None, None, None]), -127, 127)
    np.testing.assert_array_equal(held["stem.weight.codes"].numpy(), codes)
    assert "stem.weight" not in held
    assert torch.equal(held["fc.weight"], model.fc.weight)
    assert not any("_quantization" in name for name in held)
    assert program.example_inputs is None
    assert set(dict(model.named_modules())) == before
    kinds = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert all(getattr(kind, "namespace", "aten") == "aten" for kind in kinds)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "call_function"]
    assert torch.int8 in {value.dtype for value in values if isinstance(value, Tensor)}, "activations are codes, too"


def test_regions_inside_a_float_model_are_one_program() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 2), nn.ReLU())
    )
    x = torch.randn(5, 4)
    calibrated(model[0], x), calibrated(model[3], torch.randn(9, 8))
    program = lightning_qat.export_program(model, x)
    assert torch.equal(program.module()(x), computed(model, (x,))[0])
    assert {"0.0.weight.codes", "3.0.weight.codes", "2.weight"} <= set(program.state_dict)


def test_bad_input_is_one_error_and_no_file(tmp_path: Path) -> None:
    model, args = ZOO["branching"].make()
    with pytest.raises(ConfigurationError, match="has no fake-quants"):
        lightning_qat.export_program(model, args, tmp_path / "model.pt2")
    region = lightning_qat.insert(model, args)
    with pytest.raises(ConfigurationError, match="is not calibrated"):
        lightning_qat.export_program(model, args, tmp_path / "model.pt2")
    region.remove()
    calibrated(model, *args)
    line = Branching.forward.__code__.co_firstlineno + 2  # if x.sum() > 0
    with pytest.raises(ConfigurationError, match=rf"at tests/quantization/models.py:{line}:"):
        lightning_qat.export_program(model, args, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
    model = nn.Sequential(nn.Linear(4, 2))
    calibrated(model, torch.ones(3, 4))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWrittenError, match=r"model\.pt2 cannot be written"):
        lightning_qat.export_program(model, torch.ones(3, 4), tmp_path / "file" / "model.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_program_with_other_outputs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    calibrated(model, torch.ones(3, 4))
    finished = program_export._finished

    def damaged(*args: Any) -> Any:
        program = finished(*args)
        program.state_dict["0.weight.codes"][0, 0] += 1
        return program

    monkeypatch.setattr(program_export, "_finished", damaged)
    with pytest.raises(ExportMismatchError, match="output 0 differs"):
        lightning_qat.export_program(model, torch.ones(3, 4), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
    lightning_qat.export_program(model, torch.ones(3, 4), tmp_path / "model.pt2", verify=False)
