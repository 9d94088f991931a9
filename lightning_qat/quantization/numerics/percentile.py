"""The percentile observer: its default, its bounds and its search over a histogram."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.numerics.histogram import Histogram, magnitudes
from lightning_qat.quantization.numerics.range_statistics import Statistics
from lightning_qat.quantization.reading.checks import Check

DEFAULT_PERCENTILE = 99.99
"""Share of the values, in percent, that the observer keeps inside the range."""


PERCENTILE = Check(lambda value: 50.0 < value <= 100.0, "in percent, above 50 and at most 100")
"""What a percentile read from a file must be."""


def check_percentile(value: object) -> None:
    """Refuse a percentile that is not above 50 and at most 100: a range must hold more than half of the values.

    Raises:
        ConfigurationError: the value is not a number between these bounds.
    """
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and 50.0 < value <= 100.0):
        raise ConfigurationError(
            f"percentile is in percent, above 50 and at most 100 (such as {DEFAULT_PERCENTILE}), got {value!r}."
        )


def percentile_range(statistics: Statistics, scheme: str, percentile: float) -> tuple[Tensor, Tensor]:
    """Return the percentile of the magnitudes or, affine, of the values at both ends.

    If that many values are exactly zero, return the whole observed range.

    Args:
        statistics: what was observed.
        scheme: ``symmetric`` or ``affine``.
        percentile: in percent.

    Returns:
        Lower and upper ends, float64 ``(channels,)``.

    Raises:
        ConfigurationError: the percentile is out of its bounds.
    """
    check_percentile(percentile)
    histogram = statistics.histogram
    low, high = statistics.range
    share = percentile / 100
    only_zeros = histogram.zeros >= share * histogram.counts.sum(1)
    if scheme == "affine":
        upper = _quantile(histogram.counts, histogram, share) * histogram.width
        lower = -_quantile(histogram.counts.flip(1).roll(1, 1), histogram, share) * histogram.width
        lower, upper = torch.maximum(lower, low), torch.minimum(upper, high)
        is_empty = only_zeros | (lower >= upper)
        return torch.where(is_empty, low, lower), torch.where(is_empty, high, upper)
    bound = torch.maximum(-low, high)
    folded = torch.zeros_like(histogram.counts)
    folded[:, histogram.bins :] = magnitudes(histogram)
    threshold = torch.minimum(_quantile(folded, histogram, share, folded=True) * histogram.width, bound)
    threshold = torch.where(only_zeros | (threshold <= 0), bound, threshold)
    return torch.maximum(-threshold, low), torch.minimum(threshold, high)


def _quantile(counts: Tensor, histogram: Histogram, share: float, folded: bool = False) -> Tensor:
    """Where the cumulative count reaches ``share``, in bin widths, interpolated within the bin."""
    edges = histogram.edges.clone()
    if folded:
        edges[histogram.bins] = 0.0  # magnitudes: the middle bin is [0, 1)
    cumulative = counts.cumsum(1).double()
    target = (share * cumulative[:, -1:]).contiguous()
    column = torch.searchsorted(cumulative, target).clamp_(max=counts.shape[1] - 1)
    inside = counts.gather(1, column).double()
    before = cumulative.gather(1, column) - inside
    left, right = edges[column], edges[column + 1]
    return (left + (right - left) * ((target - before) / inside.clamp(min=1)).clamp(0, 1)).squeeze(1)
