"""Scales from statistics (design section 6, foundation 2), against numpy, brute force on raw data, and one process."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.fake_quantize_function import fake_quantize
from lightning_qat.quantization.numerics.dtypes import quant_dtype
from lightning_qat.quantization.numerics.observers import clip_range, scale_for
from lightning_qat.quantization.numerics.range_search import expected_error
from lightning_qat.quantization.numerics.range_statistics import PerChannelStatistics, RangeStatistics
from lightning_qat.quantization.numerics.scales import scale_from_range

RANGES = {
    name: (quant_dtype(name).quant_min, quant_dtype(name).quant_max) for name in ("int4", "int8", "int16", "uint8")
}


def statistics_of(*tensors: Tensor) -> RangeStatistics:
    statistics = RangeStatistics()
    for tensor in tensors:
        statistics.observe(tensor)
    return statistics


def raw_error(x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int]) -> float:
    """Mean squared error on the data themselves, in float64."""
    return (
        (fake_quantize(x.double(), scale.reshape(()), zero_point.reshape(()), *limits) - x.double())
        .square()
        .mean()
        .item()
    )


def distribution(name: str) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(20_000)
    return {
        "normal": x,
        "relu": x.relu(),
        "heavy tails": x * torch.rand(20_000).pow(-0.4),
        "outlier": torch.cat([x, torch.tensor([60.0])]),
        "shifted": x + 2.5,
        "uniform": torch.rand(20_000) * 2 - 1,
        "negative": -x.abs() - 1.0,
        "constant": torch.full((50,), 0.37),
    }[name]


DISTRIBUTIONS = ["normal", "relu", "heavy tails", "outlier", "shifted", "uniform", "negative", "constant"]


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("data", DISTRIBUTIONS)
def test_minmax_scale_equals_the_formula(name: str, data: str) -> None:
    x = distribution(data)
    quant_min, quant_max = RANGES[name]
    low, high = x.double().min().item(), x.double().max().item()
    scale, zero_point = scale_for(statistics_of(x), "minmax", quant_min, quant_max, "symmetric")
    extent = max(-low, high) if quant_min < 0 else high
    if extent > 0:
        assert scale.item() == np.float32(extent / quant_max)
    assert zero_point.item() == 0
    low, high = min(low, 0.0), max(high, 0.0)
    scale, zero_point = scale_for(statistics_of(x), "minmax", quant_min, quant_max, "affine")
    assert scale.item() == np.float32((high - low) / (quant_max - quant_min))
    assert zero_point.item() == np.clip(quant_min - np.rint(low / scale.item()), quant_min, quant_max)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([(-128, 127), (0, 255), (-2, 1), (-32768, 32767), (-127, 127), (0, 65535)]),
    st.sampled_from(["symmetric", "affine"]),
)
def test_every_scale_is_normal_and_every_code_times_it_finite(
    low: float, high: float, limits: tuple[int, int], scheme: str
) -> None:
    low, high = sorted((low, high))
    scale, zero_point = scale_from_range(torch.tensor([low]).double(), torch.tensor([high]).double(), *limits, scheme)
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert 2.0**-126 <= scale.item() <= 2.0**126
    assert limits[0] <= zero_point.item() <= limits[1]
    for code in limits:
        assert ((code - zero_point) * scale).isfinite().all()
    assert scale.reciprocal().isfinite().all()


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("data", ["normal", "heavy tails", "outlier", "shifted", "uniform", "negative"])
def test_percentile_is_numpys_within_a_bin(data: str, percentile: float) -> None:
    x = distribution(data)
    statistics = statistics_of(x)
    width = statistics.histogram.width.item()

    def assert_within_a_bin(actual: float, values: Tensor, percent: float) -> None:
        below, above = (np.percentile(values.numpy(), percent, method=method) for method in ("lower", "higher"))
        assert below - width <= actual <= above + width

    low, high = clip_range(statistics, "percentile", -128, 127, "symmetric", percentile)
    assert_within_a_bin(max(-low.item(), high.item()), x.abs(), percentile)
    low, high = clip_range(statistics, "percentile", -128, 127, "affine", percentile)
    assert_within_a_bin(high.item(), x, percentile)
    assert_within_a_bin(-low.item(), -x, percentile)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("values", [[5.0], [1.0, 2.0, 5.0], [-3.0, 5.0]])
def test_percentile_of_almost_only_zeros_is_everything_observed(scheme: str, values: list[float]) -> None:
    """numpy's percentile is zero at both ends: a scale of nothing would clip all that is not zero."""
    x = torch.zeros(100_000)
    x[: len(values)] = torch.tensor(values)
    assert np.percentile(x.numpy(), [0.01, 99.99]).tolist() == [0.0, 0.0]
    low, high = clip_range(statistics_of(x), "percentile", -128, 127, scheme, 99.99)
    assert (low.item(), high.item()) == (min(0.0, *values), 5.0)


