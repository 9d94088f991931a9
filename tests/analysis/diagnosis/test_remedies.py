"""What a diagnosis rests on: the evidence against numpy, the best split against trying all of them (B4, B7, B8)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_qat.analysis.captured_calls import analysis_mode
from lightning_qat.analysis.comparison.evidence_collector import EvidenceCollector
from lightning_qat.analysis.comparison.point_evidence import AxisProfile
from lightning_qat.analysis.diagnosis.remedy import rounded_up
from lightning_qat.analysis.diagnosis.split_remedy import best_split, relative_rms
from lightning_qat.analysis.model_check.divided_values import constant_inputs, divisors
from lightning_qat.quantization.config_values import positive_number
from lightning_qat.quantization.region.insertion import insert


class Divided(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.log((x / y).abs() + 1)


def test_evidence_equals_numpy() -> None:
    """B4: the exact split of the error energy, relative errors by octave, what vanishes, and who divides."""
    x, y = torch.randn(2, 5, 7), torch.randn(2, 5, 7).exp()
    overrides = [{"match": "div_0.input*", "activation": {"fixed_scale": 0.02}}]
    region = insert(Divided(), (x, y), overrides=overrides)
    collector = EvidenceCollector(region)
    with analysis_mode(region):
        for part in (y[:1], y[1:]):
            collector.add("div_0.input1", part)
    (found,) = collector.evidence()
    v = y.double().numpy().ravel()
    codes = np.round(v / 0.02)
    inside = (codes >= -128) & (codes <= 127)
    error = np.clip(codes, -128, 127) * 0.02 - v
    assert (found.count, found.clipped) == (v.size, (~inside).sum())
    assert found.rounding == pytest.approx((error[inside] ** 2).sum(), rel=1e-4)
    assert found.clipping == pytest.approx((error[~inside] ** 2).sum(), rel=1e-4)
    assert found.relative_error == pytest.approx(math.sqrt((error**2).sum() / (v**2).sum()), rel=1e-4)
    assert relative_rms(found) == pytest.approx(math.sqrt(((error / v) ** 2).mean()), rel=1e-4)
    exponents = np.floor(np.log2(v)).astype(int)
    assert [(o.exponent, o.count) for o in found.octaves] == [(e, (exponents == e).sum()) for e in np.unique(exponents)]
    assert found.vanished == (codes == 0).mean()
    assert found.divides == ("div_0",)
    first, second = found.profiles
    assert (first.axis, second.axis) == (1, 2)
    assert second.largest == pytest.approx(y.amax((0, 1)).tolist())
    assert first.inverse_squares == pytest.approx(y.double().square().reciprocal().sum((0, 2)).tolist(), rel=1e-6)


def test_operand_of_a_logarithm_counts_as_a_divisor() -> None:
    region = insert(Divided(), (torch.rand(4), torch.rand(4) + 1))
    assert divisors(region) == {"div_0.input1": ("div_0",), "add_0.output": ("log_0",)}
    assert constant_inputs(region) == frozenset()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-3, 1e4), min_size=4, max_size=8), st.integers(2, 4))
def test_best_split_is_the_best_of_all(values: list[float], groups: int) -> None:
    """B8: contiguous groups with the smallest sum of squared relative errors."""
    x = np.array(values)
    error, sizes = best_split(AxisProfile(0, tuple(x), tuple(x**-2.0)), groups, 127, len(x))

    def cost(lengths: tuple[int, ...]) -> float:
        parts = np.split(x, np.cumsum(lengths)[:-1])
        return float(sum((part.max() / 127) ** 2 / 12 * (part**-2.0).sum() for part in parts))

    ends = itertools.combinations(range(1, len(x)), groups - 1)
    every = [tuple(np.diff([0, *cut, len(x)])) for cut in ends]
    assert sum(sizes) == len(x)
    assert error == pytest.approx(math.sqrt(min(map(cost, every)) / len(x)), rel=1e-9)
    assert cost(sizes) == pytest.approx(min(map(cost, every)), rel=1e-9)


@given(st.floats(1e-12, 1e12))
def test_rounded_up_is_at_least_the_value_and_close(value: float) -> None:
    rounded = rounded_up(value)
    assert value * (1 - 1e-9) <= rounded <= value * 1.0101
    assert positive_number(f"{rounded:g}/127", "fixed_scale") == pytest.approx(rounded / 127)


def test_long_axis_is_cut_in_bounded_memory() -> None:
    """Of 4099 channels, 40 are large: cut at multiples of nine, with the error predicted that this cut makes."""
    values = np.full(4099, 1.0)
    values[2000:2040] = 1000.0
    error, sizes = best_split(AxisProfile(0, tuple(values), tuple(values**-2)), 3, 127, len(values))
    assert sum(sizes) == len(values)
    assert all(size % 9 == 0 for size in sizes[:-1])
    assert sizes[0] <= 2000
    assert sizes[0] + sizes[1] >= 2040
    parts = np.split(values, np.cumsum(sizes)[:-1])
    expected = sum((part.max() / 127) ** 2 / 12 * (part**-2.0).sum() for part in parts)
    assert error == pytest.approx(math.sqrt(expected / len(values)))
    assert sizes[1] < 40 + 2 * 9
