"""Sensitivity by isolation (B1, B2), against models that are quantized by hand."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.analysis import metrics
from lightning_qat.analysis.sensitivity.isolation import choose_points
from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.analysis.sensitivity.sensitivity_result import (
    SensitivityResult,
    SensitivityRow,
    most_sensitive_first,
)
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from lightning_qat.reporting.files import write_csv, write_json

INT4 = {"activation": {"dtype": "int4"}, "weight": {"dtype": "int4"}}


class Net(nn.Module):
    """Two heads in a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(64, 3)
        self.other = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = F.relu(self.conv(x)).flatten(1)
        return {"map": [self.head(h), self.other(h)], "argmax": h.argmax(1)}


def calibrated(model: nn.Module, *calls: Any, observer: str = "minmax", **kwargs: Any) -> Region:
    region = insert(model, batches=calls, qconfig=INT4, **kwargs)
    model.eval()
    with region.state("observe"), torch.no_grad():
        for call in calls:
            model(*call[0], **call[1]) if isinstance(call, tuple) else model(call)
    region.compute_scales(observer)
    return region


@pytest.fixture
def net() -> tuple[Net, Region, Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 2, 6, 6)
    return model, calibrated(model, x), x


def by_hand(model: Net, region: Region, point: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The forward written out, with one point quantized: both heads."""

    def q(name: str, value: Tensor) -> Tensor:
        return region.points[name](value) if name == point else value

    with torch.no_grad():
        weight = q("conv.weight", model.conv.weight)
        h = F.relu(F.conv2d(q("conv.input0", x), weight, model.conv.bias))
        h = q("relu_0.output", h).flatten(1)
        head = F.linear(h, q("head.weight", model.head.weight), model.head.bias)
        return head, F.linear(h, q("other.weight", model.other.weight), model.other.bias)


@pytest.mark.parametrize("metric", ["L1", "MSE", "Cosine", "SQNR", "KL"])
def test_each_row_is_the_change_that_this_point_alone_makes(
    metric: metrics.MetricName, net: tuple[Net, Region, Tensor]
) -> None:
    """B2: over two batches, on one output, sorted with the most sensitive first."""
    model, region, x = net
    batches = [x, torch.randn(4, 2, 6, 6)]
    result = sensitivity(region, batches, output="map.0", metric=metric)
    assert {row.point for row in result.rows} == set(region.points)
    functions = {"L1": metrics.l1, "MSE": metrics.mse, "Cosine": metrics.cosine, "SQNR": metrics.sqnr, "KL": metrics.kl}
    for row in result.rows:
        base = torch.cat([by_hand(model, region, "", batch)[0] for batch in batches])
        analy = torch.cat([by_hand(model, region, row.point, batch)[0] for batch in batches])
        assert row.value == pytest.approx(functions[metric](base, analy).item(), rel=1e-4, abs=1e-12), row.point
        assert row.score == pytest.approx(math.sqrt(F.mse_loss(analy, base).item()), rel=1e-4)
    values = [row.value for row in result.rows]
    assert values == sorted(values, reverse=metric not in ("Cosine", "SQNR"))
    assert next(row for row in result.rows if row.point == "other.weight").score == 0


def test_columns_are_those_of_the_source_then_our_own(net: tuple[Net, Region, Tensor], tmp_path: Path) -> None:
    """B2: op_name, sensitive_type, op_type, <metric>, quant_dtype."""
    _, region, x = net
    result = sensitivity(region, [x], metric="SQNR")
    with open(write_csv(result, tmp_path / "sensitivity.csv"), newline="") as file:
        reader = csv.DictReader(file)
        rows = {row["point"]: row for row in reader}
    assert list(reader.fieldnames or ())[:5] == ["op_name", "sensitive_type", "op_type", "SQNR", "quant_dtype"]
    expected = {"op_name": "conv", "sensitive_type": "weight", "op_type": "conv2d", "quant_dtype": "int4"}
    assert expected.items() <= rows["conv.weight"].items()
    assert rows["conv.input0"]["sensitive_type"] == rows["relu_0.output"]["sensitive_type"] == "activation"
    data = json.loads(write_json(result, tmp_path / "sensitivity.json").read_text())
    assert (data["metric"], data["points"], data["left_out"]) == ("SQNR", len(region.points), [])


def test_post_processing_is_part_of_what_is_measured(net: tuple[Net, Region, Tensor]) -> None:
    """B1: sigmoid after the output."""
    model, region, x = net
    result = sensitivity(region, [x], output="map.1", post_process=torch.sigmoid)
    base = by_hand(model, region, "", x)[1].sigmoid()
    for row in result.rows:
        analy = by_hand(model, region, row.point, x)[1].sigmoid()
        assert row.value == pytest.approx(F.mse_loss(analy, base).item(), rel=1e-4, abs=1e-14)
    assert "'map.1' after sigmoid" in result.note


def test_all_float_outputs_count_if_none_is_chosen(net: tuple[Net, Region, Tensor]) -> None:
    """B1: one long vector of all heads; indices are left out."""
    model, region, x = net
    base = torch.cat([t.flatten() for t in by_hand(model, region, "", x)])
    row = next(row for row in sensitivity(region, [x]).rows if row.point == "conv.weight")
    analy = torch.cat([t.flatten() for t in by_hand(model, region, "conv.weight", x)])
    assert row.value == pytest.approx(F.mse_loss(analy, base).item(), rel=1e-4)


def test_unknown_output_lists_the_paths(net: tuple[Net, Region, Tensor]) -> None:
    """B1."""
    _, region, x = net
    with pytest.raises(ConfigurationError, match=r"no output 'map.2'.*Outputs: map.0, map.1, argmax"):
        sensitivity(region, [x], output="map.2")


def test_nothing_is_changed_by_it(net: tuple[Net, Region, Tensor]) -> None:
    """Foundation: leaves no trace, also with an error in the middle."""
    model, region, x = net
    model.train()
    model.head.eval()
    region.set_state("quantize", updates=("weight", "activation"))
    region.points["head.weight"].enabled = False
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    rng, modes = torch.get_rng_state(), [m.training for m in model.modules()]

    def fails(output: Any) -> Any:
        raise ZeroDivisionError

    sensitivity(region, [x])
    with pytest.raises(ZeroDivisionError):
        sensitivity(region, [x], output=fails)
    after = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert region.current_state == "quantize"
    assert region.updates == {"weight", "activation"}
    assert [name for name, f in region.points.items() if not f.enabled] == ["head.weight"]
    assert all(p.grad is None for p in model.parameters())


def test_random_and_stateful_models_are_compared_under_equal_conditions() -> None:
    """B2: the change is due to the point alone."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x) + 100 * random.random() + 100 * torch.rand(4) + 100 * float(self.calls)

    model, x = Noisy(), torch.randn(2, 4)
    region = calibrated(model, x)
    calls = model.calls.clone()
    row = next(row for row in sensitivity(region, [x]).rows if row.point == "linear.weight")
    with torch.no_grad():
        change = F.linear(x, region.points["linear.weight"](model.linear.weight) - model.linear.weight)
    assert row.value == pytest.approx(change.square().mean().item(), rel=1e-3)
    assert torch.equal(model.calls, calls)


def test_budget_takes_turns_until_all_points_were_measured(net: tuple[Net, Region, Tensor]) -> None:
    """Foundation: a budget of points, fair and repeatable."""
    _, region, x = net
    everything = {row.point: row.value for row in sensitivity(region, [x]).rows}
    seen: list[str] = []
    for turn in range(3):
        result = sensitivity(region, [x], max_points=2, turn=turn, seed=5)
        assert len(result.rows) == 2
        assert {row.point for row in result.rows} | set(result.left_out) == set(region.points)
        assert all(row.value == everything[row.point] for row in result.rows)
        assert "2 of 5 points by isolation, 3 left out" in result.note
        seen += [row.point for row in result.rows]
    assert set(seen) == set(everything)


@pytest.mark.parametrize(("count", "budget"), [(1, 1), (7, 3), (10, 4), (64, 10)])
def test_every_point_is_chosen_equally_often(count: int, budget: int) -> None:
    names = [f"p{i}" for i in range(count)]
    chosen = [name for turn in range(count) for name in choose_points(names, budget, seed=1, turn=turn)]
    assert {chosen.count(name) for name in names} == {min(budget, count)}
    assert choose_points(names, budget, seed=1) == choose_points(names, budget, seed=1)


def test_points_that_cannot_be_measured_are_named() -> None:
    """Foundation: nothing silently."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, second: bool = False) -> Tensor:
            return (self.b(x) if second else self.a(x)).relu()

    model, x = Branch(), torch.randn(2, 4)
    region = calibrated(model, ((x,), {}), ((x,), {"second": True}))
    region.points["a.weight"].scale_source = None
    result = sensitivity(region, [x])
    assert result.uncalibrated == ("a.weight",)
    assert "b.weight" in result.not_reached
    assert {row.point for row in result.rows} == {
        name for name in region.points if name not in (*result.uncalibrated, *result.not_reached)
    }
    both = sensitivity(region, [x, ((x,), {"second": True})])
    assert both.not_reached == ()
    alone = sensitivity(region, [((x,), {"second": True})])
    value = {row.point: row.value for row in both.rows}["b.weight"]
    assert value == pytest.approx(next(r for r in alone.rows if r.point == "b.weight").value / 2)


def test_shared_weight_is_one_point() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(self.linear(x)), self.linear.weight)

    model, x = Tied(), torch.randn(2, 4)
    region = calibrated(model, x)
    weights = [row for row in sensitivity(region, [x]).rows if row.role == "weight"]
    assert len(weights) == 1
    fq = region.points[weights[0].point](model.linear.weight)
    with torch.no_grad():
        base = F.linear(F.relu(F.linear(x, model.linear.weight, model.linear.bias)), model.linear.weight)
        analy = F.linear(F.relu(F.linear(x, fq, model.linear.bias)), fq)
    assert weights[0].value == pytest.approx(F.mse_loss(analy, base).item(), rel=1e-4)


def test_output_that_becomes_nan_or_changes_its_shape_comes_first() -> None:
    class Fragile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(F.relu(x))

    rows = [
        SensitivityRow("a", "weight", "linear", 1.0, "int8", "a.weight", 1.0, True),
        SensitivityRow("b", "weight", "linear", math.nan, "int8", "b.weight", math.nan, True),
        SensitivityRow("c", "weight", "linear", 2.0, "int8", "c.weight", 1.0, True),
    ]
    assert [row.op_name for row in most_sensitive_first(rows, "MSE")] == ["b", "c", "a"]
    assert [row.op_name for row in most_sensitive_first(rows, "SQNR")] == ["b", "a", "c"]
    region = calibrated(Fragile(), torch.tensor([[0.001, 100.0]]))
    result = sensitivity(region, [torch.tensor([[0.001, 100.0]])])  # the small value is rounded to 0: log(0)
    assert not math.isfinite(result.rows[0].value)


def test_infinite_elements_of_the_float_output_are_left_out() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return torch.cat([y, torch.full_like(y, -torch.inf)], 1)

    model, x = Masked(), torch.randn(2, 4)
    region = calibrated(model, x)
    plain = sensitivity(region, [x], output=lambda y: y[:, :4])
    masked = sensitivity(region, [x])
    assert [row.value for row in masked.rows] == pytest.approx([row.value for row in plain.rows], rel=1e-9)


def test_what_cannot_work_is_said(net: tuple[Net, Region, Tensor]) -> None:
    _, region, x = net
    with pytest.raises(ConfigurationError, match=r"unknown metric 'sqnr'.*Choices: L1, MSE"):
        sensitivity(region, [x], metric="sqnr")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="unknown method 'guess'"):
        sensitivity(region, [x], method="guess")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no batch"):
        sensitivity(region, [])
    with pytest.raises(ConfigurationError, match="max_points must be at least 1"):
        sensitivity(region, [x], max_points=0)
    with pytest.raises(ConfigurationError, match="calibrate the region"):
        sensitivity(insert(nn.Sequential(nn.Linear(2, 2)), (torch.ones(1, 2),)), [torch.ones(1, 2)])


def test_results_of_regions_are_sorted_together(net: tuple[Net, Region, Tensor]) -> None:
    _, region, x = net
    result = sensitivity(region, [x], max_points=2)
    merged = SensitivityResult.merged({"left": result, "": result})
    assert len(merged.rows) == 4
    assert [row.value for row in merged.rows] == sorted((row.value for row in merged.rows), reverse=True)
    assert {row.region for row in merged.rows} == {"left", ""}
    assert merged.points == 2 * result.points
    assert merged.left_out[0] == f"left: {result.left_out[0]}"