@pytest.mark.parametrize("observer", ["minmax", "ema", "percentile", "mse", "kl"])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("data", [*DISTRIBUTIONS, "almost only zeros"])
def test_every_range_is_within_what_was_observed(observer: str, scheme: str, data: str) -> None:
    x = torch.zeros(50_000).index_fill(0, torch.tensor([0, 9]), 5.0) if "zeros" in data else distribution(data)
    low, high = (end.item() for end in clip_range(statistics_of(x), observer, -128, 127, scheme))
    observed = x.tolist() + ([0.0] if observer == "mse" else [])
    assert min(observed) <= low <= high <= max(observed)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("data", DISTRIBUTIONS)
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_mse_scale_is_as_good_as_the_best_of_brute_force_on_the_raw_data(name: str, data: str, scheme: str) -> None:
    x = distribution(data)
    limits = RANGES[name]
    low, high = x.min().double().clamp(max=0), x.max().double().clamp(min=0)
    found = raw_error(x, *scale_for(statistics_of(x), "mse", *limits, scheme), limits)
    factors = torch.linspace(0.02, 1, 80, dtype=torch.float64)
    candidates = [scale_from_range((f * low)[None], (f * high)[None], *limits, scheme) for f in factors]
    best = min(raw_error(x, *candidate, limits) for candidate in candidates)
    # The values of a bin are not spread quite evenly; a constant can be hit by chance.
    tolerance = (x.abs().max().item() / 1024) ** 2 if data == "constant" else 0.0
    assert found <= best * 1.01 + tolerance


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("data", ["normal", "relu", "heavy tails", "shifted", "uniform"])
def test_expected_error_is_that_of_the_raw_data(name: str, scheme: str, data: str) -> None:
    """For int16 the step is finer than a bin, for int4 much coarser, and much is clipped or nothing."""
    x = distribution(data)
    limits = RANGES[name]
    histogram = statistics_of(x).histogram
    for factor in (0.1, 0.3, 0.77, 1.0):
        low, high = factor * x.min().double().clamp(max=0)[None], factor * x.max().double().clamp(min=0)[None]
        scale, zero_point = scale_from_range(low, high, *limits, scheme)
        error = expected_error(histogram, scale[:, None], zero_point[:, None], *limits) * histogram.width**2 / len(x)
        # Finer than a bin, the outcome on a sample deviates from its expectation.
        assert error.item() == pytest.approx(raw_error(x, scale, zero_point, limits), rel=0.03)


