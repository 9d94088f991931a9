"""Which ops onnxruntime computes on integers, why not the others, and what the file costs (issue 15)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lightning_qat
from lightning_qat.export.float_twin import float_twin
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile
from tests.quantization.models import MINMAX, ZOO, Wired, calibrated

onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is missing")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is missing")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is missing")

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
AFFINE = {"activation": {"observer": "minmax", "dtype": "uint8", "scheme": "affine"}}


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t).copy() for t in onnx.load(path).graph.initializer}


def computed(path: Path, *inputs: torch.Tensor, level: str = "ORT_ENABLE_ALL") -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    found: np.ndarray = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0]
    return found


def optimized(path: Path, folder: Path) -> Counter[str]:
    """The ops that onnxruntime makes of a file, counted here."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=1)


CASES: dict[str, tuple[Any, dict[str, nn.Module], dict[str, Any], list[dict[str, Any]], str]] = {
    "clipping": (
        lambda m, x: m.b(torch.relu(m.a(x))),
        {"a": conv(), "b": conv()},
        MINMAX,
        [],
        "Relu stands between it and the quantizer: onnxruntime drops it only where the lowest code stands for 0",
    ),
    "float input": (
        lambda m, x: m.a(torch.sin(x)),
        {"a": conv()},
        AFFINE,
        [{"match": name, "activation": {"dtype": "float32"}} for name in ("sin_0", "a")],
        "its input 0 is in float (from node_sin)",
    ),
    "wide input": (
        lambda m, x: m.a(x),
        {"a": conv()},
        {"activation": {"observer": "minmax", "dtype": "int16"}},
        [],
        "an input has 16-bit codes, and onnxruntime's integer ops have 8 bits",
    ),
    "narrow weight": (
        lambda m, x: m.b(m.a(x)),
        {"a": conv(), "b": conv()},
        AFFINE,
        [{"match": "a", "weight": {"dtype": "int4"}}],
        "an input has 4-bit codes, and onnxruntime's integer ops have 8 bits",
    ),
    "wide output": (
        lambda m, x: m.b(m.a(torch.relu(x))),
        {"a": conv(), "b": conv()},
        AFFINE,
        [{"match": "a", "activation": {"dtype": "uint16"}}],
        "its result has 16-bit codes, and onnxruntime's integer ops have 8 bits",
    ),
    "float result": (
        lambda m, x: m.a(x),
        {"a": conv()},
        AFFINE,
        [],
        "its result is not quantized right behind it, but read by the end of the model",
    ),
    "fused addition": (
        lambda m, x: m.b(m.a(x) + x),
        {"a": conv(), "b": conv()},
        AFFINE,
        [],
        "its result is not quantized right behind it, but read by Add",
    ),
    "transposed": (
        lambda m, x: m.b(m.a(x)),
        {"a": nn.ConvTranspose2d(3, 3, 3), "b": conv()},
        AFFINE,
        [],
        "onnxruntime has no integer transposed convolution",
    ),
}


QUICK = ("clipping", "wide output", "fused addition")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.full) for c in CASES])
def test_the_cause_is_named(case: str, tmp_path: Path) -> None:
    """The first convolution is none on integers, in the count of onnxruntime's own graph too."""
    forward, modules, qconfig, overrides, cause = CASES[case]
    model = Wired(forward, **modules)
    calibrated(model, IMAGE, qconfig=qconfig, overrides=overrides)
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", IMAGE)
    row = next(row for row in result.integer_ops if row.op == "a")
    assert row.kind == "convolution"
    assert not row.integer
    assert cause in row.cause
    integer, count = result.integer_counts()["convolution"]
    assert count == len(modules)
    assert integer == optimized(tmp_path / "model.onnx", tmp_path)["QLinearConv"]
    stored = json.loads((tmp_path / "model_export.json").read_text())["integer_ops"]
    assert cause in next(entry for entry in stored if entry["op"] == "a")["cause"]
    assert cause.split(":")[0] in " ".join((tmp_path / "model_export.txt").read_text().split())


