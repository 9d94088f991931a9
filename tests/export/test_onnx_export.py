"""An exported model is computed by onnxruntime as by the region, and its file holds what the plan says (issue 15)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lightning_qat
import lightning_qat.export.onnx_export as onnx_export
from lightning_qat.export.verification_result import ExportResult
from lightning_qat.quantization.region.region import Region
from tests.quantization.models import MINMAX, ZOO, ResNet, Wired, calibrated

onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is missing")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is missing")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is missing")

IMAGE = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
QUICK = [
    ("resnet_inplace", "int16"),
    ("vit", "int8"),
    ("transformer_causal", "int16"),
    ("unet", "int8"),
    ("recurrent", "int8"),
    ("shared", "int16"),
    ("cameras_annotated", "int8"),
]
REST = [(n, dtype) for n in ZOO if n != "branching" for dtype in ("int8", "int16") if (n, dtype) not in QUICK]


def qconfig(dtype: str, scheme: str = "symmetric", /, **weight: Any) -> dict[str, Any]:
    return {"activation": {"observer": "minmax", "dtype": dtype, "scheme": scheme}, "weight": weight}


def computed(path: Path, *inputs: Tensor, full: bool = False) -> list[np.ndarray]:
    """The outputs of a file, by onnxruntime alone."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not full:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    found: list[np.ndarray] = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    return found


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def nodes(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def assert_proved(result: ExportResult, region: Region) -> None:
    """Every point of the plan is in the file or shared there, and all of its codes are equal."""
    assert {row.equal for row in result.rows} == {1.0}
    points = {name.partition("#")[0] for name in (*(row.point for row in result.rows), *result.shared)}
    assert points == set(region.points)
    assert all(row.codes > 0 for row in result.rows)
    assert all((row.steps_behind_op or 0) <= 1 for row in result.rows), "an op in front of a quantizer is another one"


# -- what the file computes


@pytest.mark.parametrize(("name", "dtype"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.full) for case in REST)])
def test_zoo_computes_the_codes_of_the_region(name: str, dtype: str, tmp_path: Path) -> None:
    """(a) for every model of the small zoo; codes of single ops differ by at most one step where sums differ."""
    model, args = ZOO[name].make()
    region = calibrated(model, *args, qconfig=qconfig(dtype), state="off")
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", args)
    assert_proved(result, region)
    model.eval(), region.set_state("quantize")
    with torch.no_grad():
        expected = tensors(model(*args))
    found = computed(tmp_path / "model.onnx", *tensors(args))
    for one, other, row in zip(found, expected, result.outputs, strict=False):
        assert np.abs(one - other.numpy()).max() <= row.quantization, "more than quantization itself changes"


@pytest.mark.parametrize(
    ("config", "types"),
    [
        (qconfig("uint8", "affine"), {"uint8", "int8"}),
        (qconfig("uint16", "affine"), {"uint16", "int8"}),
        (qconfig("int16", dtype="int16"), {"int16"}),
        (qconfig("int8", dtype="int4"), {"int8", "uint8", "int4"}),
        (qconfig("int8", granularity="per_tensor"), {"int8", "uint8"}),
    ],
    ids=["uint8 affine", "uint16 affine", "int16", "int4 weights", "per tensor"],
)
def test_types_schemes_and_granularities(config: dict[str, Any], types: set[str], tmp_path: Path) -> None:
    model, args = ZOO["resnet"].make()
    region = calibrated(model, *args, qconfig=config)
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", args)
    assert_proved(result, region)
    assert {row.dtype for row in result.rows} <= types
    assert len(result.folded) == 6
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(computed(tmp_path / "model.onnx", *args)[0], model(*args), atol=1e-4)


