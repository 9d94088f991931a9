"""The searches behind the MSE and KL observers, over histograms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_qat.quantization.numerics.histogram import Histogram, magnitudes
from lightning_qat.quantization.numerics.range_statistics import Statistics
from lightning_qat.quantization.numerics.scales import scale_from_range

VALUES_AT_ONCE = 32768
"""How many float64 the error search works on at once: few enough to stay in a processor's cache."""


def mse_range(statistics: Statistics, quant_min: int, quant_max: int, scheme: str) -> tuple[Tensor, Tensor]:
    """Return the range with the smallest :func:`expected_error`, by a grid search over shrunken ranges.

    The search is coarse first, then finer around the best range.

    Args:
        statistics: What was observed.
        quant_min: Smallest code.
        quant_max: Largest code.
        scheme: ``symmetric`` or ``affine``.

    Returns:
        Lower and upper ends, float64 ``(channels,)``.
    """
    histogram = statistics.histogram
    low, high = statistics.range
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    affine = scheme == "affine"
    limit_low, limit_high = low, high
    if not affine:
        limit_high = torch.maximum(-low, high) if quant_min < 0 else high
        limit_low = -limit_high
    # (octaves below the full range, points, refinements): thousands of channels get a shorter search than one tensor.
    whole, single = ((4, 33, 1), (4, 17, 1)) if histogram.channels > 1 else ((9, 97, 3), (6, 25, 2))
    passes = [(True, True, whole)]
    if affine and bool(((low < 0) & (high > 0)).any()):
        # Then each end by itself, twice, as the best one depends on the other.
        passes += [(True, False, single), (False, True, single)] * 2
    best_low, best_high = limit_low, limit_high
    for move_low, move_high, (octaves, points, refinements) in passes:
        for factors in _search_factors(octaves, points, refinements):
            lows, highs = (end[:, None].repeat(1, len(factors)) for end in (best_low, best_high))
            if move_low:
                lows = torch.maximum(lows * factors.to(low.device), limit_low[:, None])
            if move_high:
                highs = torch.minimum(highs * factors.to(low.device), limit_high[:, None])
            scale, zero_point = scale_from_range(lows, highs, quant_min, quant_max, scheme)
            error = expected_error(histogram, scale, zero_point, quant_min, quant_max)
            best = error.argmin(dim=1, keepdim=True)
            best_low, best_high = lows.gather(1, best).squeeze(1), highs.gather(1, best).squeeze(1)
    return torch.maximum(best_low, low), torch.minimum(best_high, high)


def _search_factors(octaves: int, points: int, refinements: int) -> list[Tensor]:
    """Factors by which to change the best range so far: geometric from 1 down, then linear ever closer around 1."""
    gap = octaves / (points - 1)
    coarse = torch.logspace(0, -octaves, points, base=2.0, dtype=torch.float64)
    ranges = [gap / 6**i for i in range(refinements)]
    # 1 comes first: of equally good ranges, argmin takes the present one.
    fine = [torch.cat([torch.ones(1), torch.linspace(1 - r, 1 + r, 13)]).double() for r in ranges]
    return [coarse, *fine]


