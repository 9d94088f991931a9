"""Observers: what is kept about the data of a point, and the pure functions that derive a scale from it.

The statistics are gathered once. :func:`clip_range` then chooses the range to represent, by any method and for any
type, and :func:`scale_from_range` turns a range into scale and zero point.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_qat.quantization.errors import ConfigurationError, unknown_choice
from lightning_qat.quantization.histogram import CHANNEL_BINS, TENSOR_BINS, Histogram, reduce_device

ObserverName = Literal["minmax", "ema", "percentile", "mse", "kl", "fixed"]

MIN_SCALE = 2.0**-126
"""The smallest scale: below it, float32 is no longer normal and the inverse overflows."""

ZERO_RANGE_SCALE = torch.tensor(1e-7).item()
"""The scale of data that are all zero. Their true scale would be 0; this is about the epsilon of float32."""


class _Statistics:
    """Histogram, extremes and moving averages of the data of a point, as one row or one row per channel."""

    def __init__(self, channels: int, axis: int | None, bins: int, ema_momentum: float) -> None:
        self.axis = axis
        self.ema_momentum = ema_momentum
        self.histogram = Histogram(channels, bins)
        self.batches = 0
        with torch.inference_mode(False):
            self._ema = torch.zeros(2, channels, dtype=torch.float64, device="cpu")

    @property
    def count(self) -> int:
        """Number of finite values observed."""
        return self.histogram.count

    @property
    def nan_count(self) -> int:
        """Number of NaN observed."""
        return self.histogram.nan_count

    @property
    def inf_count(self) -> int:
        """Number of infinities observed."""
        return self.histogram.inf_count

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value, float64 ``(channels,)``; 0 for a channel without a finite value."""
        low, high = self.histogram.low, self.histogram.high
        return torch.where(low.isfinite(), low, 0.0), torch.where(high.isfinite(), high, 0.0)

    @property
    def ema_range(self) -> tuple[Tensor, Tensor]:
        """Moving averages of the batches' smallest and largest values, float64 ``(channels,)``."""
        low, high = self._ema.to(self.histogram.counts.device)
        return low, high

    @torch.no_grad()
    @torch.inference_mode(False)
    def observe(self, x: Tensor) -> None:
        """Record ``x``. Nothing of ``x`` itself is kept.

        Args:
            x: Floating-point tensor of any shape; for per-channel statistics with the channels at the axis.

        Raises:
            ConfigurationError: If ``x`` does not have the expected number of channels.
        """
        low, high = self.histogram.observe(self._rows(x))
        if bool((low <= high).all()):  # else a channel is empty or has no finite value
            self.update_ema(low, high)

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of ``x``, float64 ``(channels,)``; nothing is recorded, and NaN is handed on."""
        rows = self._rows(x.detach())
        if len(rows) == 1:
            low, high = torch.aminmax(rows)
            return low.reshape(1).double(), high.reshape(1).double()
        return rows.amin(dim=1).double(), rows.amax(dim=1).double()

    def update_ema(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Move the averages towards a batch's extremes, float64 ``(channels,)``, and return them.

        The first batches are averaged evenly until a share falls to ``ema_momentum``: otherwise the first one would
        outweigh a short calibration. A batch with an extreme that is not finite is left out.
        """
        self.batches += 1
        batch = torch.stack([low, high])
        self._ema = self._ema.to(batch.device)
        moved = self._ema + max(self.ema_momentum, 1.0 / self.batches) * (batch - self._ema)
        self._ema = torch.where(batch.isfinite(), moved, self._ema)
        return self._ema[0], self._ema[1]

    def merge(self, other: _Statistics) -> None:
        """Add what ``other`` has observed; moving averages are averaged by their number of batches.

        Raises:
            ConfigurationError: If the two differ in their channels.
        """
        self.histogram.merge(other.histogram)
        total = self.batches + other.batches
        if total:
            self._ema = (self._ema * self.batches + other._ema.to(self._ema.device) * other.batches) / total
        self.batches = total

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the statistics of all ranks, so that all have the same; every rank of ``group`` must call this."""
        self.histogram.all_reduce(group)
        device = reduce_device(group)
        sums = torch.cat([self._ema.flatten().to(device) * self.batches, torch.tensor([self.batches], device=device)])
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        self.batches = int(sums[-1])
        self._ema = (sums[:-1] / max(1, self.batches)).reshape(2, -1).to(self._ema.device)

    def reset(self) -> None:
        """Forget everything."""
        self.histogram = Histogram(self.histogram.channels, self.histogram.bins)
        self._ema = torch.zeros_like(self._ema)
        self.batches = 0

    def state_dict(self) -> dict[str, Any]:
        """Return everything as ints, dicts and CPU tensors, loadable with ``torch.load(weights_only=True)``."""
        return {
            "histogram": self.histogram.state_dict(),
            "ema": self._ema.to("cpu", copy=True),
            "batches": self.batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of :meth:`state_dict`.

        Raises:
            ConfigurationError: If the state has another number of channels.
        """
        self.histogram.load_state_dict(state["histogram"])
        with torch.inference_mode(False):
            self._ema = state["ema"].cpu().clone()
        self.batches = state["batches"]

    def _rows(self, x: Tensor) -> Tensor:
        """``x`` as ``(channels, values)``."""
        if self.axis is None:
            # In the order of memory, so that channels-last data are not copied.
            strides = x.stride()
            order = sorted(range(x.dim()), key=lambda d: -strides[d])
            return x.permute(order).reshape(1, -1)
        if x.dim() == 0 or x.shape[self.axis] != self.histogram.channels:
            raise ConfigurationError(
                f"a tensor of shape {tuple(x.shape)} does not have {self.histogram.channels} channels "
                f"at axis {self.axis}."
            )
        # The size is written out as -1 would be ambiguous for an empty tensor.
        return x.movedim(self.axis, 0).reshape(self.histogram.channels, x.numel() // self.histogram.channels)


class RangeStatistics(_Statistics):
    """What is kept about the tensors of a point with one scale: extremes, their moving averages and a histogram.

    Args:
        ema_momentum: Weight of a new batch in the moving averages.

    Example:
        >>> statistics = RangeStatistics()
        >>> statistics.observe(torch.tensor([-1.0, 3.0, float("nan")]))
        >>> statistics.min, statistics.max, statistics.count, statistics.nan_count
        (-1.0, 3.0, 2, 1)
    """

    def __init__(self, ema_momentum: float = 0.01) -> None:
        super().__init__(1, None, TENSOR_BINS, ema_momentum)

    @property
    def min(self) -> float:
        """Smallest finite value observed; ``inf`` before the first."""
        return self.histogram.low.item()

    @property
    def max(self) -> float:
        """Largest finite value observed; ``-inf`` before the first."""
        return self.histogram.high.item()

    @property
    def ema_min(self) -> float:
        """Moving average of the batches' smallest values."""
        return self._ema[0].item()

    @property
    def ema_max(self) -> float:
        """Moving average of the batches' largest values."""
        return self._ema[1].item()


class PerChannelRange(_Statistics):
    """The same per channel, with histograms of fewer bins, so that per-channel scales can be re-derived as well.

    A weight does not change during calibration: observe it once. (Observing it again changes no scale, it takes time.)
    After training steps, :meth:`reset` first.

    Args:
        axis: The channel axis.
        channels: Number of channels.
        ema_momentum: Weight of a new batch in the moving averages.

    Example:
        >>> statistics = PerChannelRange(axis=0, channels=2)
        >>> statistics.observe(torch.tensor([[1.0, 2.0], [-5.0, 3.0]]))
        >>> statistics.min.tolist(), statistics.max.tolist()
        ([1.0, -5.0], [2.0, 3.0])
    """

    def __init__(self, axis: int, channels: int, ema_momentum: float = 0.01) -> None:
        super().__init__(channels, axis, CHANNEL_BINS, ema_momentum)

    @property
    def min(self) -> Tensor:
        """Smallest finite values observed, float64 ``(channels,)``; ``inf`` before the first."""
        return self.histogram.low

    @property
    def max(self) -> Tensor:
        """Largest finite values observed, float64 ``(channels,)``; ``-inf`` before the first."""
        return self.histogram.high

    @property
    def ema_min(self) -> Tensor:
        """Moving averages of the batches' smallest values, float64 ``(channels,)``."""
        return self._ema[0]

    @property
    def ema_max(self) -> Tensor:
        """Moving averages of the batches' largest values, float64 ``(channels,)``."""
        return self._ema[1]


def scale_for(
    statistics: RangeStatistics | PerChannelRange,
    observer: str,
    quant_min: int,
    quant_max: int,
    scheme: str = "symmetric",
    percentile: float = 99.99,
) -> tuple[Tensor, Tensor]:
    """Derive scale (float32) and zero point (int32), both ``(channels,)``: :func:`clip_range`, then
    :func:`scale_from_range`.

    Raises:
        ConfigurationError: If there is no such observer, or it is ``fixed``, which derives nothing.

    Example:
        >>> statistics = RangeStatistics()
        >>> statistics.observe(torch.tensor([-2.54, 1.0]))
        >>> [t.tolist() for t in scale_for(statistics, "minmax", -128, 127)]
        [[0.019999999552965164], [0]]
    """
    low, high = clip_range(statistics, observer, quant_min, quant_max, scheme, percentile)
    return scale_from_range(low, high, quant_min, quant_max, scheme)


def scale_from_range(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, scheme: str = "symmetric"
) -> tuple[Tensor, Tensor]:
    """Turn ranges of values into scales and zero points.

    Symmetric: ``scale = max(-low, high) / quant_max`` (for an unsigned type ``high / quant_max``), zero point 0.
        Affine: the range is
    extended to contain zero, ``scale = (high - low) / (quant_max - quant_min)`` and ``zero_point = quant_min -
    round(low / scale)``, so zero is represented exactly. Scales are kept normal and small enough that every code times
    the scale is finite; an empty range gives :data:`ZERO_RANGE_SCALE`.

    Args:
        low: Lower ends, ``(channels,)``.
        high: Upper ends, ``(channels,)``.
        quant_min: Smallest code.
        quant_max: Largest code.
        scheme: ``symmetric`` or ``affine``.

    Returns:
        The scale, float32, and the zero point, int32, of the shape of ``low``.

    Example:
        >>> scale, zero_point = scale_from_range(torch.tensor([-1.0]), torch.tensor([3.0]), 0, 255, "affine")
        >>> round(scale.item(), 6), zero_point.item()
        (0.015686, 64)
    """
    low, high = low.double(), high.double()
    if scheme == "affine":
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        extent, steps, largest = high - low, quant_max - quant_min, quant_max - quant_min
    else:
        extent = (torch.maximum(-low, high) if quant_min < 0 else high).clamp(min=0.0)
        steps, largest = quant_max, max(quant_max, -quant_min)
    greatest = min(2.0**126, torch.finfo(torch.float32).max / largest)
    # Rounding to float32 might exceed the greatest scale by half a unit: take one unit off.
    greatest *= 1 - 2.0**-23
    scale = (extent / steps).clamp(MIN_SCALE, greatest).float()
    scale = torch.where(extent == 0, ZERO_RANGE_SCALE, scale)
    if scheme != "affine":
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = (quant_min - (low / scale.double()).round()).clamp(quant_min, quant_max)
    return scale, zero_point.to(torch.int32)


def clip_range(
    statistics: RangeStatistics | PerChannelRange,
    observer: str,
    quant_min: int,
    quant_max: int,
    scheme: str = "symmetric",
    percentile: float = 99.99,
) -> tuple[Tensor, Tensor]:
    """Choose the range of values to represent.

    * ``minmax``: everything observed.
    * ``ema``: moving averages of the batches' smallest and largest values.
    * ``percentile``: symmetric, the percentile of the magnitudes; affine, that of the values, taken at both ends. From
      the histogram, so within a bin. Where that many values are exactly zero, everything observed.
    * ``mse``: the range with the smallest expected squared error, see :func:`expected_error`.
    * ``kl``: the threshold that changes the distribution of the magnitudes least (Migacz, "8-bit Inference with
      TensorRT", GTC 2017). It needs bins that are much finer than the codes; where they are not (more than 8 bits, per
      channel more than 5), everything observed. Affine, the threshold clips the observed range.

    Args:
        statistics: What was observed.
        observer: The method.
        quant_min: Smallest code.
        quant_max: Largest code.
        scheme: ``symmetric`` or ``affine``.
        percentile: In percent, for the method of that name.

    Returns:
        Lower and upper ends, float64 ``(channels,)``, within what was observed.

    Raises:
        ConfigurationError: If there is no such observer, or it is ``fixed``, which derives nothing.
    """
    if observer == "minmax":
        return statistics.range
    if observer == "ema":
        return statistics.ema_range
    if observer == "percentile":
        return _percentile_range(statistics, scheme, percentile)
    if observer == "mse":
        return _mse_range(statistics, quant_min, quant_max, scheme)
    if observer == "kl":
        return _kl_range(statistics, quant_min, quant_max)
    if observer == "fixed":
        raise ConfigurationError("the observer 'fixed' derives no scale from data: give the point a fixed_scale.")
    raise unknown_choice("observer", observer, get_args(ObserverName))


def _percentile_range(statistics: _Statistics, scheme: str, percentile: float) -> tuple[Tensor, Tensor]:
    histogram = statistics.histogram
    low, high = statistics.range
    if scheme == "affine":
        upper = _quantile(histogram.counts, histogram, percentile / 100) * histogram.width
        lower = -_quantile(histogram.counts.flip(1).roll(1, 1), histogram, percentile / 100) * histogram.width
        lower, upper = torch.maximum(lower, low), torch.minimum(upper, high)
        return torch.where(lower < upper, lower, low), torch.where(lower < upper, upper, high)
    bound = torch.maximum(-low, high)
    folded = torch.zeros_like(histogram.counts)
    folded[:, histogram.bins :] = _magnitudes(histogram)
    threshold = torch.minimum(_quantile(folded, histogram, percentile / 100, folded=True) * histogram.width, bound)
    total = histogram.counts.sum(1)
    only_zeros = (histogram.zeros >= percentile / 100 * total) | (threshold <= 0)
    threshold = torch.where(only_zeros, bound, threshold)
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


def _magnitudes(histogram: Histogram) -> Tensor:
    """Counts by bin of magnitude, ``(channels, bins)``."""
    bins = histogram.bins
    negative = histogram.counts[:, :bins].flip(1).roll(1, 1)  # column = magnitude; column 0 is the empty one
    return histogram.counts[:, bins:] + negative


def _mse_range(statistics: _Statistics, quant_min: int, quant_max: int, scheme: str) -> tuple[Tensor, Tensor]:
    """Grid search over shrunken ranges, coarse and then finer around the best one."""
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

    The values are taken as spread evenly over their bin and the error is integrated exactly. With the nearest code
    :math:`k` and :math:`u = x - s k`, the integral from 0 to :math:`x` is :math:`k s^3/12 + u^3/3` within the range,
    and :math:`(x - x_{clip})^3/3` is added beyond it. So a step finer than a bin gives :math:`s^2/12` per value, and
    nothing aliases.

    Args:
        histogram: Of any number of channels.
        scale: Candidates, ``(channels, candidates)``.
        zero_point: Of the same shape.
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
    length = edges.diff(dim=1)
    # In a bin cut down to (almost) a point, the quotient of differences would be only noise.
    is_point = length < 1e-6
    density = torch.where(is_point, 0.0, counts / length)
    # Summation by parts: the sum over bins of density * (difference of the integral) as one product with the integral.
    weight = -torch.nn.functional.pad(density, (1, 1)).diff(dim=1)
    middle, at_points = (edges[:, 1:] + edges[:, :-1]) / 2, torch.where(is_point, counts, 0.0)
    has_points = bool(at_points.any())
    results = []
    for step, zero in zip((scale.double() / width).unbind(1), zero_point.double().unbind(1), strict=True):
        step, bottom, top = step[:, None], quant_min - zero[:, None], quant_max - zero[:, None]
        clipped = torch.minimum(torch.maximum(edges, bottom * step), top * step)
        codes = (clipped / step).round_()
        rest, beyond = clipped - codes * step, edges - clipped
        integral = codes * (step**3 / 12) + (rest * rest * rest + beyond * beyond * beyond) / 3
        error = (integral * weight).sum(1)
        if has_points:
            codes = torch.minimum(torch.maximum((middle / step).round_(), bottom), top)
            error = error + (at_points * (middle - codes * step) ** 2).sum(1)
        results.append(error)
    return torch.stack(results, dim=1)


def _kl_range(statistics: _Statistics, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    histogram = statistics.histogram
    low, high = statistics.range
    levels = quant_max + 1
    if levels > histogram.bins // 8:
        return low, high
    magnitudes = _magnitudes(histogram).double()
    magnitudes[:, 0] = 0.0  # as in TensorRT: zeros are exact whatever the threshold, and there may be very many
    with torch.device("cpu"):  # small tensors: on an accelerator the many calls would cost more
        thresholds = torch.stack([_kl_threshold(row, levels) for row in magnitudes.cpu()])
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
