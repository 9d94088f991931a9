"""Streaming statistics of one point: a few numbers and one bit per code are kept, never the values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
        code_low: smallest code hit per channel, ``(channels,)``, counted from the smallest of the type.
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
        self.code_low = np.full(self.channels, math.inf)
        self.code_high = np.full(self.channels, -math.inf)
        self.hits = np.zeros((self.levels + 7) // 8, dtype=np.uint8)
        self.bins = np.zeros(-(-self.levels // self.bin_width))

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
        if not seen.any() or self.levels < 2:
            return None
        return float(np.mean((self.code_high - self.code_low)[seen] / (self.levels - 1)))

    @property
    def sqnr(self) -> float | None:
        """Ratio of the sum of squares to that of the squared errors, in dB; None if nothing was quantized."""
        if not self.quantized:
            return None
        error = self.rounding + self.clipping
        ratio = self.signal / error if error else math.inf
        return 10 * math.log10(ratio) if ratio > 0 else math.nan if math.isnan(ratio) else -math.inf

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
        for start in range(0, rows.shape[1], step):
            part = slice(start, start + step)
            x, q = (rows, quantized_rows) if step >= rows.shape[1] else (rows[:, part], quantized_rows[:, part])
            self._add(x, q, fake_quant if active else None)

    def merge(self, other: PointStatistics) -> None:
        """Add the statistics of another object for the same point."""
        self._merge_moments(other.count, other.mean, other.m2)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        for name in ("non_finite", "quantized", "clipped", "rounding", "clipping", "flipped", "compared", "above"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._widen(other.code_low, other.code_high)
        self.hits |= other.hits
        self.bins += other.bins

    def to_tensors(self) -> tuple[Tensor, Tensor]:
        """Everything as one float64 and one uint8 tensor of fixed sizes, to send to other ranks."""
        numbers = torch.tensor([getattr(self, name) for name in _NUMBERS], dtype=torch.float64)
        codes = torch.from_numpy(np.concatenate([self.code_low, self.code_high, self.bins]))
        return torch.cat([numbers, codes]), torch.from_numpy(self.hits)

    @classmethod
    def from_tensors(cls, numbers: Tensor, hits: Tensor, channels: int, levels: int) -> PointStatistics:
        """The reverse of :meth:`to_tensors`."""
        values = numbers.numpy()
        ends = np.cumsum([len(_NUMBERS), channels, channels])
        statistics = cls(channels, levels, **dict(zip(_NUMBERS, values[: ends[0]].tolist(), strict=True)))
        statistics.code_low, statistics.code_high, statistics.bins = (
            part.copy() for part in np.split(values, ends)[1:]
        )
        statistics.hits = hits.numpy().copy()
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
            self._add_codes(x, finite, quantized.sub_(values), fake_quant)
        if values.numel():
            mean = values.mean()
            rest = values.sub_(mean)
            self._merge_moments(values.numel(), *torch.stack([mean, rest.dot(rest)]).tolist())
            self.low, self.high = min(self.low, low), max(self.high, high)

    def _add_codes(self, x: Tensor, finite: Tensor | None, error: Tensor, fake_quant: FakeQuantize) -> None:
        """Add codes, and the errors of the finite values."""
        # one more place at either end, for what is clipped; a diverged run may have a scale that is NaN
        codes = _codes_from_smallest(x, fake_quant, first=1).nan_to_num_(0.0).clamp_(0, self.levels + 1)
        if self.channels > 1:
            self._add_channels(codes, finite)
        codes = codes.reshape(-1) if finite is None else codes[finite]
        counts = torch.bincount(codes.int(), minlength=self.levels + 2).cpu().numpy()
        below, above = int(counts[0]), int(counts[-1])
        if below or above:
            is_clipped = (codes - codes.clamp(1, self.levels)).abs_()  # one or zero
            beyond = error * is_clipped
            self.clipping += float(beyond.dot(beyond))
            error = error.sub_(beyond).nan_to_num_(0.0)
        self.rounding += float(error.dot(error))
        self.quantized += error.numel()
        self.clipped += below + above
        self.above += above
        counts = counts[1:-1]
        hit = counts > 0
        hit[0] |= below > 0
        hit[-1] |= above > 0
        if self.channels == 1 and len(codes):
            self._widen(hit.argmax(), self.levels - 1 - hit[::-1].argmax())
        self.hits |= np.packbits(hit)
        self.bins += np.add.reduceat(counts, np.arange(0, self.levels, self.bin_width))

    def _add_channels(self, codes: Tensor, finite: Tensor | None) -> None:
        """Add the smallest and the largest code of each channel."""
        codes = codes.clamp(1, self.levels).sub_(1).double()
        if finite is None:
            low, high = codes.amin(dim=1), codes.amax(dim=1)
        else:
            low = torch.where(finite, codes, torch.inf).amin(dim=1)
            high = torch.where(finite, codes, -torch.inf).amax(dim=1)
        self._widen(low.cpu().numpy(), high.cpu().numpy())

    def _widen(self, low: NDArray[Any] | np.intp, high: NDArray[Any] | np.intp) -> None:
        np.minimum(self.code_low, low, out=self.code_low)
        np.maximum(self.code_high, high, out=self.code_high)

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


def _codes_from_smallest(rows: Tensor, fake_quant: FakeQuantize, first: int = 0) -> Tensor:
    """Codes of ``(channels, n)`` values before clipping, counted so that the smallest of the type is ``first``."""
    scale = fake_quant.channel_scale.detach().to(rows.device).reshape(-1, 1)
    zero: Tensor | int = 0
    if fake_quant.scheme == "affine":
        zero = fake_quant.channel_zero_point.to(rows.device).reshape(-1, 1)
    return codes_before_clipping(rows, scale, zero - fake_quant.quant_min + first)


def _rows(tensor: Tensor, fake_quant: FakeQuantize) -> Tensor:
    """``(channels, n)``; one row without an axis."""
    return channel_rows(tensor.detach(), fake_quant.axis, fake_quant.groups)
