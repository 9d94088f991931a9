"""Points that the hardware can only raise together, under profiles made for each case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.analysis.mixed_precision.measure_choices import measure_choices
from lightning_qat.analysis.mixed_precision.measure_errors import measure_errors
from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.hardware_profile_files import parse_profile
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
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


class Zeros(nn.Module):
    """A gain that begins at zero, as in a residual branch, beside a cache that is empty and a branch of few batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.gain = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x) + self.two(x) * self.gain
        y = torch.cat([x[:0] * 2.0, y])
        if x.shape[0] > 8:
            y = y + self.two(y).tanh()
        return self.last(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("profile", [None, "generic_int8_int16", "onnxruntime_qdq"])
def test_points_without_a_known_error_are_raised_with_all_others(profile: str | None) -> None:
    """Zeros have no scale until training moves them, and a branch has no error if no batch runs it. Raising all points
    is still asking for the wide type, and raising one leaves the planner nothing to convert there.
    """
    batches = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (16, 5)]

    def region_at(dtype: str, overrides: list[dict[str, Any]] | None = None) -> Region:
        qconfig = {"activation": {"dtype": dtype, "observer": "minmax"}, "weight": {"dtype": dtype}}
        made = insert(Zeros().eval(), batches=batches, qconfig=qconfig, overrides=overrides or (), profile=profile)
        calibrate(made, batches)
        made.set_state("quantize")
        return made

    region = region_at("int8")
    idle = {name for name in region.points if name.startswith(("two@1", "tanh_0", "add_1"))}
    empty = {name for name, point in region.points.items() if point.scale_source is None}
    assert idle
    assert empty
    errors = measure_errors(region, batches[1:], profile=profile)
    assert set(errors.not_reached) == idle & set(errors.by_point)
    assert f"Nothing is known of {len(errors.not_reached)} points that no batch ran." in errors.note
    assert {row.mse for row in errors.rows if row.point in empty | idle} == {0.0}
    assert {row.exact for row in errors.rows if row.point in idle} == {False}
    raised, at_once = region_at("int8", errors.choose(share="100%").overrides), region_at("int16")
    assert {n: p.dtype for n, p in raised.points.items()} == {n: p.dtype for n, p in at_once.points.items()}
    for x in batches:
        assert torch.equal(raised.target(x), at_once.target(x))
    measured = measure_choices(region, batches, errors.choose(share="100%"), profile=profile)
    assert measured.rows[0].measured == measured.widest
    planned = set(at_once.points) | set(region.points)
    for point in errors.together:
        assert set(region_at("int8", errors.choose(points=[point]).overrides).points) <= planned


@pytest.mark.parametrize("skip", [False, True])
def test_a_wide_type_that_no_reader_takes_gains_nothing(skip: bool) -> None:
    """A gelu of int8 behind a linear layer that gives int16: the planner rounds to int8 in front of it. What is said of
    all points is what a plan at int16 gives. Where a sum reads the same tensor too, raising it gains something.
    """

    def function(module: Any, x: Tensor) -> Tensor:
        y = module.one(x)
        z = module.two(torch.nn.functional.gelu(y))
        return module.last(y + z if skip else z)  # type: ignore[no-any-return]

    def region_at(dtype: str, overrides: list[dict[str, Any]] | None = None) -> Region:
        torch.manual_seed(0)
        model = Wired(function, one=nn.Linear(4, 16), two=nn.Linear(16, 16), last=nn.Linear(16, 4)).eval()
        qconfig = {"activation": {"dtype": dtype, "observer": "minmax"}, "weight": {"dtype": dtype}}
        profile = "horizon_plugin_pytorch"
        made = insert(model, (x,), qconfig=qconfig, overrides=overrides or (), profile=profile)
        calibrate(made, [x])
        made.set_state("quantize")
        return made

    def error(region: Region) -> float:
        with torch.no_grad():
            found = region.target(x)
            with region.state("off"):
                return float((found - region.target(x)).square().mean())

    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    errors = measure_errors(region_at("int8"), [x])
    own = errors.by_point["one.output"]
    assert (own["int16"].mse < own["int8"].mse) is skip
    if not skip:
        rounded_twice = error(region_at("int16"))  # to int16 and then to int8, which is nearly the same
        assert errors.checks[1].measured == pytest.approx(rounded_twice, rel=0.05)
    assert ("one.output" in errors.choose(budget=1.0).raised) is skip
    raised = region_at("int8", errors.choose(share=1.0).overrides)
    assert torch.equal(raised.target(x), region_at("int16").target(x))
