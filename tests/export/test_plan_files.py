"""quant_plan.json says what is quantized, how, and why not (A9), and is enough to compute what the model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_qat
import lightning_qat.export.plan_files as plan_files
from lightning_qat.export.plan_files import write_plan
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.quantization.models import MINMAX, ZOO, calibrated

SCHEMA = json.loads(Path(plan_files.__file__).with_name("quant_plan.schema.json").read_text())
README = Path(plan_files.__file__).with_name("README.md").read_text()


def test_plan_file_holds_every_point_with_its_scale_and_every_op_with_its_reason(tmp_path: Path) -> None:
    """A9: scales are those in effect; a point without data has none; float ops say why."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    region = insert(model, (torch.randn(2, 4),), overrides=[{"match": "1", "activation": {"threshold": 100}}])
    holder = nn.ModuleDict({"net": model})  # the region is found in it
    before = json.loads(write_plan(holder, tmp_path).read_text())
    assert {p["scale_source"] for p in before["regions"]["net"]["points"]} == {None, "fixed"}
    calibrate(region, [torch.randn(16, 4)])
    described = json.loads(write_plan(holder, tmp_path).read_text())["regions"]["net"]
    for point in described["points"]:
        scale = region.points[point["name"]].scale
        assert torch.equal(torch.tensor(point["scale"]), scale), point["name"]
    (relu,) = [p for p in described["points"] if p["name"] == "1.output"]
    assert relu["scale"] == 100 / 128
    assert relu["reason"].startswith("override 1")
    assert described["float_points"]["2.output"].startswith("high-precision output")
    assert {op["name"]: op["status"] for op in described["ops"]} == {"0": "fused", "1": "quantized", "2": "quantized"}
    assert [path.name for path in tmp_path.iterdir()] == ["quant_plan.json"]


def test_a_module_and_its_region_give_the_same_file(tmp_path: Path) -> None:
    """As the README shows it: nothing but the top of the package is needed."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    region = lightning_qat.insert(model, (torch.randn(2, 4),))
    lightning_qat.calibrate(region, [torch.randn(16, 4)])
    paths = [lightning_qat.write_plan(what, tmp_path / name) for what, name in ((model, "a"), (region, "b"))]
    assert [path.name for path in paths] == ["quant_plan.json"] * 2
    assert paths[0].read_text() == paths[1].read_text()


def test_module_without_fake_quants_is_refused(tmp_path: Path) -> None:
    """Bad input."""
    with pytest.raises(ConfigurationError, match=r"Linear has no fake-quants.*load_quantized"):
        write_plan(nn.Linear(2, 2), tmp_path / "export")
    assert not (tmp_path / "export").exists()


# -- the schema


def test_schema_is_a_valid_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", ZOO)
def test_files_follow_the_schema(name: str, tmp_path: Path) -> None:
    module, args = ZOO[name].make()
    region = insert(module, args, qconfig=MINMAX, profile="generic_int8_int16")
    jsonschema.validate(written(region, tmp_path), SCHEMA, jsonschema.Draft202012Validator)
    calibrate(region, [args])
    jsonschema.validate(written(region, tmp_path), SCHEMA, jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("key", "value"),
    [("scale", float("nan")), ("scale", "nan"), ("scale", 0), ("dtype", "int17"), ("role", "bias"), ("unknown", 1)],
)
def test_schema_refuses_what_the_format_has_not(key: str, value: Any, tmp_path: Path) -> None:
    document = written(calibrated(nn.Linear(2, 2), torch.randn(2, 2)), tmp_path)
    document["regions"][""]["points"][0][key] = value
    if value != value:  # JSON has no NaN: Python's reader is more liberal than the format
        with pytest.raises(ValueError, match="not JSON compliant"):
            json.dumps(document, allow_nan=False)
    else:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document, SCHEMA, jsonschema.Draft202012Validator)


def test_every_key_of_the_schema_is_documented() -> None:
    section = README.partition("## `quant_plan.json`")[2].partition("\n## ")[0]
    for keys in (SCHEMA, SCHEMA["$defs"]["region"], SCHEMA["$defs"]["point"], SCHEMA["$defs"]["op"]):
        for key in keys["properties"]:
            assert f"`{key}`" in section, key


def test_scale_that_is_not_finite_any_more_is_null(tmp_path: Path) -> None:
    region = calibrated(nn.Linear(2, 2), torch.randn(2, 2))
    region.points[region.plan.points[0].name].scale.fill_(float("nan"))
    document = written(region, tmp_path)
    assert [p["scale"] is None for p in document["regions"][""]["points"]] == [True, False]
    jsonschema.validate(document, SCHEMA, jsonschema.Draft202012Validator)


# -- the file alone reproduces every point


class Everything(nn.Module):
    """Weights per channel and per tensor, a division by a vector of two magnitudes, an attention-like product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 8)
        self.divisor = nn.Parameter(torch.cat([torch.linspace(1, 2, 3), torch.linspace(100, 9000, 5)]))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        z = torch.softmax(self.linear(y) / self.divisor, -1)
        return z @ z.mT


