"""Weights have a percentile of their own; the same bounds and the same sentence hold wherever one is given."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.numerics.observers import clip_range
from lightning_qat.quantization.numerics.percentile import DEFAULT_PERCENTILE
from lightning_qat.quantization.numerics.range_statistics import RangeStatistics
from lightning_qat.quantization.overrides import ActivationOverride, WeightOverride
from lightning_qat.quantization.planning.make_plan import make_plan
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.qconfig import ActivationConfig, QConfig, WeightConfig
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.tracing.tracer import trace

DATA = torch.randn(16, 64)


def quantized(weight: dict[str, Any], activation: dict[str, Any] | None = None, **options: Any) -> Region:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 8))
    qconfig = {
        "weight": {"observer": "percentile", "granularity": "per_tensor", **weight},
        "activation": activation or {},
    }
    region = insert(model, (DATA,), qconfig=qconfig, **options)
    calibrate(region, [DATA])
    return region


def represented(region: Region, point: str) -> float:
    """The largest magnitude that a weight's scale represents."""
    return region.points[point].scale.item() * 127


def assert_keeps(region: Region, point: str, weight: torch.Tensor, percentile: float) -> None:
    """The range ends where numpy's percentile of the magnitudes is, within a bin of the histogram."""
    magnitudes = weight.detach().abs().double().numpy()
    width = region.points[point].statistics.histogram.width.item()  # type: ignore[union-attr]
    below, above = (np.percentile(magnitudes, percentile, method=m) for m in ("lower", "higher"))
    assert below - width <= represented(region, point) * (1 + 1e-6)
    assert represented(region, point) * (1 - 1e-6) <= above + width
    assert above < magnitudes.max()  # it differs from minmax


@pytest.mark.parametrize("percentile", [90.0, 99.0])
def test_a_weight_takes_its_own_percentile(percentile: float) -> None:
    region = quantized({"percentile": percentile}, {"observer": "percentile", "percentile": 60.0})
    assert_keeps(region, "0.weight", region.target[0].weight, percentile)  # type: ignore[index]
    assert region.plan.by_name["0.weight"].percentile == percentile
    assert region.plan.by_name["0.input0"].percentile == 60.0


def test_a_weight_without_one_has_the_default_and_not_that_of_activations() -> None:
    region = quantized({}, {"observer": "percentile", "percentile": 60.0})
    assert_keeps(region, "0.weight", region.target[0].weight, DEFAULT_PERCENTILE)  # type: ignore[index]


def test_an_override_changes_the_percentile_of_one_weight() -> None:
    region = quantized({"percentile": 99.0}, overrides=[{"match": "2", "weight": {"percentile": 75.0}}])
    assert_keeps(region, "0.weight", region.target[0].weight, 99.0)  # type: ignore[index]
    assert_keeps(region, "2.weight", region.target[2].weight, 75.0)  # type: ignore[index]


class Twice(nn.Module):
    """One weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(x, self.weight)), self.weight)


def test_a_weight_used_twice_shares_a_quantizer_only_with_the_same_percentile() -> None:
    graph = trace(Twice(), [(DATA,)])
    second = [{"match": "linear_1", "weight": {"percentile": 75.0}}]
    for observer, shared in (("percentile", None), ("minmax", "linear_0.weight")):
        plan = make_plan(graph, {"weight": {"observer": observer}}, second)
        assert plan.by_name["linear_1.weight"].same_as == shared


BAD = [0.0, 0.9999, 50.0, 100.1, float("nan"), "99.9", True]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_percentile_is_refused_everywhere_with_the_same_sentence(bad: Any) -> None:
    statistics = RangeStatistics()
    statistics.observe(torch.ones(3))
    places = [
        lambda: ActivationConfig(percentile=bad),
        lambda: WeightConfig(percentile=bad),
        lambda: ActivationOverride(percentile=bad),
        lambda: WeightOverride(percentile=bad),
        lambda: QConfig.of({"weight": {"percentile": bad}}),
        lambda: FakeQuantize("int8", percentile=bad),
        lambda: clip_range(statistics, "percentile", -128, 127, percentile=bad),
    ]
    messages = set()
    for place in places:
        with pytest.raises(ConfigurationError) as caught:
            place()
        messages.add(str(caught.value))
    assert messages == {f"percentile is in percent, above 50 and at most 100 (such as 99.99), got {bad!r}."}


def test_one_default_everywhere() -> None:
    found = {ActivationConfig().percentile, WeightConfig().percentile, FakeQuantize("int8").percentile}
    assert found == {DEFAULT_PERCENTILE} == {99.99}


@pytest.mark.parametrize(("observer", "expected"), [("percentile", 97.0), ("minmax", DEFAULT_PERCENTILE)])
def test_a_plan_without_the_key_reads_as_what_was_in_effect(observer: str, expected: float) -> None:
    """Before, weights took the percentile of activations."""
    graph = trace(nn.Linear(4, 4), [(torch.ones(2, 4),)])
    qconfig = {"activation": {"percentile": 97.0}, "weight": {"observer": observer, "percentile": expected}}
    plan = make_plan(graph, qconfig, [{"match": "*", "weight": {"dtype": "int4"}}])
    old = copy.deepcopy(plan.to_dict())
    del old["qconfig"]["weight"]["percentile"]
    del old["overrides"][0]["weight"]["percentile"]
    read = QuantPlan.from_dict(old)
    assert read == plan


def test_a_percentile_under_the_wrong_key_is_explained() -> None:
    graph = trace(nn.Linear(4, 4), [(torch.ones(2, 4),)])
    with pytest.raises(ConfigurationError, match=r"write weight: \{percentile: 98.0\} instead"):
        make_plan(graph, overrides=[{"match": "*.weight", "activation": {"percentile": 98.0}}])
