"""Every remedy that is printed was tried: it changes what the hardware has, and the error after it stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.analysis.comparison.comparison import compare
from lightning_qat.analysis.diagnosis.diagnosis import diagnose
from lightning_qat.analysis.diagnosis.diagnosis_result import Diagnosis
from lightning_qat.analysis.diagnosis.judgement import allowed_error
from lightning_qat.analysis.diagnosis.remedy import percent
from lightning_qat.analysis.model_check.model_check import check
from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.analysis.statistics.affine_gain import WORTHWHILE_GAIN, affine_gain
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region

Rules = list[dict[str, Any]]
PER_TENSOR = {"weight": {"granularity": "per_tensor"}}


def inserted(make: Callable[[], nn.Module], x: Tensor, rules: Rules = [], **options: Any) -> Region:  # noqa: B006
    torch.manual_seed(0)
    region = insert(make().eval(), (x,), overrides=rules, **options)
    calibrate(region, [x])
    return region


class Folded(nn.Module):
    """Some channels have a tiny input and a tiny variance, so that their folded weights are 300 times the others'."""

    def __init__(self, factor: float = 1 / 300) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8, eps=1e-12)
        self.out = nn.Conv2d(8, 4, 1)
        self.factor = torch.where(torch.arange(8) % 4 == 1, factor, 1.0)
        with torch.no_grad():
            self.norm.running_var.mul_(self.factor**2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x * self.factor[:, None, None])).relu())


PICTURES = torch.randn(4, 8, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("profile", [None, "generic_int8_int16", "onnxruntime_qdq"])
def test_weight_with_one_scale_gets_one_per_channel(profile: str | None) -> None:
    """Folded 300:1, int16 is not the remedy, nor "change the model" under a profile that has a scale per channel.

    Siblings: the model check looks at the folded weight too; channels that a batch norm makes small on purpose are no
    fault.
    """
    region = inserted(Folded, PICTURES, qconfig=PER_TENSOR, profile=profile)
    result = diagnose(compare(region, [PICTURES]))
    found = result.by_point["conv.weight"]
    assert found.verdict == "non-uniform"
    assert yaml.safe_load(found.yaml)["overrides"] == [
        {"match": "conv.weight", "weight": {"granularity": "per_channel"}}
    ]
    assert "per_channel" in found.action
    cured = inserted(Folded, PICTURES, yaml.safe_load(found.yaml)["overrides"], qconfig=PER_TENSOR, profile=profile)
    after = diagnose(compare(cured, [PICTURES])).by_point["conv.weight"]
    assert after.verdict in ("fine", "inherited")
    assert after.severity < found.severity / (found.factor or 4)
    (finding,) = [f for f in check(region).findings if f.kind == "lost channels"]
    assert finding.names == ("conv.weight",)
    assert yaml.safe_load(finding.yaml)["overrides"] == yaml.safe_load(found.yaml)["overrides"]

    def faded() -> nn.Module:
        model = Folded(1.0)
        with torch.no_grad():
            model.norm.weight[:4] = 1e-3
        return model

    region = inserted(faded, PICTURES, qconfig=PER_TENSOR, profile=profile)
    assert "conv.weight" not in [row.point for row in diagnose(compare(region, [PICTURES])).culprits]
    assert not [f for f in check(region).findings if f.kind == "lost channels"]


def test_hardware_with_one_scale_per_weight_is_not_told_to_have_more() -> None:
    signature = [{"input": ["int8", "int16"], "weight": "int8", "output": ["int8", "int16", "float32"]}]
    profile = {
        "name": "one_scale",
        "version": "1",
        "description": "one scale per weight",
        "source": "a test",
        "ops": [{"kinds": "*", "signatures": signature, "weight_granularity": ["per_tensor"]}],
    }
    region = inserted(Folded, PICTURES, profile=profile)
    found = diagnose(compare(region, [PICTURES], profile=profile)).by_point["conv.weight"]  # type: ignore[arg-type]
    assert found.verdict == "non-uniform"
    assert found.yaml == ""
    assert "per_channel" not in found.action
    assert "The hardware has no wider type here" in found.action
    (finding,) = [f for f in check(region, profile=profile).findings if f.kind == "lost channels"]  # type: ignore[arg-type]
    assert finding.yaml == ""
    assert "equalization" in finding.action


ONE_SIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "mish": F.mish,
    "elu": lambda x: F.elu(x, 0.3),
    "relu": F.relu,
    "negative": lambda x: -F.silu(x),
}


