"""Streaming statistics of one point: a few numbers and one bit per code are kept, never the values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.fake_quant.fake_quantize_function import codes_before_clipping
from lightning_qat.quantization.numerics.channel_groups import channel_rows

BINS = 32
"""Bins of the histogram of the codes, at most."""
CHUNK = 1 << 20
"""Values processed at a time: temporary memory is a few dozen MB, whatever the size of the tensor."""


@dataclass
class PointStatistics:
    """Streaming statistics of one point; mergeable, in float64.

    Mean and variance by the pairwise update of Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances" (1979). Non-finite values are counted and enter nothing else. A value is *clipped* if
    its code, before clipping, is outside the range of codes: the values whose gradient fake-quantization blocks.

    Args:
        count: finite values.
        non_finite: NaN and infinities.
        low: smallest value.
        high: largest value.
        mean: mean value.
        m2: sum of squared deviations from the mean.
        quantized: finite values that were quantized (all, or none at a point that is switched off or not calibrated).
        clipped: how many of them were outside the range.
        rounding: sum of squared errors of the values inside the range.
        clipping: sum of squared errors of the values outside the range.
        flipped: weight codes that differ from the last snapshot.
        compared: weight codes that were compared with it.
        above: how many of the clipped values were above the range; the others were below.
        code_low: smallest code hit per channel, float64 ``(channels,)``, counted from the smallest of the type.
        code_high: largest code hit per channel.
        hits: one bit per code of the type, set if any value (of any channel) had it; uint8, packed: 8 KB for int16.
        bins: values inside the range by their code, ``bin_width`` codes to a bin, the smallest first; float64.
    """

    channels: int
    levels: int
    count: float = 0.0
    non_finite: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    mean: float = 0.0
    m2: float = 0.0
    quantized: float = 0.0
    clipped: float = 0.0
    rounding: float = 0.0
    clipping: float = 0.0
    flipped: float = 0.0
    compared: float = 0.0
    above: float = 0.0

    def __post_init__(self) -> None:
        self.code_low = torch.full((self.channels,), math.inf, dtype=torch.float64)
        self.code_high = torch.full((self.channels,), -math.inf, dtype=torch.float64)
        self.hits = np.zeros((self.levels + 7) // 8, dtype=np.uint8)
        self.bins = torch.zeros(-(-self.levels // self.bin_width), dtype=torch.float64)

    @classmethod
    def of(cls, fake_quant: FakeQuantize) -> PointStatistics:
        """Empty statistics that fit a point."""
        return cls(fake_quant.channel_scale.numel(), fake_quant.quant_max - fake_quant.quant_min + 1)

    @property
    def bin_width(self) -> int:
        """Number of codes in a bin of the histogram."""
        return -(-self.levels // BINS)

    @property
    def var(self) -> float | None:
        """Unbiased variance; None of fewer than two values."""
        return self.m2 / (self.count - 1) if self.count > 1 else None

    @property
    def signal(self) -> float:
        """Sum of squares of the values."""
        return self.m2 + self.count * self.mean**2

    @property
    def level_occupancy(self) -> float:
        """Share of the codes of the type that were hit at least once."""
        return float(np.unpackbits(self.hits, count=self.levels).sum()) / self.levels

    @property
    def used_share(self) -> float | None:
        """Distance between smallest and largest code hit, as a share of the range; mean over the channels."""
        seen = self.code_low <= self.code_high
        if not bool(seen.any()) or self.levels < 2:
            return None
        return float(((self.code_high - self.code_low)[seen] / (self.levels - 1)).mean())

    def update(self, value: Tensor, quantized: Tensor, fake_quant: FakeQuantize) -> None:
        """Add a tensor.

        Args:
            value: the float values.
            quantized: what fake-quantization made of them, same shape.
            fake_quant: the point; its scale is that of ``quantized``.
        """
        active = fake_quant.scale_source is not None and fake_quant.enabled
        rows, quantized_rows = _rows(value, fake_quant), _rows(quantized, fake_quant)
        step = max(1, CHUNK // rows.shape[0])
        for x, q in zip(rows.split(step, dim=1), quantized_rows.split(step, dim=1), strict=True):
            if x.numel():
                self._add(x, q, fake_quant if active else None)

    def merge(self, other: PointStatistics) -> None:
        """Add the statistics of another object for the same point."""
        self._merge_moments(other.count, other.mean, other.m2)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        for name in ("non_finite", "quantized", "clipped", "rounding", "clipping", "flipped", "compared", "above"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.code_low = torch.minimum(self.code_low, other.code_low)
        self.code_high = torch.maximum(self.code_high, other.code_high)
        self.hits |= other.hits
        self.bins += other.bins

    def to_tensors(self) -> tuple[Tensor, Tensor]:
        """Everything as one float64 and one uint8 tensor of fixed sizes, to send to other ranks."""
        numbers = torch.tensor([getattr(self, name) for name in _NUMBERS], dtype=torch.float64)
        return torch.cat([numbers, self.code_low, self.code_high, self.bins]), torch.from_numpy(self.hits)

    @classmethod
    def from_tensors(cls, numbers: Tensor, hits: Tensor, channels: int, levels: int) -> PointStatistics:
        """The reverse of :meth:`to_tensors`."""
        sizes = [len(_NUMBERS), channels, channels, len(numbers) - len(_NUMBERS) - 2 * channels]
        values, code_low, code_high, bins = numbers.split(sizes)
        statistics = cls(channels, levels, **dict(zip(_NUMBERS, values.tolist(), strict=True)))
        statistics.code_low, statistics.code_high = code_low.clone(), code_high.clone()
        statistics.bins, statistics.hits = bins.clone(), hits.numpy().copy()
        return statistics

    def _add(self, x: Tensor, q: Tensor, fake_quant: FakeQuantize | None) -> None:
        """Add ``(channels, n)`` values; without ``fake_quant`` only what they are themselves."""
        values = x.reshape(-1).to(torch.float64, copy=True)  # what follows writes into it
        low, high = torch.stack(values.aminmax()).tolist()
        finite = None
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = x.isfinite()
            values = x[finite].double()
            low, high = torch.stack(values.aminmax()).tolist() if values.numel() else (math.inf, -math.inf)
            self.non_finite += x.numel() - values.numel()
        if fake_quant is not None:
            quantized = (q.reshape(-1) if finite is None else q[finite]).to(torch.float64, copy=True)
            self._add_codes(x, finite, quantized.sub_(values).square_(), fake_quant)
        if values.numel():
            mean = values.mean()
            self._merge_moments(values.numel(), *torch.stack([mean, values.sub_(mean).square_().sum()]).tolist())
            self.low, self.high = min(self.low, low), max(self.high, high)

    def _add_codes(self, x: Tensor, finite: Tensor | None, error: Tensor, fake_quant: FakeQuantize) -> None:
        """Add codes, and the squared errors of the finite values."""
        unclipped = _codes_from_smallest(x, fake_quant)
        codes = unclipped.clamp(0, self.levels - 1).nan_to_num_(0.0)  # a diverged run may have a scale that is NaN
        outside = codes != unclipped
        if finite is None:
            lowest, highest = codes.amin(dim=1), codes.amax(dim=1)
        else:
            lowest = torch.where(finite, codes, torch.inf).amin(dim=1)
            highest = torch.where(finite, codes, -torch.inf).amax(dim=1)
            codes, outside, unclipped = codes[finite], outside[finite], unclipped[finite]
        outside = outside.reshape(-1)
        clipped = int(outside.count_nonzero())
        clipping = float(error[outside].sum()) if clipped else 0.0
        self.quantized += error.numel()
        self.clipped += clipped
        self.clipping += clipping
        self.rounding += float((error.masked_fill_(outside, 0.0) if clipped else error).sum())
        counts = torch.bincount(codes.reshape(-1).int(), minlength=self.levels).cpu()
        self.hits |= np.packbits((counts > 0).numpy())
        above = int((unclipped > self.levels - 1).count_nonzero()) if clipped else 0
        self.above += above
        counts[0] -= clipped - above  # what is clipped has the first or the last code
        counts[-1] -= above
        self.bins += (
            F.pad(counts, (0, len(self.bins) * self.bin_width - self.levels)).reshape(len(self.bins), -1).sum(1)
        )
        self.code_low = torch.minimum(self.code_low, lowest.double().cpu())
        self.code_high = torch.maximum(self.code_high, highest.double().cpu())

    def _merge_moments(self, count: float, mean: float, m2: float) -> None:
        total = self.count + count
        if total:
            delta = mean - self.mean
            self.mean += delta * count / total
            self.m2 += m2 + delta**2 * self.count * count / total
        self.count = total


_NUMBERS = tuple(n for n in PointStatistics.__dataclass_fields__ if n not in ("channels", "levels"))


def weight_codes(weight: Tensor, fake_quant: FakeQuantize) -> Tensor:
    """Integer codes of a weight counted from the smallest of the type, on the CPU: one byte each up to 8 bits."""
    levels = fake_quant.quant_max - fake_quant.quant_min + 1
    rows = _rows(weight, fake_quant)
    codes = _codes_from_smallest(rows, fake_quant).nan_to_num_(0.0).clamp_(0, levels - 1)
    return codes.to(torch.uint8 if levels <= 256 else torch.int32).cpu()


def _codes_from_smallest(rows: Tensor, fake_quant: FakeQuantize) -> Tensor:
    """Codes of ``(channels, n)`` values before clipping, counted from the smallest code of the type."""
    scale = fake_quant.channel_scale.detach().to(rows.device).reshape(-1, 1)
    zero_point = fake_quant.channel_zero_point.to(rows.device).reshape(-1, 1)
    return codes_before_clipping(rows, scale, zero_point - fake_quant.quant_min)


def _rows(tensor: Tensor, fake_quant: FakeQuantize) -> Tensor:
    """``(channels, n)``; one row without an axis."""
    return channel_rows(tensor.detach(), fake_quant.axis, fake_quant.groups)