def test_mixed_precision_with_a_float_point_and_split_scales(tmp_path: Path) -> None:
    model, args = ZOO["resnet"].make()
    overrides: list[dict[str, Any]] = [
        {"match": "layers.0.conv1", "activation": {"dtype": "int16"}, "weight": {"dtype": "int16"}},
        {"match": "layers.1.conv1", "weight": {"dtype": "float32"}},
        {"match": "layers.0.relu", "activation": {"split": {"sizes": [3, 5], "axis": 1}}},
    ]
    region = calibrated(model, *args, overrides=overrides)
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", args)
    assert_proved(result, region)
    assert "layers.1.bn1" not in result.folded  # its layer is in float, and stays as it is
    held = arrays(tmp_path / "model.onnx")
    assert held["layers.0.conv1.weight.codes"].dtype == np.int16
    assert held["layers.1.conv1.weight"].dtype == np.float32
    split = [name for name, point in region.points.items() if point.split_sizes]
    for name in split:
        np.testing.assert_array_equal(held[f"{name}.scale"], region.points[name].channel_scale.numpy())
    assert split


def test_learned_scales_after_training_steps(tmp_path: Path) -> None:
    """The scales in the file are those of the parameters after the last step, and those of the last weights."""
    model, args = ZOO["resnet"].make()
    region = calibrated(model, *args)
    region.learn_scales({"activation"})
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(*args).square().mean().backward()
        optimizer.step()
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", args)
    assert_proved(result, region)
    assert model.training, "the model stays in its mode"
    held = arrays(tmp_path / "model.onnx")
    for name, scale in region.learned_scales.items():
        assert held[f"{name}.scale"] == scale.detach().numpy()


# -- what the file holds


def test_weights_are_codes_with_the_batch_norm_folded_in(tmp_path: Path) -> None:
    """By the formula, in numpy: codes of the weight, mirrored where gamma is negative, and scale times ``|factor|``."""
    torch.manual_seed(1)
    model = Wired(lambda m, x: torch.relu(m.bn(m.conv(x))), conv=nn.Conv2d(1, 6, 3), bn=nn.BatchNorm2d(6))
    with torch.no_grad():
        model.bn.weight.copy_(torch.tensor([1.0, -0.5, 2.0, -1e-3, 0.0, 0.3]))  # type: ignore[operator, union-attr]
        model.bn.bias.normal_(), model.bn.running_mean.normal_()  # type: ignore[operator, union-attr]
        model.bn.running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
    region = calibrated(model, IMAGE)
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", IMAGE)
    assert_proved(result, region)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    scale = region.points["conv.weight"].scale.numpy()
    factor = state["bn.weight"] / np.sqrt(state["bn.running_var"] + 1e-5)
    along = (slice(None), None, None, None)
    codes = np.clip(np.rint(state["conv.weight"] / scale[along]), -127, 127) * np.sign(factor)[along]
    held = arrays(tmp_path / "model.onnx")
    assert held["conv.weight.codes"].dtype == np.int8
    np.testing.assert_array_equal(held["conv.weight.codes"], codes)
    used = factor != 0
    np.testing.assert_allclose(held["conv.weight.scale"][used], (scale * np.abs(factor))[used], rtol=1e-6)
    bias = (state["conv.bias"] - state["bn.running_mean"]) * factor + state["bn.bias"]
    np.testing.assert_allclose(held["conv.bias"], bias, rtol=1e-5, atol=1e-7)
    assert nodes(tmp_path / "model.onnx")["BatchNormalization"] == 0
    assert result.folded == ("bn",)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("groups", [1, 2])
def test_folding_into_transposed_convolutions(groups: int, granularity: str, tmp_path: Path) -> None:
    """Their channels are along another axis, and with groups along none that QDQ has."""
    torch.manual_seed(2)
    up = nn.ConvTranspose2d(4, 6, 3, 2, groups=groups)
    model = Wired(lambda m, x: torch.relu(m.bn(m.up(x))), up=up, bn=nn.BatchNorm2d(6))
    nn.init.normal_(model.bn.weight), nn.init.normal_(model.bn.bias)  # type: ignore[arg-type, union-attr]
    x = torch.randn(2, 4, 5, 5)
    region = calibrated(model, x, qconfig={**MINMAX, "weight": {"granularity": granularity}})
    assert_proved(lightning_qat.export_onnx(model, tmp_path / "model.onnx", x), region)
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(computed(tmp_path / "model.onnx", x)[0], model(x), atol=1e-4)


