"""Points that the hardware can only raise together, under profiles made for each case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.analysis.mixed_precision.measure_errors import measure_errors
from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.hardware_profile_files import parse_profile
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from tests.quantization.models import Wired

NARROW = {"input": ["int8"], "weight": ["int8"], "output": ["int8", "int16", "float32"]}
WIDE = {"input": ["int16"], "weight": ["int8", "int16"], "output": ["int8", "int16", "float32"]}
SAME = [{"input": [d], "output": [d, "float32"]} for d in ("int8", "int16")]
ANY = [{"input": ["int8", "int16"], "output": ["int8", "int16", "float32"]}]


def profile_of(linear: list[dict[str, Any]], mul: list[dict[str, Any]]) -> HardwareProfile:
    ops = [{"kinds": "linear", "signatures": linear}, {"kinds": "mul", "signatures": mul}]
    return parse_profile({"name": "made up", "ops": ops}, "test")


def two_branches() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = {name: nn.Linear(4, 4) for name in ("one", "two", "last")}
    model = Wired(lambda module, x: module.last(module.one(x) * module.two(x)), **layers)
    return model.eval(), torch.randn(16, 4)


def measured(profile: HardwareProfile) -> PrecisionErrors:
    model, x = two_branches()
    region = insert(model, (x,), profile=profile)
    calibrate(region, [x])
    return measure_errors(region, [x], profile=profile)


def together(linear: list[dict[str, Any]], mul: list[dict[str, Any]]) -> dict[str, set[str]]:
    return {point: set(others) for point, others in measured(profile_of(linear, mul)).together.items()}


def test_inputs_of_a_product_that_takes_one_type_move_together() -> None:
    found = together([NARROW, WIDE], SAME)
    assert {"one.output", "two.output"} <= found["one.output"]
    assert found["one.output"] == found["two.output"]


def test_inputs_of_a_product_that_takes_both_types_are_raised_alone() -> None:
    found = together([NARROW, WIDE], ANY)
    assert found["one.output"] == {"one.output"}


def test_weight_that_needs_a_wide_input_raises_it_but_not_the_other_way_round() -> None:
    found = together([NARROW, WIDE], ANY)
    assert "mul_0.output" in found["last.weight"]
    assert "last.weight" not in found["mul_0.output"]


def test_weight_and_input_of_one_type_move_together() -> None:
    same = [NARROW, {**WIDE, "weight": ["int16"]}]
    found = together(same, ANY)
    assert found["mul_0.output"] == found["last.weight"] == {"mul_0.output", "last.weight"}


@pytest.mark.parametrize("mul", [SAME, ANY])
def test_a_choice_leaves_the_planner_nothing_to_convert(mul: list[dict[str, Any]]) -> None:
    """Every raised point gets its type, and no new quantizer appears between a wide point and its reader."""
    profile = profile_of([NARROW, WIDE], mul)
    errors = measured(profile)
    for point in errors.together:
        choice = errors.choose(points=[point])
        model, x = two_branches()
        raised = insert(model, (x,), profile=profile, overrides=choice.overrides)
        assert set(raised.points) == set(errors.by_point)
        dtypes = {name: fake_quant.dtype for name, fake_quant in raised.points.items()}
        assert {name for name, dtype in dtypes.items() if dtype == "int16"} == set(choice.raised)