@pytest.mark.parametrize("name", ONE_SIDED)
@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
def test_gain_of_an_affine_scheme_is_measured(name: str, observer: str) -> None:
    """Almost one-sided values: what is predicted is what numpy finds if the scheme is changed, in decibels."""
    x = 2 * torch.randn(50_000, generator=torch.Generator().manual_seed(1))
    values = ONE_SIDED[name](x)
    errors = []
    points = []
    for scheme in ("symmetric", "affine"):
        point = FakeQuantize("int8", scheme=scheme, observer=observer)  # type: ignore[arg-type]
        point.observe(values)
        point.compute_scale()
        codes = np.clip(np.round(values.numpy() / float(point.scale)) + int(point.zero_point), -128, 127)
        back = (codes - int(point.zero_point)) * float(point.scale)
        errors.append(float(np.sqrt(((back - values.numpy()) ** 2).mean())))
        points.append(point)
    gain = affine_gain(points[0])
    assert gain is not None
    measured = 20 * np.log10(errors[0] / errors[1])
    if observer == "percentile":  # each scheme cuts off what it likes: the gain is at least that of the same cut
        assert gain >= 1
    else:
        assert measured - 1 < 20 * np.log10(gain) < measured + 0.4  # the observer finds a better range
        assert gain > WORTHWHILE_GAIN
    assert affine_gain(points[1]) is None


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_values_of_both_signs_gain_nothing(offset: float) -> None:
    point = FakeQuantize("int8")
    point.observe(torch.randn(10_000, generator=torch.Generator().manual_seed(1)) + offset)
    point.compute_scale()
    assert affine_gain(point) == 1.0


class Activated(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.fc, self.out, self.name = nn.Linear(8, 32), nn.Linear(32, 4), name

    def forward(self, x: Tensor) -> Tensor:
        return self.out(ONE_SIDED[self.name](4 * self.fc(x)))


TABLE = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["silu", "hardswish", "gelu", "relu"])
def test_model_check_names_almost_one_sided_values(name: str) -> None:
    region = inserted(lambda: Activated(name), TABLE)
    (finding,) = [f for f in check(region).findings if f.kind == "one-sided range"]
    assert finding.names == (f"{name}_0.output",)
    assert "an affine scheme gains" in finding.why
    assert "dB" in finding.why
    cured = inserted(lambda: Activated(name), TABLE, yaml.safe_load(finding.yaml)["overrides"])
    assert not [f for f in check(cured).findings if f.kind == "one-sided range"]
    before, after = (compare(r, [TABLE]).by_name[f"{name}_0"].own_SQNR for r in (region, cured))
    assert before is not None
    assert after is not None
    assert after > before + 3
    profiled = inserted(lambda: Activated(name), TABLE, profile="generic_int8_int16")  # has no affine scheme
    assert not [f for f in check(profiled).findings if f.kind == "one-sided range"]


def culprit(region: Region, x: Tensor, point: str) -> Diagnosis:
    return diagnose(compare(region, [x])).by_point[point]


@pytest.mark.parametrize(("point", "suffices"), [("relu_0.output", True), ("fc.input0", False)])
def test_affine_scheme_is_the_remedy_where_it_suffices(point: str, suffices: bool) -> None:
    """It is cheaper than a wider type; values of both signs get the wider type."""
    rules: Rules = [{"match": point, "activation": {"dtype": "int3", "observer": "minmax", "scheme": "symmetric"}}]
    region = inserted(lambda: Activated("relu"), TABLE, rules)
    found = culprit(region, TABLE, point)
    (printed,) = yaml.safe_load(found.yaml)["overrides"]
    assert printed["activation"] == ({"scheme": "affine"} if suffices else {"dtype": "int8"})
    after = culprit(inserted(lambda: Activated("relu"), TABLE, [*rules, printed]), TABLE, point)
    assert after.verdict == "fine"
    assert found.after is not None
    assert after.severity == pytest.approx(found.after, rel=0.5)


def test_what_is_fine_does_not_depend_on_few_bits_alone() -> None:
    """Three bits allowed an error of 100 %; sixteen hardly anything."""
    assert [allowed_error(bits) for bits in range(2, 17)] == sorted(allowed_error(b) for b in range(2, 17))[::-1]
    assert allowed_error(3) < 0.4
    assert allowed_error(8) == 2.0**-5
    gauss = torch.randn(4096, 8, generator=torch.Generator().manual_seed(1))

    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 1.0).relu()

    for bits in (2, 3, 4):
        for observer, fine in (("mse", True), ("minmax", bits > 3)):
            rules = [
                {
                    "match": "mul_0.input0",
                    "activation": {"dtype": f"int{bits}", "observer": observer, "scheme": "symmetric"},
                }
            ]
            found = culprit(inserted(One, gauss, rules), gauss, "mul_0.input0")
            assert (found.verdict == "fine") == fine, (bits, observer, found.severity)


def test_point_with_sixteen_bits_and_a_tiny_error_stays_as_it_is() -> None:
    """A heavy tail at int16: 0.03 % are no reason for float32, however much less the others have."""
    x = TABLE.clone()
    x[0, 0] = 250.0

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.fc(x.clamp(-4, 4)).relu())

    rules = [{"match": "clamp_0.input0", "activation": {"dtype": "int16", "fixed_scale": "60/32768"}}]
    region = inserted(Scaled, TABLE, rules)
    comparison = compare(region, [TABLE])
    found = diagnose(comparison, sensitivity(region, [TABLE], method="isolation")).by_point["clamp_0.input0"]
    assert 1e-4 < found.severity < 1e-3
    assert found.verdict == "fine"