def test_int16_steps_finer_than_a_bin_cost_a_twelfth_of_their_square() -> None:
    x = torch.rand(100_000) * 0.998 + 0.001
    statistics = statistics_of(x)
    scale, zero_point = scale_for(statistics, "minmax", -32768, 32767)
    error = expected_error(statistics.histogram, scale[:, None], zero_point[:, None], -32768, 32767)
    expected = scale.double() ** 2 / 12 * len(x) / statistics.histogram.width**2
    assert error.item() == pytest.approx(expected.item(), rel=1e-3)
    assert statistics.histogram.width.item() > 10 * scale.item()


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("limits", [(-7, 7), (-127, 127)])
def test_per_channel_mse_is_about_as_good_as_brute_force_in_every_channel(scheme: str, limits: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 800) * torch.logspace(-6, 6, 12)[:, None] * torch.rand(12, 800).pow(-0.3)
    statistics = PerChannelStatistics(axis=0, channels=12)
    statistics.observe(x)
    scale, zero_point = scale_for(statistics, "mse", *limits, scheme)
    for channel in range(12):
        row = x[channel]
        factors = torch.linspace(0.1, 1, 60).double()
        ends = [(f * row.min().double().clamp(max=0), f * row.max().double().clamp(min=0)) for f in factors]
        candidates = [scale_from_range(low[None], high[None], *limits, scheme) for low, high in ends]
        best = min(raw_error(row, *candidate, limits) for candidate in candidates)
        assert raw_error(row, scale[channel], zero_point[channel], limits) <= best * 1.1


def test_kl_clips_an_outlier_at_8_bits_and_falls_back_to_minmax_above() -> None:
    x = torch.cat([distribution("normal"), torch.tensor([12.0])])
    statistics = statistics_of(x)
    low, high = clip_range(statistics, "kl", -128, 127)
    assert 2.0 < high.item() < 8.0
    assert low.item() >= -high.item()
    assert clip_range(statistics, "kl", -32768, 32767)[1].item() == 12.0
    assert clip_range(statistics_of(distribution("uniform")), "kl", -128, 127)[1].item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("statistics", "clips", "clips_not"),
    [
        (RangeStatistics(), ["int8", "int9", "uint8"], ["int10", "uint9"]),
        (PerChannelStatistics(0, 2), ["int4", "int5", "uint4"], ["int6", "uint5"]),
    ],
)
def test_kl_needs_bins_that_are_finer_than_the_codes(statistics: Any, clips: list[str], clips_not: list[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 50_000) ** 3
    statistics.observe(x)
    for name in (*clips, *clips_not):
        dtype = quant_dtype(name)
        high = clip_range(statistics, "kl", dtype.quant_min, dtype.quant_max)[1]
        assert bool((high < statistics.range[1]).all()) == (name in clips), name


def test_kl_threshold_is_that_of_a_loop_over_all_thresholds_in_numpy() -> None:
    """Migacz (GTC 2017), written out as there."""
    statistics = statistics_of(distribution("heavy tails").clamp(-30, 30))
    counts = statistics.histogram.counts[0].double().numpy()
    bins, levels = 2048, 128
    magnitudes = counts[bins:].copy()
    magnitudes[1:] += counts[1:bins][::-1]
    magnitudes[0] = 0
    used = np.flatnonzero(magnitudes).max() + 1
    divergences = {}
    for keep in range(levels, used + 1):
        p = magnitudes[:keep].copy()
        groups = np.arange(keep) * levels // keep
        q = np.zeros(keep)
        for group in range(levels):
            members = (groups == group) & (p > 0)
            if members.any():
                q[members] = p[members].mean()
        p[-1] += magnitudes[keep:used].sum()
        p, q = p / p.sum(), q / q.sum()
        filled = p > 0
        divergences[keep] = (p[filled] * np.log(p[filled] / np.maximum(q[filled], 1e-9))).sum()
    threshold = clip_range(statistics, "kl", -128, 127)[1].item() / statistics.histogram.width.item()
    assert divergences[round(threshold)] <= np.quantile(list(divergences.values()), 0.02)


def test_moving_average_starts_as_the_mean_and_goes_on_with_its_momentum() -> None:
    statistics = RangeStatistics(ema_momentum=0.25)
    highs = [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]
    for high in highs:
        statistics.observe(torch.tensor([-high, high]))
    expected = np.mean(highs[:4])
    for high in highs[4:]:
        expected += 0.25 * (high - expected)
    assert [end.item() for end in statistics.ema_range] == pytest.approx([-expected, expected])
    scale, _ = scale_for(statistics, "ema", -128, 127)
    assert scale.item() == pytest.approx(expected / 127)


def test_nan_and_infinities_are_counted_and_left_out() -> None:
    statistics = statistics_of(torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0, -1.0]), torch.tensor([torch.nan]))
    assert ([end.item() for end in statistics.range], statistics.count) == ([-1.0, 2.0], 2)
    assert (statistics.nan_count, statistics.inf_count) == (2, 2)
    assert [end.item() for end in statistics.ema_range] == [-1.0, 2.0]
    nothing = torch.full((1,), torch.nan, dtype=torch.float64)
    assert [end.item() for end in statistics.update_ema(nothing, nothing)] == [-1.0, 2.0]


