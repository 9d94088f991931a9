"""Measured choices: the same numbers as from whole models that are planned, calibrated and run with the overrides."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_qat
from lightning_qat.analysis.mixed_precision.measure_choices import MeasuredChoices, measure_choices
from lightning_qat.analysis.mixed_precision.measure_errors import measure_errors
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.planning.hardware_profile_files import parse_profile
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.reporting.files import write_csv, write_json
from tests.analysis.mixed_precision.test_measure_errors import Difference, mse_with, region_at, uneven
from tests.analysis.mixed_precision.test_several_regions import TwoHeads, data, noise, quantized
from tests.harness.state import assert_same
from tests.quantization.models import ResNet, ViT


def images(channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, channels, 16, 16, generator=generator) for _ in range(2)]


def measured_as_a_user_gets_it(model: nn.Module, batches: list[Tensor], result: MeasuredChoices) -> list[float]:
    return [mse_with(model, batches, choice.overrides) for choice in result.choices]


@pytest.mark.parametrize(("make", "channels"), [(ResNet, 1), (ViT, 3)])
def test_a_choice_gives_what_its_overrides_give(make: Callable[[], nn.Module], channels: int) -> None:
    """D2, D5: and with nothing or everything raised, what one type gives everywhere."""
    torch.manual_seed(0)
    model, batches = make().eval(), images(channels)
    region = region_at(model, batches)
    errors = measure_errors(region, batches)
    choices = [errors.choose(points=[]), errors.choose(top=3), errors.choose(share="30%"), errors.choose(share=1.0)]
    result = measure_choices(region, batches, choices)
    expected = measured_as_a_user_gets_it(model, batches, result)
    assert [row.measured for row in result.rows] == pytest.approx(expected, rel=1e-6)
    assert result.narrowest == result.rows[0].measured
    assert result.widest == result.rows[-1].measured == pytest.approx(mse_with(model, batches, [], "int16"), rel=1e-6)
    assert [row.predicted for row in result.rows] == [choice.predicted for choice in choices]
    assert [row.recovered for row in result.rows] == pytest.approx(
        [(expected[0] - error) / (expected[0] - expected[-1]) for error in expected]
    )


@pytest.mark.parametrize("same", [True, False])
def test_what_does_not_add_up_is_measured(same: bool) -> None:
    """The errors of two equal layers cancel, so raising one of the two wins nothing, whatever the prediction says."""
    model, batches = Difference(same), [torch.randn(32, 16, generator=torch.Generator().manual_seed(1))]
    region = region_at(model, batches)
    errors = measure_errors(region, batches)
    (row,) = measure_choices(region, batches, errors.choose(points=["first.weight"])).rows
    assert row.predicted < errors.checks[0].predicted
    assert (row.recovered > 0.02) is not same
    for note in (errors.choose(points=["first.weight"]).note, errors.front().note):
        assert ("do not add up on this model: trust what is measured (lightning_qat.measure_choices)" in note) is same


def test_a_front_is_measured_whole_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = uneven(8, 16, 4)
    region = region_at(model, batches)
    front = measure_errors(region, batches).front()
    result = measure_choices(region, batches, front)
    assert [row.raised for row in result.rows] == [row.raised for row in front.rows]
    assert [row.measured for row in result.rows] == pytest.approx(measured_as_a_user_gets_it(model, batches, result))
    lightning_qat.show(result)
    shown = capsys.readouterr().out
    best = min(range(len(result.rows)), key=lambda number: result.rows[number].measured)
    assert f"The least error is that of choices[{best}]." in " ".join(shown.split())
    with write_csv(front, tmp_path / "front.csv").open(newline="") as file:
        assert [row["added"] for row in csv.DictReader(file)] == [", ".join(row.added) for row in front.rows]
    written = json.loads(write_json(result, tmp_path / "choices.json").read_text())
    assert written["overrides"] == [choice.overrides for choice in front.choices]


def test_points_start_at_the_narrowest_type_that_they_have() -> None:
    """This hardware has no int4 for weights. With all points at int4 they have int8, the next one, not the widest.

    So have them the choice that raises nothing, the check of the sum, and the model as it is planned.
    """
    model, batches = uneven(8, 16, 16, 4)
    signature = {"input": ["int4", "int8", "int16"], "weight": ["int8", "int16"], "output": ["int4", "int8", "int16"]}
    profile = parse_profile({"name": "made up", "ops": [{"kinds": ["linear"], "signatures": [signature]}]}, "test")
    types = ("int4", "int8", "int16")
    region = region_at(model, batches, profile=profile)
    errors = measure_errors(region, batches, dtypes=types, profile=profile)
    assert [check.dtype for check in errors.checks] == list(types)
    assert list(errors.by_point["0.weight"]) == ["int8", "int16"]
    assert list(errors.by_point["1.output"]) == ["int4", "int8", "int16"]
    (row,) = measure_choices(region, batches, errors.choose(points=[]), types, profile=profile).rows
    weights = [{"match": "*.weight", "weight": {"dtype": "int8"}}]
    expected = mse_with(model, batches, weights, "int4", profile=profile)
    assert [row.measured, errors.checks[0].measured] == pytest.approx([expected, expected], rel=1e-6)
    assert errors.checks[0].predicted == pytest.approx(row.predicted)


def test_choices_of_several_regions_are_measured_at_the_final_outputs() -> None:
    float_model = TwoHeads().eval()
    model, _ = quantized(float_model)
    errors = measure_errors(model, data(), dtypes=("int6", "int8"))
    choices = [errors.choose(points=[]), errors.choose(share="20%"), errors.choose(points=["far.0.weight"])]
    result = measure_choices(model, data(), choices, dtypes=("int6", "int8"))
    assert result.power == 1.0
    for row, choice in zip(result.rows, choices, strict=True):
        raised, _ = quantized(float_model, overrides=choice.overrides)
        assert row.measured == pytest.approx(noise(raised, float_model), rel=0.05)  # batches weigh alike there
    only = measure_choices(model, data(), choices, ("int6", "int8"), output="near")
    assert only.rows[2].measured == pytest.approx(only.narrowest)  # the other head does not count


class Ratio(nn.Module):
    """Divides by steps so small beside the largest one that int8 makes them zero, as a table of frequencies has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps = nn.Parameter(torch.logspace(0, 4, 8))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x / (self.steps * 1.0))  # type: ignore[no-any-return]