def test_a_batch_norm_that_no_layer_can_take_up_stays(tmp_path: Path) -> None:
    """Over the steps of a sequence, a batch norm has other channels than the layer. It keeps its own node."""
    model = Wired(lambda m, x: torch.relu(m.bn(m.fc(x))), fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(5))
    x = torch.randn(3, 5, 4)
    region = calibrated(model, x)
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", x)
    assert_proved(result, region)
    assert [name for name, _ in result.kept] == ["bn"]
    assert "other channels than the layer" in result.note
    assert nodes(tmp_path / "model.onnx")["BatchNormalization"] == 1


def test_a_shared_weight_is_stored_once(tmp_path: Path) -> None:
    model, args = ZOO["shared"].make()
    region = calibrated(model, *args)
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", args)
    assert_proved(result, region)
    held = arrays(tmp_path / "model.onnx")
    assert sorted(name for name in held if name.endswith(".codes")) == ["block.0.weight.codes", "embed.weight.codes"]
    assert not any(name.endswith("weight") for name in held)


def test_file_is_complete_and_has_our_names(tmp_path: Path) -> None:
    model, args = ZOO["resnet"].make()
    region = calibrated(model, *args)
    lightning_qat.export_onnx(model, tmp_path / "model.onnx", args)
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    known = {v.name: v.type.tensor_type for v in (*inferred.value_info, *inferred.output, *inferred.input)}
    for node in proto.graph.node:
        for name in node.output:
            assert known[name].elem_type, name
            assert all(length.HasField("dim_value") for length in known[name].shape.dim), name
    names = {name for node in proto.graph.node for name in node.output}
    assert set(region.points) <= names
    assert {"stem", "layers.0.conv1", "layers.0.relu@1", "fc"} <= {node.name for node in proto.graph.node}
    assert [value.name for value in proto.graph.input] == ["x"]
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [21]
    assert str(Path(__file__).parents[1]) not in str(proto), "no path of this machine is in the file"


