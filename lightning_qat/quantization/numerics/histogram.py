"""A signed histogram with power-of-two bins: the kept statistics from which scales are derived.

The bin width is a power of two and the bins are aligned at zero, so a histogram grows by adding pairs of neighbours
and nothing is ever re-binned approximately. Therefore the result depends only on *which* values were seen: not on the
order of the batches, nor on how they were spread over ranks. (Histograms that stretch to the data of the first batches
and interpolate when the range grows, such as the one in ``torch.ao``, do not have this property.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_qat.quantization import ranks
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.numerics.histogram_counts import grown, packed, unpacked

# The smallest normal float32: the inverse of a width below 2**-127 would overflow float32.
MIN_EXPONENT = -126

_TENSORS = ("counts", "exponent", "low", "high", "zeros")

TENSOR_BINS = 2048
"""Bins per side of one histogram for a whole tensor: the largest value lies in the upper half, so one step of an 8-bit
type is 8 to 16 bins wide. A checkpoint has room for fewer: see :meth:`Histogram.packed_state`."""

CHANNEL_BINS = 128
"""Bins per side of the histograms of single channels: a weight has thousands of them, each with few values."""


class Histogram:
    """Counts of values in signed bins of power-of-two width, one row for a tensor or one row per channel.

    Bin ``i`` (``-bins < i < bins``) counts the values with ``trunc(x / width) == i``, where ``width = 2**exponent``:
    bin 0 is ``(-width, width)``, a positive bin ``[i * width, (i + 1) * width)``, a negative one its mirror image. The
    exponent is the smallest with which everything seen fits. As ``trunc(trunc(x / w) / 2) == trunc(x / 2w)``, growing
    is exact. NaN and infinities are counted apart and are in no bin. Exact zeros, the most frequent value after a ReLU
    or a padding, are in bin 0 and are also counted apart. Values below ``2**-126`` all fall in bin 0.

    Args:
        channels: Number of rows.
        bins: Bins per side, a power of two.

    Attributes:
        counts: int64 ``(channels, 2 * bins)``; bin ``i`` at column ``bins + i`` (column 0 stays empty).
        exponent: int64 ``(channels,)``.
        low: Smallest finite value, float64 ``(channels,)``; ``inf`` where nothing was seen.
        high: Largest finite value, float64 ``(channels,)``; ``-inf`` where nothing was seen.
        zeros: Exact zeros, int64 ``(channels,)``.
        nan_count: NaN seen, in all channels.
        inf_count: Infinities of either sign seen, in all channels.

    Raises:
        ConfigurationError: If ``bins`` is not a power of two or there is no channel.

    Example:
        >>> histogram = Histogram(bins=4)
        >>> _ = histogram.observe(torch.tensor([0.0, 1.0, 3.5, -2.0, float("inf")]))
        >>> histogram.width.tolist(), histogram.counts.tolist(), histogram.inf_count
        ([1.0], [[0, 0, 1, 0, 1, 1, 0, 1]], 1)
    """

    def __init__(self, channels: int = 1, bins: int = TENSOR_BINS) -> None:
        if bins < 2 or bins & (bins - 1):
            raise ConfigurationError(f"a histogram needs a power of two as its number of bins per side, not {bins}.")
        if channels < 1:
            raise ConfigurationError(f"a histogram needs at least one channel, not {channels}.")
        self.channels = channels
        self.bins = bins
        self.nan_count = 0
        self.inf_count = 0
        self._packed: dict[int, dict[str, Any]] = {}  # by limit; every checkpoint asks for it
        # On the CPU even where a model is being built on another default device, such as meta.
        with torch.inference_mode(False), torch.device("cpu"):
            self.counts = torch.zeros(channels, 2 * bins, dtype=torch.int64)
            self.exponent = torch.full((channels,), MIN_EXPONENT, dtype=torch.int64)
            self.low = torch.full((channels,), math.inf, dtype=torch.float64)
            self.high = torch.full((channels,), -math.inf, dtype=torch.float64)
            self.zeros = torch.zeros(channels, dtype=torch.int64)

    @property
    def width(self) -> Tensor:
        """Bin width per channel, float64 ``(channels,)``."""
        return power_of_two(self.exponent)

    @property
    def count(self) -> int:
        """Number of finite values seen."""
        return int(self.counts.sum())

    @property
    def edges(self) -> Tensor:
        """Edges of the columns of ``counts`` in units of the bin width, float64 ``(2 * bins + 1,)``."""
        negative = torch.arange(-self.bins - 1, 0, dtype=torch.float64)
        return torch.cat([negative, torch.arange(1, self.bins + 1, dtype=torch.float64)]).to(self.counts.device)

    @torch.no_grad()
    @torch.inference_mode(False)  # what is kept must stay usable outside of inference mode
    def observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Count the values of ``x``.

        Args:
            x: Floating-point tensor; of any shape for one channel, else ``(channels, ...)``.

        Returns:
            The smallest and the largest finite value of ``x`` per channel, float64 ``(channels,)``; ``inf`` and
            ``-inf`` for a channel without one.
        """
        self._packed.clear()
        rows = _as_float(x.detach()).reshape(self.channels, -1) if x.numel() else x.new_empty(self.channels, 0)
        self._to(rows.device)
        if rows.shape[1] == 0:
            return torch.full_like(self.low, math.inf), torch.full_like(self.high, -math.inf)
        # The reduction without a dimension is the faster one; both hand NaN on.
        low, high = rows.aminmax(dim=1) if self.channels > 1 else torch.aminmax(rows)
        low, high = low.reshape(-1).double(), high.reshape(-1).double()
        finite = None
        if not bool((low.isfinite() & high.isfinite()).all()):
            finite = rows.isfinite()
            nan = int(rows.isnan().sum())
            self.nan_count += nan
            self.inf_count += rows.numel() - int(finite.sum()) - nan
            low = torch.where(finite, rows, math.inf).amin(dim=1).double()
            high = torch.where(finite, rows, -math.inf).amax(dim=1).double()
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self._grow(torch.maximum(self.exponent, self._exponent_for(low, high)))
        self.counts += self._bin(rows, finite)
        nonzero = torch.count_nonzero(rows, dim=1) if self.channels > 1 else torch.count_nonzero(rows)
        self.zeros += rows.shape[1] - nonzero
        return low, high

    def all_reduce(self) -> None:
        """Merge the histograms of all ranks, with a maximum and a sum. A rank that saw nothing takes part as well."""
        self._packed.clear()
        extremes = ranks.largest(torch.stack([-self.low, self.high, self.exponent.double()]))
        self.low, self.high = -extremes[0], extremes[1]
        self._grow(extremes[2].to(torch.int64))
        others = torch.tensor([self.nan_count, self.inf_count], device=self.counts.device)
        sums = ranks.summed(torch.cat([self.counts.flatten(), self.zeros, others]))
        counts, self.zeros, others = sums.split([self.counts.numel(), self.channels, 2])
        self.counts = counts.reshape(self.channels, -1)
        self.nan_count, self.inf_count = (int(n) for n in others.tolist())

    def state_dict(self) -> dict[str, Any]:
        """Return everything as ints and CPU tensors, loadable with ``torch.load(weights_only=True)``."""
        # Half the size in a checkpoint where the counts allow it.
        narrow = bool((self.counts < 2**31).all())
        return {
            "bins": self.bins,
            "counts": self.counts.to("cpu", torch.int32 if narrow else torch.int64, copy=True),
            "exponent": self.exponent.to("cpu", copy=True),
            "low": self.low.to("cpu", copy=True),
            "high": self.high.to("cpu", copy=True),
            "zeros": self.zeros.to("cpu", copy=True),
            "nan_count": self.nan_count,
            "inf_count": self.inf_count,
        }

    def packed_state(self, limit: int) -> dict[str, Any]:
        """Return the state for a checkpoint, in few bytes: numbers, lists of numbers, and the counts as a text.

        The bins are made so wide that the text fits, see
        :func:`~lightning_qat.quantization.numerics.histogram_counts.packed`. Everything else is exact.

        Args:
            limit: Characters of the text at most.

        Example:
            >>> histogram = Histogram()
            >>> _ = histogram.observe(torch.linspace(-1, 1, 100_001))
            >>> state = histogram.packed_state(512)
            >>> histogram.load_state_dict(state)
            >>> len(state["packed"]) <= 512, histogram.high.item(), histogram.count
            (True, 1.0, 100001)
        """
        if limit not in self._packed:
            text, doublings = packed(self.counts.cpu(), limit)
            self._packed[limit] = {
                "bins": self.bins,
                "packed": text,
                "exponent": (self.exponent + doublings).tolist(),
                "low": self.low.tolist(),
                "high": self.high.tolist(),
                "zeros": self.zeros.tolist(),
                "nan_count": self.nan_count,
                "inf_count": self.inf_count,
            }
        return dict(self._packed[limit])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of :meth:`state_dict` or of :meth:`packed_state`.

        Raises:
            ConfigurationError: If the state has another number of channels or bins, or is damaged.
        """
        if "packed" in state:
            state = {**state, "counts": unpacked(state["packed"], (len(state["exponent"]), 2 * state["bins"]))}
        if state["bins"] != self.bins or state["counts"].shape[0] != self.channels:
            raise ConfigurationError(
                f"the stored histogram has {state['counts'].shape[0]} x {state['bins']} bins, "
                f"this one has {self.channels} x {self.bins}: they are not of the same point."
            )
        self._packed.clear()
        with torch.inference_mode(False):
            for name in _TENSORS:
                dtype = torch.float64 if name in ("low", "high") else torch.int64
                setattr(self, name, torch.as_tensor(state[name], dtype=dtype, device="cpu").clone())
        self.nan_count, self.inf_count = state["nan_count"], state["inf_count"]

    def _exponent_for(self, low: Tensor, high: Tensor) -> Tensor:
        """The smallest exponent with which ``|x| < bins * 2**exponent`` for the given extremes."""
        bound = torch.maximum(-low, high)
        exponent = torch.frexp(bound).exponent.to(torch.int64) - (self.bins.bit_length() - 1)
        return torch.where((bound > 0) & bound.isfinite(), exponent, MIN_EXPONENT).clamp_min(MIN_EXPONENT)

    def _bin(self, rows: Tensor, finite: Tensor | None) -> Tensor:
        # Multiplying by a power of two is exact, or underflows to what truncates to 0 as it should; the conversion
        # to an integer truncates.
        if self.channels == 1:
            index = (rows * 2.0 ** -int(self.exponent)).to(torch.int32).add_(self.bins)
        else:
            index = (rows * power_of_two(-self.exponent).to(rows.dtype)[:, None]).to(torch.int64)
            index += self.bins + 2 * self.bins * torch.arange(self.channels, device=rows.device)[:, None]
        flat = index.flatten() if finite is None else index[finite]
        return torch.bincount(flat, minlength=self.counts.numel()).reshape(self.counts.shape)

    def _grow(self, exponent: Tensor) -> None:
        if not torch.equal(exponent, self.exponent):
            self.counts = grown(self.counts, exponent - self.exponent)
            self.exponent = exponent

    def _to(self, device: torch.device) -> None:
        """Move to the device of the data when the first data arrive."""
        if self.counts.device != device:
            for name in _TENSORS:
                setattr(self, name, getattr(self, name).to(device))


def magnitudes(histogram: Histogram) -> Tensor:
    """Return the counts of a histogram by bin of magnitude, ``(channels, bins)``."""
    bins = histogram.bins
    negative = histogram.counts[:, :bins].flip(1).roll(1, 1)  # column = magnitude; column 0 is the empty one
    return histogram.counts[:, bins:] + negative


def power_of_two(exponent: Tensor) -> Tensor:
    """``2**exponent`` in float64, from the bits: ``pow`` and ``ldexp`` may be one unit off in vectorized code."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _as_float(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