RULES: list[dict[str, Any]] = [
    {"match": "conv.input0", "activation": {"scheme": "affine", "dtype": "uint8"}},
    {"match": "mean_0", "activation": {"dtype": "int16", "scheme": "affine"}},
    {"match": "linear.output", "activation": {"threshold": 5}},
    {"match": "linear", "weight": {"granularity": "per_tensor", "dtype": "int4"}},
    {"match": "softmax_0", "activation": {"dtype": "uint8"}},
]


def fake_quantized(point: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """The formula of the README, in float32 as numpy computes it."""
    scale, zero_point = np.float32(point["scale"]), np.int32(point["zero_point"])
    if point["axis"] is not None:
        if point["split_sizes"] is not None:
            scale, zero_point = (np.repeat(v, point["split_sizes"]) for v in (scale, zero_point))
        shape = [1] * x.ndim
        shape[point["axis"]] = point["channels"]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    codes = np.rint(x / scale) + zero_point.astype(np.float32)
    codes = np.clip(codes, point["quant_min"], point["quant_max"])
    return (codes - zero_point.astype(np.float32)) * scale


def test_every_point_is_reproduced_from_the_file_alone(tmp_path: Path) -> None:
    """Bit for bit, per channel, affine, unsigned and fixed too; B8: split scales."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    model = Everything().eval()
    split = {"match": "div_0.input1", "activation": {"split": {"axis": 0, "sizes": [3, 5]}, "dtype": "int16"}}
    region = calibrated(model, x, overrides=[*RULES, split])
    points = {p["name"]: p for p in written(region, tmp_path)["regions"][""]["points"]}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with region.tap(lambda name, value, quantized: seen.update({name: (value.clone(), quantized)})):
        model(x)
    assert seen.keys() == points.keys()
    for name, (value, quantized) in seen.items():
        numpy = fake_quantized(points[name], value.detach().numpy())
        assert np.array_equal(numpy, quantized.detach().numpy()), name
    kinds = {(p["scheme"], p["dtype"], p["axis"] is not None) for p in points.values()}
    assert {("affine", "uint8", False), ("affine", "int16", False), ("symmetric", "int8", True)} <= kinds
    assert points["linear.output"]["scale_source"] == "fixed"
    assert points["div_0.input1"]["split_sizes"] == [3, 5]
    assert len(points["div_0.input1"]["scale"]) == 2


def test_present_dtype_is_written_not_the_planned_one(tmp_path: Path) -> None:
    region = calibrated(nn.Linear(2, 2), torch.randn(2, 2))
    region.compute_scales(dtype="int4")
    for point in written(region, tmp_path)["regions"][""]["points"]:
        assert (point["dtype"], point["quant_max"]) == ("int4", 7)


def test_profile_is_named(tmp_path: Path) -> None:
    region = insert(nn.Linear(2, 2), (torch.randn(2, 2),), profile="onnxruntime_qdq")
    assert written(region, tmp_path)["regions"][""]["profile"]["name"] == "onnxruntime_qdq"


def written(region: Region, directory: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(write_plan(region, directory).read_text())
    return document