def test_an_error_that_is_no_number_is_called_infinite() -> None:
    """Its point is raised first, and sentences hold no 1e+100. What is measured is the same number."""
    model, batches = Ratio(), [torch.randn(16, 8, generator=torch.Generator().manual_seed(1))]
    region = region_at(model, batches)
    errors = measure_errors(region, batches)
    choice = errors.choose(top=1)
    assert choice.predicted < 1
    assert "all at int8: predicted infinite, measured" in errors.note
    assert "the predicted error of the output falls from infinite to" in choice.note
    result = measure_choices(region, batches, [errors.choose(points=[]), choice])
    assert result.rows[1].measured < result.rows[0].measured
    assert not any("+100" in text or "nan" in text for text in (errors.note, choice.note, result.note))
    assert json.loads(json.dumps(errors.checks[0].measured)) == errors.checks[0].measured


def test_nothing_is_changed_also_if_it_fails() -> None:
    model, batches = uneven(8, 16, 4)
    region = region_at(model, batches)
    choice = measure_errors(region, batches).choose(top=2)
    before, state = copy.deepcopy(region.target.state_dict()), torch.get_rng_state()
    modes = [module.training for module in region.target.modules()]
    measure_choices(region, batches, choice)
    with pytest.raises(ConfigurationError, match="nothing_there"):
        measure_choices(region, batches, choice, output="nothing_there")
    assert_same(region.target.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in region.target.modules()] == modes
    assert {point.dtype for point in region.points.values()} == {"int8"}


def _none(errors: Any) -> Any:
    return []


@pytest.mark.parametrize(
    ("choose", "dtypes", "message"),
    [
        (_none, ("int8", "int16"), "there is no choice to measure"),
        (lambda errors: [errors.choose(top=1).overrides], ("int8", "int16"), r"what errors.choose\(...\) returns"),
        (
            lambda errors: errors.choose(top=1),
            ("int4", "int8"),
            "to int16, which it does not have here",
        ),
    ],
    ids=["none", "overrides", "other types"],
)
def test_what_is_no_choice_is_one_error(choose: Callable[[Any], Any], dtypes: tuple[str, ...], message: str) -> None:
    model, batches = uneven(8, 16, 4)
    region = region_at(model, batches)
    with pytest.raises(ConfigurationError, match=message):
        measure_choices(region, batches, choose(measure_errors(region, batches)), dtypes)


def test_what_cannot_be_measured_is_one_error() -> None:
    model, batches = uneven(8, 16, 4)
    region = region_at(model, batches)
    choice = measure_errors(region, batches).choose(share=1.0)
    with pytest.raises(ConfigurationError, match="no batch"):
        measure_choices(region, [], choice)
    with pytest.raises(ConfigurationError, match="calibrate the region"):
        measure_choices(insert(model, (batches[0],)), batches, choice)
    other, inputs = uneven(8, 4)
    with pytest.raises(ConfigurationError, match=r"raises .*, which is not here: it is of another model"):
        measure_choices(region_at(other, inputs), inputs, choice)
    with pytest.raises(ConfigurationError, match="TwoHeads has no fake-quants"):
        measure_choices(TwoHeads(), data(), choice)