def expected_error(histogram: Histogram, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    r"""Expected sum of squared errors of quantizing the values of a histogram, in units of its squared bin width.

    The values are assumed to spread evenly over their bin, and the error is integrated exactly. With the nearest code
    :math:`k` and :math:`u = x - s k`, the integral from 0 to :math:`x` is :math:`k s^3/12 + u^3/3` within the range,
    and :math:`(x - x_{clip})^3/3` is added beyond it. So a step finer than a bin gives :math:`s^2/12` per value, and
    nothing aliases.

    Args:
        histogram: The counts, of any number of channels.
        scale: Candidates, ``(channels, candidates)``.
        zero_point: Their zero points, of the same shape.
        quant_min: Smallest code.
        quant_max: Largest code.

    Returns:
        float64 ``(channels, candidates)``.

    Example:
        >>> histogram = Histogram()
        >>> _ = histogram.observe(torch.linspace(0, 15, 15001))
        >>> error = expected_error(histogram, torch.ones(1, 1), torch.zeros(1, 1), 0, 15) * histogram.width**2
        >>> round(error.item() / 15001, 3), round(1 / 12, 3)
        (0.083, 0.083)
    """
    width = histogram.width[:, None]
    counts, edges = _used_bins(histogram)
    length = edges.diff(dim=1)
    # In a bin cut down to (almost) a point, the quotient of differences would be only noise.
    is_point = length < 1e-6
    density = torch.where(is_point, 0.0, counts / length)
    # Summation by parts: the sum over bins of density * (difference of the integral) as one product with the integral.
    weight = -torch.nn.functional.pad(density, (1, 1)).diff(dim=1)
    middle, at_points = (edges[:, 1:] + edges[:, :-1]) / 2, torch.where(is_point, counts, 0.0)
    has_points = bool(at_points.any())
    results = []
    steps, zeros = (scale.double() / width).T[:, :, None], zero_point.double().T[:, :, None]
    at_once = max(1, VALUES_AT_ONCE // edges.numel())
    for step, zero in zip(steps.split(at_once), zeros.split(at_once), strict=True):
        bottom, top = quant_min - zero, quant_max - zero
        clipped = torch.minimum(torch.maximum(edges, bottom * step), top * step)
        beyond = edges - clipped
        codes = (clipped / step).round_()
        rest = clipped.sub_(codes * step)
        integral = (rest * rest).mul_(rest)
        integral += (beyond * beyond).mul_(beyond)
        integral = integral.div_(3).add_(codes.mul_(step**3 / 12))
        error = integral.mul_(weight).sum(2)
        if has_points:
            codes = torch.minimum(torch.maximum((middle / step).round_(), bottom), top)
            error = error + (at_points * (middle - codes * step) ** 2).sum(2)
        results.append(error)
    return torch.cat(results).T


def _used_bins(histogram: Histogram) -> tuple[Tensor, Tensor]:
    """Counts without exact zeros, ``(channels, bins)``, and edges in bin widths, of the bins that any channel uses."""
    counts = histogram.counts.double()
    counts[:, histogram.bins] -= histogram.zeros  # zero is exact in every scheme
    width = histogram.width[:, None]
    # No bin reaches beyond the extremes; an empty channel has no counts.
    low, high = (torch.where(t.isfinite(), t, 0.0)[:, None] / width for t in (histogram.low, histogram.high))
    edges = torch.minimum(torch.maximum(histogram.edges, low), high)
    used = counts.any(dim=0).nonzero()
    if len(used):
        first, last = int(used[0]), int(used[-1]) + 1
        counts, edges = counts[:, first:last], edges[:, first : last + 1]
    return counts, edges


def kl_range(statistics: Statistics, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Clip the observed range at the threshold that changes the distribution of the magnitudes least.

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017. With fewer than 8 bins per code, return the whole range.

    Args:
        statistics: What was observed.
        quant_min: Smallest code.
        quant_max: Largest code.

    Returns:
        Lower and upper ends, float64 ``(channels,)``.
    """
    histogram = statistics.histogram
    low, high = statistics.range
    levels = quant_max + 1
    if levels > histogram.bins // 8:
        return low, high
    counts = magnitudes(histogram).double()
    counts[:, 0] = 0.0  # as in TensorRT: zeros are exact whatever the threshold, and there may be very many
    with torch.device("cpu"):  # small tensors: on an accelerator the many calls would cost more
        thresholds = torch.stack([_kl_threshold(row, levels) for row in counts.cpu()])
    thresholds = thresholds.to(low.device) * histogram.width
    return torch.maximum(-thresholds, low), torch.minimum(thresholds, high)


def _kl_threshold(magnitudes: Tensor, levels: int) -> Tensor:
    """The number of bins to keep, for the smallest divergence of the quantized from the clipped distribution."""
    used = int(magnitudes.nonzero().max()) + 1 if bool(magnitudes.any()) else 0
    if used <= levels:
        return torch.tensor(math.inf, dtype=torch.float64)
    # Every threshold of the original method would take 0.2 s per point; some hundred are as good on smooth
    # distributions.
    keeps = torch.arange(levels, used + 1, max(1, used // 256), dtype=torch.int64)
    if keeps[-1] != used:
        keeps = torch.cat([keeps, torch.tensor([used])])
    p = magnitudes[:used]
    column = torch.arange(used)
    kept = column < keeps[:, None]
    group = (column * levels // keeps[:, None]).clamp(max=levels - 1)
    weight = torch.where(kept & (p > 0), 1.0, 0.0).double()
    sums = torch.zeros(len(keeps), levels, dtype=torch.float64).scatter_add_(1, group, p * weight)
    sizes = torch.zeros_like(sums).scatter_add_(1, group, weight)
    q = (sums / sizes.clamp(min=1)).gather(1, group) * weight
    clipped = p * kept
    tail = p.sum() - clipped.sum(1)
    clipped[torch.arange(len(keeps)), keeps - 1] += tail
    clipped = clipped / clipped.sum(1, keepdim=True)
    # A little mass where only the clipped tail has some, so that the divergence stays finite.
    q = q / q.sum(1, keepdim=True).clamp(min=1e-300)
    ratio = torch.where(clipped > 0, clipped / q.clamp(min=1e-9), 1.0)
    return keeps[(clipped * ratio.log()).sum(1).argmin()].double()