@pytest.mark.parametrize(
    ("rule", "point"),
    [
        ({"match": "relu_0.output", "activation": {"fixed_scale": 0.5}}, "relu_0.output"),
        ({"match": "relu_0.output", "activation": {"fixed_scale": 0.002}}, "relu_0.output"),
        ({"match": "fc.input0", "activation": {"fixed_scale": 0.3}}, "fc.input0"),
        (
            {"match": "fc.input0", "activation": {"dtype": "int2", "observer": "minmax", "scheme": "symmetric"}},
            "fc.input0",
        ),
        (
            {"match": "relu_0.output", "activation": {"dtype": "int3", "observer": "minmax", "scheme": "symmetric"}},
            "relu_0.output",
        ),
        ({"match": "fc", "weight": {"dtype": "int2", "granularity": "per_tensor", "observer": "minmax"}}, "fc.weight"),
        ({"match": "fc.input0", "activation": {"observer": "percentile", "percentile": 80.0}}, "fc.input0"),
    ],
)
def test_printed_error_is_the_measured_one(rule: dict[str, Any], point: str) -> None:
    """Planted faults of every kind: the error that stands beside the remedy comes, to a factor of two."""
    region = inserted(lambda: Activated("relu"), TABLE, [rule])
    found = culprit(region, TABLE, point)
    assert found.after is not None
    assert f" to {percent(found.after)} (" in found.action
    printed = yaml.safe_load(found.yaml)["overrides"]
    after = culprit(inserted(lambda: Activated("relu"), TABLE, [rule, *printed]), TABLE, point)
    assert after.severity == pytest.approx(found.after, rel=1.0)
    assert after.severity < found.severity


class Dominated(nn.Module):
    """One output channel has values 1000 times as large as the others."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        groups, outputs = {"grouped": (2, 4), "depthwise": (6, 6), "two each": (6, 12)}.get(kind, (1, 6))
        self.conv = nn.ConvTranspose2d(6, outputs, 3, groups=groups, bias=False)
        self.linear = nn.Linear(6, 8, bias=False)
        self.table = nn.Parameter(torch.randn(6, 8))
        with torch.no_grad():
            self.linear.weight[1] *= 1000
            self.table[:, 1] *= 1000
            large = self.conv.weight[0] if kind == "depthwise" else self.conv.weight[: 6 // groups, 0]
            large *= 1000

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "linear":
            return self.linear(x)
        return x @ self.table if self.kind == "product" else self.conv(x[:, :, None, None].expand(-1, -1, 4, 4))


@pytest.mark.parametrize("kind", ["linear", "product", "transposed", "grouped", "depthwise", "two each"])
def test_channel_that_dominates_is_found_wherever_a_weight_holds_its_channels(kind: str) -> None:
    """A parameter on the right of a product, and transposed convolutions with groups, as a linear layer.

    The error with a scale for each channel is that of numpy, on the elements that the channel is computed from.
    """
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    region = inserted(lambda: Dominated(kind), x, qconfig=PER_TENSOR)
    evidence = next(e for e in compare(region, [x]).evidence if e.role == "weight")
    found = diagnose(compare(region, [x])).by_point[evidence.point]
    assert found.verdict == "non-uniform"
    printed = yaml.safe_load(found.yaml)["overrides"]
    assert printed == [{"match": evidence.point, "weight": {"granularity": "per_channel"}}]

    model = region.target
    weight = {"linear": model.linear.weight, "product": model.table}.get(kind, model.conv.weight)
    channels = []
    for channel in range(model(x).shape[1]):
        (gradient,) = torch.autograd.grad(model(x)[:, channel].sum(), weight)
        channels.append(weight.detach()[gradient != 0].double().numpy())
    assert evidence.channels == len(channels)
    steps = [np.abs(values).max() / 127 for values in channels]
    errors = [np.square(np.round(v / s) * s - v).sum() for v, s in zip(channels, steps, strict=True)]
    assert evidence.per_channel is not None
    assert evidence.per_channel <= sum(errors) * 1.001  # one that cuts off a little is better

    cured = inserted(lambda: Dominated(kind), x, printed, qconfig=PER_TENSOR)
    after = diagnose(compare(cured, [x])).by_point[evidence.point]
    assert after.verdict in ("fine", "inherited")


def test_model_check_looks_at_the_channels_of_grouped_transposed_convolutions() -> None:
    """Lost beside a large one, and dead: as the weight stands, no axis holds the channels."""
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    (lost,) = [
        f for f in check(inserted(lambda: Dominated("grouped"), x, qconfig=PER_TENSOR)).findings if "lost" in f.kind
    ]
    assert lost.names == ("conv.weight",)
    assert "conv.weight (3)" in lost.what  # of four

    def dead() -> nn.Module:
        model = Dominated("grouped")
        with torch.no_grad():
            model.conv.weight[3:, 1] = 0.0
        return model

    for options in ({}, {"qconfig": PER_TENSOR}):
        (found,) = [f for f in check(inserted(dead, x, **options)).findings if f.kind == "dead channels"]
        assert "conv.weight (1)" in found.what