def test_regions_inside_a_float_model_are_one_graph(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.neck, self.head = ResNet(), nn.Linear(10, 8), nn.Sequential(nn.Linear(8, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.tanh(self.neck(self.stem(x))))
            return y

    torch.manual_seed(3)
    model = Model()
    calibrated(model.stem, IMAGE), calibrated(model.head, torch.randn(9, 8))
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", IMAGE)
    assert {"stem.stem.weight", "head.0.weight"} <= {row.point for row in result.rows}
    held = arrays(tmp_path / "model.onnx")
    assert held["neck.weight"].dtype == np.float32
    assert held["head.0.weight.codes"].dtype == np.int8
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(computed(tmp_path / "model.onnx", IMAGE)[0], model(IMAGE), atol=1e-5)


def test_axes_are_dynamic_on_request(tmp_path: Path) -> None:
    model, args = ZOO["unet"].make()
    calibrated(model, *args)
    shapes = ({0: "batch", 2: "height"},)
    lightning_qat.export_onnx(model, tmp_path / "model.onnx", args, dynamic_shapes=shapes)
    model.eval()
    x = torch.randn(3, 3, 12, 8)
    with torch.no_grad():
        expected = model(x)
    found = computed(tmp_path / "model.onnx", x)
    np.testing.assert_allclose(found[0], expected["map"], atol=0.05)
    assert found[0].shape == (3, 2, 12, 8)
    (value,) = onnx.load(tmp_path / "model.onnx").graph.input
    lengths = value.type.tensor_type.shape.dim
    assert [length.dim_param or length.dim_value for length in lengths] == ["batch", 3, "height", 8]


def test_a_region_exports_its_module_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    """Weights, buffers, modes, states and children are the same afterwards, and so is what the model returns."""
    model, args = ZOO["resnet"].make()
    region = calibrated(model, *args, state="observe")
    model.train(), model.layers.eval()
    before = {name: t.clone() for name, t in model.state_dict().items() if torch.is_tensor(t)}
    modes, children = [m.training for m in model.modules()], [name for name, _ in model.named_modules()]
    state = torch.get_rng_state()
    lightning_qat.export_onnx(region, tmp_path / "a.onnx", args)
    assert torch.equal(torch.get_rng_state(), state)
    after = {name: t for name, t in model.state_dict().items() if torch.is_tensor(t)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modes == [m.training for m in model.modules()]
    assert children == [name for name, _ in model.named_modules()]
    assert region.current_state == "observe"
    assert region.unplanned == {}
    lightning_qat.export_onnx(model, tmp_path / "b.onnx", args)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes(), "the same file every time"


def test_keyword_arguments_and_several_outputs(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, *, other: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            return {"sum": torch.relu(self.a(x) + self.b(other)) * scale, "first": self.a(x)}

    torch.manual_seed(4)
    model, x, other = Model(), torch.randn(2, 4), torch.randn(2, 5)
    region = lightning_qat.insert(model, (x,), {"other": other, "scale": 2.0}, qconfig=MINMAX)
    lightning_qat.calibrate(region, [((x,), {"other": other, "scale": 2.0})])
    region.set_state("quantize")
    call = ((x,), {"other": other, "scale": 2.0})
    lightning_qat.export_onnx(model, tmp_path / "model.onnx", call)
    model.eval()
    with torch.no_grad():
        expected = model(x, other=other, scale=2.0)
    found = computed(tmp_path / "model.onnx", x, other)
    for one, tensor in zip(found, expected.values(), strict=True):
        np.testing.assert_allclose(one, tensor, atol=1e-5)


def test_an_int8_transformer_loads_with_all_optimizations_in_opset_20(tmp_path: Path) -> None:
    """onnxruntime 1.32 cannot load some int8 graphs of opset 21; the report says what to write."""
    model, args = ZOO["vit"].make()
    region = calibrated(model, *args)
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", args, opset=20)
    assert_proved(result, region)
    assert not any(row.problem for row in result.outputs)
    assert [e.version for e in onnx.load(tmp_path / "model.onnx").opset_import if e.domain == ""] == [20]
    with torch.no_grad():
        model.eval()
        found = computed(tmp_path / "model.onnx", *args, full=True)[0]
        assert np.abs(found - model(*args).numpy()).max() < 0.05


def test_under_the_profile_onnxruntime_computes_on_integers(tmp_path: Path) -> None:
    """All convolutions and additions of a residual network."""
    model, args = ZOO["resnet"].make()
    config = qconfig("uint8", "affine")
    region = calibrated(model, *args, qconfig=config, profile="onnxruntime_qdq")
    result = lightning_qat.export_onnx(model, tmp_path / "model.onnx", args)
    assert_proved(result, region)
    assert result.integer_counts() == {"convolution": (6, 6), "addition": (2, 2), "matrix product": (1, 1)}
    assert "onnxruntime computes 6 of 6 convolutions, 2 of 2 additions, 1 of 1 matrix products on int" in result.note


def test_codes_that_are_only_moved_are_quantized_again(tmp_path: Path) -> None:
    """Without that, onnxruntime 1.32 does not load the file with its optimizations; others may lose negative codes."""
    model = Wired(lambda m, x: torch.sigmoid(m.fc(x).reshape(-1, 2, 2).transpose(1, 2)[:, :1]), fc=nn.Linear(4, 4))
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    calibrated(model, x, overrides=[{"match": "sigmoid_0", "activation": {"dtype": "float32"}}])
    lightning_qat.export_onnx(model, tmp_path / "model.onnx", x)
    model.eval()
    with torch.no_grad():
        for full in (False, True):
            np.testing.assert_allclose(computed(tmp_path / "model.onnx", x, full=full)[0], model(x), atol=1e-5)


def test_only_the_proof_keeps_copies_of_the_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a proof nobody reads what the region made; the file is the same."""
    model, args = ZOO["shared"].make()
    calibrated(model, *args)
    whole = onnx_export.exported(model, args)
    assert all(list(one.form.references) == list(one.form.uses) for one in whole.deployed)
    found: list[onnx_export.Exported] = []

    def kept(*args: Any, **kwargs: Any) -> onnx_export.Exported:
        found.append(export(*args, **kwargs))
        return found[-1]

    export = onnx_export.exported
    monkeypatch.setattr(onnx_export, "exported", kept)
    lightning_qat.export_onnx(model, tmp_path / "model.onnx", args, verify=False)
    assert [one.form.references for one in found[0].deployed] == [{}]
    assert (tmp_path / "model.onnx").read_bytes() == whole.proto.SerializeToString()
