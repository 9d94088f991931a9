"""Exact counts, whatever the order and the split of the data (design section 6, B10), against numpy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.numerics.histogram import Histogram

any_float = st.floats(width=32, allow_nan=True, allow_infinity=True)
wide_float = st.builds(lambda m, e: float(np.float32(m * 2.0**e)), st.floats(-1, 1), st.integers(-140, 127))
batches = st.lists(st.lists(st.one_of(any_float, wide_float), max_size=20), min_size=1, max_size=6)


def histogram_of(*tensors: Tensor, channels: int = 1, bins: int = 16) -> Histogram:
    histogram = Histogram(channels, bins)
    for tensor in tensors:
        histogram.observe(tensor)
    return histogram


def assert_same(a: Histogram, b: Histogram) -> None:
    for name in ("counts", "exponent", "low", "high", "zeros"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.nan_count, a.inf_count) == (b.nan_count, b.inf_count)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches)
def test_counts_are_those_of_numpy_in_exact_arithmetic(lists: list[list[float]]) -> None:
    histogram = histogram_of(*(torch.tensor(values) for values in lists))
    values = np.array([v for values in lists for v in values], dtype=np.float64)
    finite = values[np.isfinite(values)]
    assert histogram.nan_count == np.isnan(values).sum()
    assert histogram.inf_count == np.isinf(values).sum()
    assert histogram.count == len(finite)
    assert histogram.zeros.item() == (finite == 0).sum()
    bound = np.abs(finite).max(initial=0.0)
    smallest = max(-126, math.frexp(bound)[1] - 4) if bound else -126
    assert histogram.exponent.item() == smallest
    index = np.trunc(finite / 2.0**smallest).astype(int) + 16
    assert histogram.counts[0].tolist() == np.bincount(index, minlength=32).tolist()
    if len(finite):
        assert (histogram.low.item(), histogram.high.item()) == (finite.min(), finite.max())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(batches, st.randoms(use_true_random=False))
def test_the_order_of_batches_and_how_they_are_split_do_not_matter(lists: list[list[float]], random: object) -> None:
    tensors = [torch.tensor(values) for values in lists]
    whole = histogram_of(torch.cat(tensors))
    assert_same(histogram_of(*tensors), whole)
    random.shuffle(tensors)  # type: ignore[attr-defined]
    assert_same(histogram_of(*tensors), whole)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(wide_float, any_float, st.floats(-1, 1, width=32)), min_size=1, max_size=30))
def test_rows_of_channels_are_each_the_histogram_of_that_channel(rows: list[tuple[float, float, float]]) -> None:
    x = torch.tensor(rows).T.contiguous()
    histogram = histogram_of(x[:, ::2], x[:, 1::2], channels=3)
    for channel in range(3):
        alone = histogram_of(x[channel])
        assert torch.equal(histogram.counts[channel], alone.counts[0])
        for name in ("exponent", "low", "high", "zeros"):
            assert torch.equal(getattr(histogram, name)[channel], getattr(alone, name)[0]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_counted_by_their_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1000).to(dtype)
    assert_same(histogram_of(x), histogram_of(x.double()))


def test_float64_beyond_the_range_of_float32_is_counted() -> None:
    histogram = histogram_of(torch.tensor([1e300, -1e-300, 0.0], dtype=torch.float64))
    assert histogram.count == 3
    assert histogram.high.item() == 1e300


def test_more_values_than_float32_can_count_are_counted_exactly() -> None:
    histogram = histogram_of(torch.zeros(2**24 + 3, dtype=torch.bfloat16))
    assert histogram.count == histogram.zeros.item() == 2**24 + 3


def test_every_edge_is_where_its_bin_begins() -> None:
    histogram = histogram_of(torch.tensor([15.99, -15.99]))
    assert histogram.width.item() == 1.0
    edges = histogram.edges
    for column in range(1, 32):
        middle = (edges[column] + edges[column + 1]) / 2
        one = histogram_of(torch.tensor([15.99, -15.99]), middle[None])
        assert (one.counts - histogram.counts)[0].nonzero().item() == column


def test_state_is_restored_exactly() -> None:
    histogram = histogram_of(torch.randn(500), torch.tensor([math.nan, math.inf, 0.0]))
    restored = Histogram(bins=16)
    restored.load_state_dict(histogram.state_dict())
    assert_same(restored, histogram)
    restored.observe(torch.randn(5))
    assert histogram.count == 501


def test_observing_under_inference_mode_leaves_usable_tensors() -> None:
    histogram = Histogram(bins=16)
    with torch.inference_mode():
        histogram.observe(torch.randn(10))
    assert not histogram.counts.is_inference()
    histogram.observe(torch.randn(10) * 100)
    assert histogram.count == 20


def test_wrong_bins_and_unlike_histograms_are_clear_errors() -> None:
    with pytest.raises(ConfigurationError, match="power of two"):
        Histogram(bins=100)
    with pytest.raises(ConfigurationError, match="not of the same point"):
        Histogram(bins=16).load_state_dict(Histogram(bins=32).state_dict())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches, st.integers(1, 400), st.integers(1, 3))
def test_a_packed_state_is_one_the_histogram_could_have_come_to(
    lists: list[list[float]], limit: int, channels: int
) -> None:
    """Its wider bins are those that one larger value would have made; extremes, zeros and all counts are exact.

    Saving what was loaded changes nothing any more, also where no bins are wide enough for the limit.
    """
    tensors = [torch.tensor(values).repeat(channels, 1) for values in lists]
    histogram = histogram_of(*tensors, channels=channels, bins=256)
    state = histogram.packed_state(limit)
    restored = Histogram(channels, 256)
    restored.load_state_dict(state)
    doublings = int(restored.exponent[0] - histogram.exponent[0])
    coarsest = not bool(restored.counts[:, : 256 - 3].any() or restored.counts[:, 256 + 4 :].any())
    assert len(state["packed"]) <= limit or coarsest
    assert torch.equal(restored.exponent, histogram.exponent + doublings)
    if doublings and bool((histogram.exponent + doublings < 120).all()):
        top = 2.0 ** (histogram.exponent.double() + doublings + 7)  # the first value of the upper half
        larger = histogram_of(*tensors, top.float()[:, None], channels=channels, bins=256)
        counts = larger.counts.clone()
        counts[:, 256 + 128] -= 1
        assert torch.equal(restored.counts, counts)
    assert restored.count == histogram.count
    for name in ("low", "high", "zeros", "nan_count", "inf_count"):
        assert torch.equal(*(torch.as_tensor(getattr(h, name)) for h in (restored, histogram))), name
    again = Histogram(channels, 256)
    again.load_state_dict(restored.packed_state(limit))
    assert_same(again, restored)


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-4], lambda text: "~" + text[1:], lambda text: "", lambda text: "é"]
)
def test_a_damaged_text_is_a_clear_error(damage: Callable[[str], str]) -> None:
    """Cut off, changed, empty, no such text at all; and one that holds another number of bins."""
    state = histogram_of(torch.randn(100), bins=64).packed_state(500)
    with pytest.raises(ConfigurationError, match="another"):
        Histogram(bins=64).load_state_dict({**state, "packed": damage(state["packed"])})
    with pytest.raises(ConfigurationError, match="another"):
        Histogram(bins=32).load_state_dict({**state, "bins": 32})
    with pytest.raises(ConfigurationError, match="another"):
        Histogram(bins=128).load_state_dict({**state, "bins": 128})
