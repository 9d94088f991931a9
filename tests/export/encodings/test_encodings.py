"""The plan in the formats of tool chains: readers written from their documents, and the way back (issue 15)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lightning_qat
from lightning_qat.atomic_files import NotWrittenError
from lightning_qat.export.encodings.held_points import points_of
from lightning_qat.quantization.errors import ConfigurationError, DamagedFileError
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.quantization.models import ZOO, Wired, calibrated


def region_of(name: str, **options: Any) -> tuple[nn.Module, Region]:
    model, args = ZOO[name].make()
    return model, calibrated(model, *args, **options)


def plan(model: nn.Module, folder: Path) -> dict[str, dict[str, Any]]:
    """The points of quant_plan.json, by name."""
    document = json.loads(lightning_qat.write_plan(model, folder).read_text())
    return {p["name"]: p for region in document["regions"].values() for p in region["points"]}


MIX: dict[str, Any] = {
    "overrides": [
        {"match": "layers.0.conv1", "activation": {"dtype": "int16"}, "weight": {"dtype": "int16"}},
        {"match": "layers.1.conv1", "weight": {"granularity": "per_tensor"}},
        {"match": "layers.0.relu", "activation": {"split": {"sizes": [3, 5], "axis": 1}}},
    ]
}
AFFINE: dict[str, Any] = {"qconfig": {"activation": {"observer": "minmax", "dtype": "uint8", "scheme": "affine"}}}


# -- AIMET, QNN: Encoding Format Specification, version 2.0.0


def quantized(x: np.ndarray, encoding: dict[str, Any]) -> np.ndarray:
    """ONNX's QuantizeLinear and DequantizeLinear by the fields of an encoding, as the specification maps them."""
    assert encoding.keys() <= {"name", "output_dtype", "y_scale", "y_zero_point", "axis", "block_size"}
    limits = {f"int{b}": (-(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in (2, 4, 8, 16)}
    limits |= {f"uint{b}": (0, 2**b - 1) for b in (2, 4, 8, 16)}
    low, high = limits[encoding["output_dtype"]]
    scale = np.asarray(encoding["y_scale"], np.float32)
    zero = np.asarray(encoding.get("y_zero_point", 0), np.float32)
    if scale.ndim:
        shape = [1] * x.ndim
        shape[encoding["axis"]] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.ndim else zero
    codes = np.clip(np.rint(x / scale) + zero, low, high)
    found: np.ndarray = ((codes - zero) * scale).astype(np.float32)
    return found


@pytest.mark.parametrize("options", [{}, MIX, AFFINE], ids=["int8", "mix", "uint8 affine"])
def test_a_reader_of_the_specification_computes_what_the_region_computes(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Every tensor that the region quantizes in one forward, weights and activations, bit for bit."""
    model, region = region_of("resnet", **options)
    written = lightning_qat.write_encodings(model, tmp_path / "model.encodings", "qnn")
    document = json.loads((tmp_path / "model.encodings").read_text())
    assert document.keys() == {"version", "encodings"}
    assert document["version"] == "2.0.0"
    encodings = {entry["name"]: entry for entry in document["encodings"]}
    assert set(encodings) == set(region.points)
    assert written.points == len(encodings)
    seen = set()

    def tap(point: str, value: torch.Tensor, found: torch.Tensor) -> None:
        seen.add(point)
        np.testing.assert_array_equal(quantized(value.detach().numpy(), encodings[point]), found.detach().numpy())

    model.eval()
    with torch.no_grad(), region.tap(tap):
        model(*ZOO["resnet"].make()[1])
    assert seen == set(region.points)


@pytest.mark.parametrize("options", [{}, MIX, AFFINE], ids=["int8", "mix", "uint8 affine"])
def test_encodings_come_back_as_points_of_the_plan(options: dict[str, Any], tmp_path: Path) -> None:
    """quant_plan.json -> encodings -> points: nothing that the format holds is lost, and the rest is listed."""
    model, _ = region_of("resnet", **options)
    written = lightning_qat.write_encodings(model, tmp_path / "model.encodings", "qnn")
    points, lost = plan(model, tmp_path), {(one.point, one.what) for one in written.not_held}
    for found in lightning_qat.read_encodings(written.file, "qnn"):
        point = points[found["name"]]
        assert (found["dtype"], found["axis"]) == (point["dtype"], point["axis"])
        for key in ("scale", "zero_point"):
            values, sizes = point[key], point["split_sizes"]
            assert found[key] == (values if sizes is None else np.repeat(values, sizes).tolist())
    for name, point in points.items():
        assert any(p == name and "smallest code" in what for p, what in lost) == point["narrow_range"]
        assert any(p == name and "share a scale" in what for p, what in lost) == (point["split_sizes"] is not None)


def test_what_the_format_cannot_hold_is_listed_and_left_out(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    overrides = [{"match": "2", "weight": {"dtype": "int6"}}]
    calibrated(model, torch.randn(1, 4, 5, 5), overrides=overrides)
    written = lightning_qat.write_encodings(model, tmp_path / "model.encodings")
    lost = {one.point: one.what for one in written.not_held}
    assert lost["2.weight"] == "everything: the format has no type int6"
    assert "grouped transposed convolution" in lost["0.weight"]
    assert {point["name"] for point in lightning_qat.read_encodings(written.file)} == {"0.input0", "1.output"}


# -- TI: Quantization Proto


PARTS = ("outputs", "weights", "bias", "slope")


def message(text: str) -> Any:
    """Read the text with protobuf itself, by the definition in TI's document."""
    pytest.importorskip("google.protobuf", reason="the extra 'onnx' is missing")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    file = descriptor_pb2.FileDescriptorProto(name="tidl.proto", syntax="proto2")
    for name, values in (
        ("TidlQuantType", ["SYMMETRIC", "ASYMMETRIC"]),
        ("TidlCalibType", ["PERTENSOR", "PERCHANNEL"]),
    ):
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values, 1):
            enum.value.add(name=value, number=number)
    fields = {
        "TIDLNetQuantParams": [
            ("num_layers", 1, "INT32", ""),
            ("quant_type", 2, "ENUM", "TidlQuantType"),
            ("calib_type", 3, "ENUM", "TidlCalibType"),
            ("layers", 4, "MESSAGE*", "TidlLayerQuantParams"),
        ],
        "TidlLayerQuantParams": [
            ("layer_name", 1, "STRING", ""),
            ("layer_type", 2, "STRING", ""),
            ("bit_depth", 3, "UINT32", ""),
            *(
                (n, i, "MESSAGE*", "TidlTensorQuantParams")
                for i, n in enumerate(["outputs", "weights", "bias", "slope"], 4)
            ),
        ],
        "TidlTensorQuantParams": [
            ("min", 1, "FLOAT", ""),
            ("max", 2, "FLOAT", ""),
            ("size", 3, "UINT32", ""),
            ("element_type", 4, "UINT32", ""),
            ("scale", 5, "DOUBLE*", ""),
            ("zero_point", 6, "UINT32*", ""),
            ("value", 7, "DOUBLE*", ""),
        ],
    }
    for name, entries in fields.items():
        kind = file.message_type.add(name=name)
        for field, number, type_name, other in entries:
            made = kind.field.add(name=field, number=number, type_name=f".{other}" if other else None)
            made.type = getattr(made, f"TYPE_{type_name.rstrip('*')}")
            made.label = made.LABEL_REPEATED if type_name.endswith("*") else made.LABEL_OPTIONAL
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    cls = message_factory.GetMessageClass(pool.FindMessageTypeByName("TIDLNetQuantParams"))
    return text_format.Parse(text, cls())


@pytest.mark.parametrize("options", [{}, MIX], ids=["int8", "mix"])
def test_protobuf_reads_the_ranges(options: dict[str, Any], tmp_path: Path) -> None:
    """By TI's definition and its rules: numbers of layers and values agree, and every tensor has its range."""
    model, _ = region_of("resnet", **options)
    written = lightning_qat.write_encodings(model, tmp_path / "ranges.prototxt", "tidl")
    found, points = message(written.file.read_text()), plan(model, tmp_path)
    assert found.num_layers == len(found.layers)
    assert found.calib_type == 2  # PERCHANNEL
    tensors = {}
    for layer in found.layers:
        for role in ("outputs", "weights"):
            for tensor in getattr(layer, role):
                tensors[f"{layer.layer_name}.{role.removesuffix('s')}"] = tensor
                assert tensor.size == len(tensor.scale) == len(tensor.zero_point)
                assert layer.bit_depth in (8, 16)
    named = {name for name, point in points.items() if point["role"] != "input"}
    assert set(tensors) == named
    for name, tensor in tensors.items():
        point = points[name]
        scales = (
            np.repeat(point["scale"], point["split_sizes"] or 1) if point["split_sizes"] else np.ravel(point["scale"])
        )
        assert tensor.max == pytest.approx(scales.max() * point["quant_max"], rel=1e-6)
        assert tensor.min == pytest.approx(scales.max() * point["quant_min"], rel=1e-6)
        np.testing.assert_array_equal(np.float32(1 / np.array(tensor.scale)), np.float32(scales))


def test_ranges_come_back_as_points_of_the_plan(tmp_path: Path) -> None:
    model, _ = region_of("resnet", **MIX)
    written = lightning_qat.write_encodings(model, tmp_path / "ranges.prototxt", "tidl")
    points = plan(model, tmp_path)
    back = {point["name"]: point for point in lightning_qat.read_encodings(written.file, "tidl")}
    assert set(back) == {name for name, point in points.items() if point["role"] != "input"}
    for name, found in back.items():
        point = points[name]
        expected = point["scale"]
        if point["split_sizes"] is not None:
            expected = np.repeat(expected, point["split_sizes"]).tolist()
        assert {key: found[key] for key in ("op", "role", "dtype")} == {k: point[k] for k in ("op", "role", "dtype")}
        assert found["scale"] == expected
    lost = {(one.point, one.what) for one in written.not_held}
    inputs = {name for name, point in points.items() if point["role"] == "input"}
    assert inputs <= {name for name, what in lost if "none of inputs" in what}
    assert any(name == "*" and "biases" in what for name, what in lost)


def test_zero_points_are_no_part_of_ranges(tmp_path: Path) -> None:
    model, _ = region_of("resnet", **AFFINE)
    written = lightning_qat.write_encodings(model, tmp_path / "ranges.prototxt", "tidl")
    zero = {name for name, point in plan(model, tmp_path).items() if point["role"] == "output" and point["zero_point"]}
    assert zero <= {one.point for one in written.not_held if "zero point" in one.what}
    message(written.file.read_text())


# -- Horizon: quant_config.json


def checked_config(text: str) -> dict[str, dict[str, str]]:
    """Accept a file as Horizon's guide describes it; returns the nodes."""
    document = json.loads(text)
    assert document.keys() <= {"model_config", "op_config", "subgraph_config", "node_config"}
    types = {"int8", "int16", "float32"}
    assert document["model_config"]["all_node_type"] in types
    for entry in document["node_config"].values():
        assert entry
        assert "qtype" in entry or all(key.startswith("input") and key[5:].isdigit() for key in entry)
        assert set(entry.values()) <= types
    nodes: dict[str, dict[str, str]] = document["node_config"]
    return nodes


def test_every_node_has_the_types_that_it_reads(tmp_path: Path) -> None:
    """By hand: a matrix product of two results, of which one is int16, and layers in front of them."""
    model = Wired(lambda m, x: m.a(x) @ torch.relu(m.b(x)).mT, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    overrides = [
        {"match": "a", "activation": {"dtype": "int16"}},
        {"match": "a.input0", "activation": {"dtype": "int8"}},
    ]
    region = calibrated(model, torch.randn(2, 3, 4), overrides=overrides)
    written = lightning_qat.write_encodings(model, tmp_path / "quant_config.json", "horizon")
    nodes = checked_config(written.file.read_text())
    product = next(op.name for op in region.graph.ops if op.kind in ("matmul", "bmm"))
    assert nodes[product] == {"input0": "int16", "input1": "int8"}
    assert nodes["a"] == nodes["b"] == {"qtype": "int8"}
    assert "relu_0" not in nodes, "it is fused with the layer in front of it"
    back = {entry["op"]: entry["inputs"] for entry in lightning_qat.read_encodings(written.file, "horizon")}
    assert back[product] == ["int16", "int8"]
    assert {one.point for one in written.not_held if "calibrates anew" in one.what} == set(region.points)


def test_types_that_horizon_lacks_are_listed(tmp_path: Path) -> None:
    model, _ = region_of("resnet", **AFFINE)
    written = lightning_qat.write_encodings(model, tmp_path / "quant_config.json", "horizon")
    assert any("no type uint8" in one.what for one in written.not_held)
    assert not checked_config(written.file.read_text()).keys() & {"stem", "layers.0.conv1"}


# -- files


def test_points_have_the_names_of_the_exported_file() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Linear(4, 2), nn.ReLU())

    model = Model()
    region = calibrated(model.part, torch.ones(3, 4))
    names = {point["name"] for point in points_of({"part": region})}
    assert names == {f"part.{name}" for name in region.points}
    assert {point["op"] for point in points_of({"part": region})} <= {f"part.{op.name}" for op in region.graph.ops}


@pytest.mark.parametrize("kind", ["qnn", "horizon", "tidl"])
def test_bad_input_is_one_sentence_and_no_file(kind: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    path = tmp_path / "file"
    with pytest.raises(ConfigurationError, match="has no fake-quants"):
        lightning_qat.write_encodings(model, path, kind)
    insert(model, (torch.ones(3, 4),))
    with pytest.raises(ConfigurationError, match="is not calibrated"):
        lightning_qat.write_encodings(model, path, kind)
    with pytest.raises(ConfigurationError, match=r"format.*'qnm'"):
        lightning_qat.write_encodings(model, path, "qnm")  # type: ignore[arg-type]
    assert not path.exists()
    path.write_text("")
    region = calibrated(nn.Sequential(nn.Linear(4, 2)), torch.ones(3, 4))
    with pytest.raises(NotWrittenError, match="cannot be written"):
        lightning_qat.write_encodings(region, path / "file", kind)
    for text in ("", "{", "[]", "layers {", '{"version": "1.0.0", "encodings": []}', "num_layers: x"):
        path.write_text(text)
        with pytest.raises(DamagedFileError) as error:
            lightning_qat.read_encodings(path, kind)
        assert "\n" not in str(error.value)