@pytest.mark.parametrize("name", ["resnet", pytest.param("vit", marks=pytest.mark.full)])
def test_every_float_op_has_a_cause_and_the_counts_are_those_of_onnxruntime(name: str, tmp_path: Path) -> None:
    model, args = ZOO[name].make()
    calibrated(model, *args)
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", args)
    found = optimized(tmp_path / "model.onnx", tmp_path)
    counts = result.integer_counts()
    assert counts.get("convolution", (0, 0))[0] == found["QLinearConv"]
    assert counts["addition"][0] == found["QLinearAdd"]
    integer = sum(found[kind] for kind in ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm"))
    assert counts["matrix product"][0] == integer
    assert all(row.integer != bool(row.cause) for row in result.integer_ops)
    assert not any("does not say why" in row.cause for row in result.integer_ops)


# -- biases of int32


def folded() -> nn.Module:
    """A convolution with a batch norm, and a linear layer."""
    torch.manual_seed(0)
    model = Wired(
        lambda m, x: m.fc(torch.relu(m.bn(m.conv(x))).amax((2, 3))),
        conv=nn.Conv2d(3, 4, 3),
        bn=nn.BatchNorm2d(4),
        fc=nn.Linear(4, 2),
    )
    nn.init.uniform_(model.bn.weight, -2, 2), nn.init.normal_(model.bn.bias)  # type: ignore[arg-type, union-attr]
    return model


def test_biases_are_codes_where_the_profile_asks_for_it(tmp_path: Path) -> None:
    """By the formula, in numpy: ``round(bias / (scale of input * scale of weight))``, of folded biases too."""
    model = folded()
    calibrated(model, IMAGE, qconfig=AFFINE)
    lightning_qat.export_onnx(model, tmp_path / "plain.onnx", IMAGE)
    plain = arrays(tmp_path / "plain.onnx")
    assert not any("bias.codes" in name for name in plain)
    model = folded()
    calibrated(model, IMAGE, qconfig=AFFINE, profile="onnxruntime_qdq")
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", IMAGE)
    held = arrays(tmp_path / "model.onnx")
    scale = held["conv.input0.scale"] * held["conv.weight.scale"]
    np.testing.assert_array_equal(held["conv.bias.scale"], scale)
    np.testing.assert_array_equal(held["conv.bias.codes"], np.rint(plain["conv.bias"] / scale.astype(np.float64)))
    assert held["conv.bias.codes"].dtype == held["fc.bias.codes"].dtype == np.int32
    assert "conv.bias" not in held
    assert all(row.integer for row in result.integer_ops), "the layers at the end of the model, too"
    assert {row.equal for row in result.rows} == {1.0}
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(computed(tmp_path / "model.onnx", IMAGE), model(IMAGE), atol=0.02)


@pytest.mark.parametrize("profile", [None, pytest.param("onnxruntime_qdq", marks=pytest.mark.full)])
def test_a_bias_that_int32_does_not_hold_is_not_cut_off(profile: str | None, tmp_path: Path) -> None:
    """The weight of a dead channel is near zero. onnxruntime computes its bias at every setting all the same.

    Siblings: with and without the profile, convolutions in front of and behind a clipping function.
    """
    model = Wired(lambda m, x: m.b(torch.relu(m.a(x))), a=conv(), b=conv())
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight[1] *= 1e-12  # type: ignore[union-attr, index, operator]
            layer.bias[1] = 3.0  # type: ignore[union-attr, index, operator]
    calibrated(model, IMAGE, qconfig=AFFINE, profile=profile)
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", IMAGE)
    model.eval()
    with torch.no_grad():
        expected = model(IMAGE).numpy()
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"):
        np.testing.assert_allclose(computed(tmp_path / "model.onnx", IMAGE, level=level), expected, atol=0.03)
    assert {row.equal for row in result.rows} == {1.0}
    assert [row.cause for row in result.integer_ops] == [
        "int32 does not hold its bias, as the weight of a channel is near zero"
    ] * 2


def test_profile_says_which_type_biases_have() -> None:
    profile = hardware_profile("onnxruntime_qdq")
    assert profile is not None
    assert profile.bias == "int32"
    assert profile.identity()["bias"] == "int32"
    own = hardware_profile({"name": "own", "ops": []})
    assert own is not None
    assert own.bias == "float32"
    assert "bias" not in own.identity()
    with pytest.raises(ValueError, match=r"bias.*int8"):
        hardware_profile({"name": "own", "ops": [], "bias": "int8"})


# -- what the file costs


def test_the_twin_in_float_computes_the_dequantized_weights(tmp_path: Path) -> None:
    """The weights are those that codes stand for, and nothing else is quantized; by torch."""
    model = folded()
    calibrated(model, IMAGE, profile="onnxruntime_qdq", qconfig=AFFINE)
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", IMAGE)
    twin = float_twin(onnx.load(tmp_path / "model.onnx"))
    onnx.save(twin, tmp_path / "twin.onnx")
    assert not {node.op_type for node in twin.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    held = arrays(tmp_path / "model.onnx")
    reference = folded().eval()
    with torch.no_grad():
        for name in ("conv", "fc"):
            codes, scale = (torch.from_numpy(held[f"{name}.weight.{kind}"]) for kind in ("codes", "scale"))
            weight = codes.float() * scale.reshape(-1, *[1] * (codes.dim() - 1))
            bias = torch.from_numpy(held[f"{name}.bias.codes"] * held[f"{name}.bias.scale"]).float()
            reference.get_submodule(name).weight.copy_(weight)  # type: ignore[operator, union-attr]
            reference.get_submodule(name).bias.copy_(bias)  # type: ignore[operator, union-attr]
        reference.bn = nn.Identity()
        np.testing.assert_allclose(computed(tmp_path / "twin.onnx", IMAGE), reference(IMAGE), atol=1e-5)
    assert result.float_bytes == twin.ByteSize()
    assert result.bytes == (tmp_path / "model.onnx").stat().st_size
    assert min(result.milliseconds, result.float_milliseconds) > 0
    assert "ms with onnxruntime on this machine" in result.note


@pytest.mark.parametrize(
    ("dtype", "factor"), [("int8", 4), *(pytest.param(*c, marks=pytest.mark.full) for c in (("int16", 2), ("int4", 8)))]
)
def test_weights_take_as_many_bytes_as_their_types_promise(dtype: str, factor: int, tmp_path: Path) -> None:
    """Measured on a model with many weights: the file is smaller by the factor of the types, within a few percent."""
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    x = torch.randn(4, 256)
    calibrated(model, x, overrides=[{"match": "*", "weight": {"dtype": dtype}}])
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", x)
    assert result.float_bytes / result.bytes == pytest.approx(factor, rel=0.15)