def test_the_order_of_batches_does_not_matter() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(1000) * 10.0**k for k in (-3, 2, 0, 1)]
    whole, backwards = statistics_of(*parts), statistics_of(*parts[::-1])
    for observer in ("minmax", "percentile", "mse", "kl"):
        expected = scale_for(whole, observer, -128, 127, "affine")
        found = scale_for(backwards, observer, -128, 127, "affine")
        assert [t.tolist() for t in found] == [t.tolist() for t in expected]
    assert whole.ema_range[1].item() == pytest.approx(np.mean([part.max().item() for part in parts]))


def test_nothing_of_the_layout_of_memory_is_seen() -> None:
    x = torch.randn(2, 3, 8, 8)
    plain = statistics_of(x).state_dict()["histogram"]
    for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(1, 3), x.requires_grad_()):
        assert torch.equal(statistics_of(other).state_dict()["histogram"]["counts"], plain["counts"])
    first, last = PerChannelStatistics(1, 3), PerChannelStatistics(-1, 3)
    first.observe(x)
    last.observe(x.movedim(1, -1))
    assert torch.equal(first.histogram.counts, last.histogram.counts)
    assert torch.equal(first.range[0].float(), x.amin((0, 2, 3)))


def test_unknown_and_fixed_observers_and_wrong_channels_are_clear_errors() -> None:
    with pytest.raises(ConfigurationError, match="'percentile'"):
        clip_range(RangeStatistics(), "percentil", -128, 127)
    with pytest.raises(ConfigurationError, match="fixed_scale"):
        clip_range(RangeStatistics(), "fixed", -128, 127)
    with pytest.raises(ConfigurationError, match="3 channels at axis 1"):
        PerChannelStatistics(1, 3).observe(torch.zeros(3, 2))


def rank_data(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(4, 300, generator=generator) * 10.0**k for k in (rank, rank - 2)]


def reduce_on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name, statistics in (("tensor", RangeStatistics()), ("channels", PerChannelStatistics(0, 4))):
        for x in rank_data(rank):
            statistics.observe(x)
        statistics.all_reduce()
        results[name] = statistics.state_dict()
    one_sided = RangeStatistics()
    if rank == 1:
        one_sided.observe(torch.tensor([1.0, -3.0, torch.nan]))
    one_sided.all_reduce()
    results["one rank saw nothing"] = one_sided.state_dict()
    nothing = RangeStatistics()
    nothing.all_reduce()
    results["nobody saw anything"] = nothing.state_dict()
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same_state(actual[key], value)
        elif key == "ema":
            torch.testing.assert_close(actual[key], value, rtol=1e-12, atol=0)
        else:
            assert torch.equal(torch.as_tensor(actual[key]), torch.as_tensor(value)), key


def test_two_ranks_agree_with_one_process_over_all_data(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(reduce_on_a_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 1))
    for name, statistics in (("tensor", RangeStatistics()), ("channels", PerChannelStatistics(0, 4))):
        for rank in (0, 1):
            for x in rank_data(rank):
                statistics.observe(x)
        for state in (first[name], second[name]):
            assert_same_state(state, statistics.state_dict())
    single = statistics_of(torch.tensor([1.0, -3.0, torch.nan]))
    for state in (first, second):
        assert_same_state(state["one rank saw nothing"], single.state_dict())
        assert_same_state(state["nobody saw anything"], RangeStatistics().state_dict())
        assert torch.equal(state["tensor"]["ema"], first["tensor"]["ema"])  # ranks agree to the bit
