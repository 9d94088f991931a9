"""The trend test behind the convergence monitor (C1), against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_qat.analysis.pipeline.trend import block_length, mann_kendall

SERIES = st.lists(st.floats(-100, 100, allow_subnormal=False).map(lambda v: round(v, 2)), min_size=4, max_size=40)


@given(SERIES)
def test_direction_is_that_of_scipy(values: list[float]) -> None:
    """Kendall's tau for the sign of the statistic."""
    trend = mann_kendall(values)
    tau = stats.kendalltau(np.arange(len(values)), values).statistic
    if not math.isnan(tau) and abs(trend.z) > 0:
        assert math.copysign(1, trend.z) == math.copysign(1, tau)


@given(SERIES)
def test_probability_is_that_of_kendalls_test_but_for_the_continuity_correction(values: list[float]) -> None:
    """scipy's asymptotic p-value has the same variance with ties, without the correction by one vote."""
    if len(set(values)) < 2:
        assert mann_kendall(values).p_rise == 1.0
        return
    n = len(values)
    result = stats.kendalltau(np.arange(n), values, method="asymptotic", alternative="greater")
    z = float(stats.norm.isf(result.pvalue))
    trend = mann_kendall(values)
    votes = sum(np.sign(values[j] - values[i]) for i in range(n) for j in range(i + 1, n))
    if votes:
        assert trend.z == pytest.approx(z * (abs(votes) - 1) / abs(votes), abs=1e-6)
    assert trend.p_rise + trend.p_fall == pytest.approx(1.0)


def test_level_of_the_test_is_kept_on_correlated_noise() -> None:
    """Without blocks, correlated losses would be called a trend far too often."""
    generator = np.random.default_rng(0)
    alarms = {True: 0, False: 0}
    runs = 200
    for _ in range(runs):
        noise = generator.normal(size=420)
        series = np.convolve(noise, 0.8 ** np.arange(40))[20:420]
        alarms[True] += mann_kendall(series, block_length(series)).p_rise < 0.01
        alarms[False] += mann_kendall(series).p_rise < 0.01
    assert alarms[True] <= 0.03 * runs
    assert alarms[False] > 0.1 * runs


def test_trend_in_noise_is_found() -> None:
    """A rise of two standard deviations over 200 steps."""
    noise = np.random.default_rng(1).normal(size=200)
    trend = mann_kendall(np.linspace(0, 2, 200) + noise, block=4)
    assert trend.p_rise < 1e-4


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0]])
def test_too_short_a_series_has_no_trend(values: list[float]) -> None:
    assert mann_kendall(values).p_rise == 1.0
