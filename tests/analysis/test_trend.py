"""The trend test behind the convergence monitor (C1), against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_qat.analysis.trend import autocorrelation_time, block_length, mann_kendall, mean_and_error

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


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_error_of_a_mean_allows_for_correlation(correlation: float) -> None:
    """Against the variance of the mean of a first-order autoregression, sigma^2 (1 + r) / (1 - r) / n."""
    generator = np.random.default_rng(2)
    errors = []
    for _ in range(40):
        noise = generator.normal(size=600)
        series = np.convolve(noise, correlation ** np.arange(60))[60:560]
        errors.append(mean_and_error(series)[1])
    sigma = 1 / math.sqrt(1 - correlation**2)
    expected = sigma * math.sqrt((1 + correlation) / (1 - correlation) / 500)
    assert np.mean(errors) == pytest.approx(expected, rel=0.15)


def test_error_of_few_values_is_that_of_independent_ones() -> None:
    values = [0.3, 0.1, 0.4, 0.1, 0.5]
    assert mean_and_error(values) == pytest.approx((np.mean(values), stats.sem(values)))
    assert mean_and_error([1.0]) == (1.0, math.inf)


@pytest.mark.parametrize("seed", range(4))
def test_autocorrelation_time_is_that_of_the_residuals_of_numpys_line(seed: int) -> None:
    """The definition, value by value; also far from zero, on a steep line and with an even number of values."""
    rng = np.random.default_rng(seed)
    series = np.convolve(rng.normal(size=90 + seed), np.ones(6) / 6, "valid") + 1e4 - 3.0 * np.arange(85 + seed)
    x = np.arange(len(series))
    rest = series - np.polyval(np.polyfit(x, series, 1), x)
    expected = 1.0
    for lag in range(1, min(64, len(series) // 4)):
        correlation = float((rest[:-lag] * rest[lag:]).sum() / (rest**2).sum())
        if correlation <= 0:
            break
        expected += 2 * correlation
    assert expected > 2
    assert autocorrelation_time(list(series)) == pytest.approx(expected, rel=1e-6)
