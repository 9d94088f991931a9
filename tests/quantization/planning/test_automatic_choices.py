"""What ``auto`` means: the scheme of activations and the observer of weights depend on the type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_qat.quantization.planning.hardware_profile_files import parse_profile
from lightning_qat.quantization.planning.make_plan import make_plan
from lightning_qat.quantization.planning.plan import PointPlan
from lightning_qat.quantization.qconfig import QConfig
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.tracing.tracer import trace

SIGNED = [f"int{bits}" for bits in range(2, 17)]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def points(qconfig: dict[str, Any], **options: Any) -> dict[str, PointPlan]:
    return make_plan(trace(model(), [torch.randn(4, 8)]), QConfig.of(qconfig), **options).by_name


@pytest.mark.parametrize("dtype", [*SIGNED, "uint4", "uint8"])
def test_activations_of_few_signed_bits_are_affine_and_all_others_symmetric(dtype: str) -> None:
    found = points({"activation": {"dtype": dtype}})
    assert {p.scheme for p in found.values() if not p.is_weight} == {
        "affine" if dtype in ("int2", "int3", "int4") else "symmetric"
    }
    assert {p.scheme for p in found.values() if p.is_weight} == {"symmetric"}
    assert {p.observer for p in found.values() if not p.is_weight} == {"mse"}


@pytest.mark.parametrize("dtype", SIGNED)
def test_the_range_of_a_weight_of_two_bits_is_searched_and_that_of_others_is_whole(dtype: str) -> None:
    found = points({"weight": {"dtype": dtype}})
    assert {p.observer for p in found.values() if p.is_weight} == {"mse" if dtype == "int2" else "minmax"}


def test_what_is_written_wins_in_the_defaults_and_in_rules() -> None:
    written = {"activation": {"dtype": "int4", "scheme": "symmetric"}, "weight": {"dtype": "int2", "observer": "kl"}}
    found = points(written)
    assert {p.scheme for p in found.values()} == {"symmetric"}
    assert {p.observer for p in found.values() if p.is_weight} == {"kl"}
    rules = [
        {"match": "1.output", "activation": {"scheme": "symmetric"}},
        {"match": "2.weight", "weight": {"observer": "minmax"}},
        {"match": "0.input0", "activation": {"scheme": "auto", "dtype": "int8"}},
    ]
    found = points({"activation": {"dtype": "int4"}, "weight": {"dtype": "int2"}}, overrides=rules)
    assert (found["1.output"].scheme, found["0.input0"].scheme) == ("symmetric", "symmetric")
    assert (found["0.weight"].observer, found["2.weight"].observer) == ("mse", "minmax")


@pytest.mark.parametrize("given", [{"threshold": 2.0}, {"fixed_scale": "2/8"}])
def test_a_given_scale_is_that_of_symmetric_codes(given: dict[str, Any]) -> None:
    found = points({"activation": {"dtype": "int4"}}, overrides=[{"match": "1.output", "activation": given}])
    assert (found["1.output"].scheme, found["1.output"].fixed_scale) == ("symmetric", 0.25)


def test_a_rule_that_narrows_a_point_also_makes_it_affine() -> None:
    found = points({}, overrides=[{"match": "1.output", "activation": {"dtype": "int4"}}])
    assert (found["1.output"].scheme, found["0.input0"].scheme) == ("affine", "symmetric")


def test_hardware_without_affine_types_keeps_symmetric_ones() -> None:
    signatures = [{"input": "int4", "weight": "int4", "output": ["int4", "float32"]}]
    rows: list[dict[str, Any]] = [
        {"kinds": ["linear"], "signatures": signatures},
        {"kinds": ["relu"], "signatures": [{"input": "int4", "output": "int4"}]},
    ]
    qconfig = {"activation": {"dtype": "int4"}, "weight": {"dtype": "int4"}}
    for row in rows:
        row["schemes"] = ["symmetric"]
    found = points(qconfig, profile=parse_profile({"name": "n", "ops": rows}, "n"))
    assert len(found) >= 4
    assert {p.scheme for p in found.values()} == {"symmetric"}
    for row in rows:
        row["schemes"] = ["symmetric", "affine"]
    found = points(qconfig, profile=parse_profile({"name": "n", "ops": rows}, "n"))
    assert {p.scheme for p in found.values() if not p.is_weight} == {"affine"}


@pytest.mark.parametrize("dtype", ["int2", "int3", "int4"])
def test_one_sided_values_have_twice_as_many_codes(dtype: str) -> None:
    net, x = model(), torch.randn(256, 8)
    region = insert(net, (x,), qconfig={"activation": {"dtype": dtype, "observer": "minmax"}})
    calibrate(region, [x])
    point, largest = region.points["1.output"], float(torch.relu(net[0](x)).max().detach())
    codes = 2 ** int(dtype[3:])
    with region.state("off"):
        hidden = torch.relu(net[0](x)).detach()
    grid = np.linspace(0, float(hidden.max()), codes)
    nearest = grid[np.abs(hidden.numpy()[..., None] - grid).argmin(-1)]
    assert largest > 0
    np.testing.assert_allclose(point(hidden).numpy(), nearest, atol=float(hidden.max()) / codes * 0.01)
