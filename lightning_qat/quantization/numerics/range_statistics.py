"""The statistics of a point's data that any observer can use: extremes, moving averages and a histogram."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_qat.quantization import ranks
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.numerics.histogram import CHANNEL_BINS, TENSOR_BINS, Histogram


class Statistics:
    """Histogram, extremes and moving averages of the data of a point, as one row or one row per channel.

    Args:
        channels: Number of rows.
        axis: The channel axis; None for one row of all values.
        bins: Bins per side of the histograms.
        ema_momentum: Weight of a new batch in the moving averages.

    """

    def __init__(self, channels: int, axis: int | None, bins: int, ema_momentum: float) -> None:
        self.axis = axis
        self.ema_momentum = ema_momentum
        self.histogram = Histogram(channels, bins)
        with torch.inference_mode(False):
            self._ema = torch.zeros(2, channels, dtype=torch.float64, device="cpu")
            # A number that changes with every batch would be compiled anew with every batch: a tensor is not.
            self._compiled_batches = torch.zeros((), dtype=torch.float64, device="cpu")
        self._counts_in_tensor = False
        self.batches = 0

    @property
    def batches(self) -> int:
        """How many batches are in the moving averages."""
        return self._eager_batches + int(self._compiled_batches)

    @batches.setter
    def batches(self, value: int) -> None:
        self._eager_batches = value
        self._compiled_batches.zero_()

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
        low, high = self.histogram.observe(self.rows(x))
        if bool((low <= high).all()):  # else a channel is empty or has no finite value
            self.update_ema(low, high)

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of ``x``, float64 ``(channels,)``, NaN if it holds NaN; nothing is recorded."""
        rows = self.rows(x.detach())
        if len(rows) == 1:
            low, high = torch.aminmax(rows)
            return low.reshape(1).double(), high.reshape(1).double()
        return rows.amin(dim=1).double(), rows.amax(dim=1).double()

    def update_ema(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Move the averages towards a batch's extremes, float64 ``(channels,)``, and return them.

        The first batches are averaged evenly, until the weight of one falls to ``ema_momentum``: otherwise the first
        batch would dominate a short calibration. An extreme that is not finite leaves its average as it is.
        """
        batch = torch.stack([low, high])
        self._ema = self._ema.to(batch.device)
        moved = self._ema + self._weight_of_next_batch(batch.device) * (batch - self._ema)
        self._ema = torch.where(batch.isfinite(), moved, self._ema)
        return self._ema[0], self._ema[1]

    def move_averages(self, low: float, high: float) -> tuple[float, float]:
        """Do the same for one row of an eager forward, by numbers: the bits are the same, and it takes less time."""
        weight = float(self._weight_of_next_batch(self._ema.device))
        (low_before,), (high_before,) = self._ema.tolist()
        moved = [
            before + weight * (end - before) if math.isfinite(end) else before
            for before, end in ((low_before, low), (high_before, high))
        ]
        self.averages = torch.tensor(moved, dtype=torch.float64).reshape(2, 1)
        return moved[0], moved[1]

    def _weight_of_next_batch(self, device: torch.device) -> float | Tensor:
        """Count one more batch."""
        if not (torch.compiler.is_compiling() or self._counts_in_tensor):
            self._eager_batches += 1
            return max(self.ema_momentum, 1.0 / self._eager_batches)
        self._counts_in_tensor = True
        self._compiled_batches = self._compiled_batches.to(device) + 1
        return (1.0 / (self._eager_batches + self._compiled_batches)).clamp(min=self.ema_momentum)

    @property
    def averages(self) -> Tensor:
        """The moving averages in one tensor, ``(2, channels)``: smallest values, largest values."""
        return self._ema

    @averages.setter
    def averages(self, value: Tensor) -> None:
        with torch.inference_mode(False):
            self._ema = value.to(self._ema.device, torch.float64, copy=True)

    def all_reduce(self) -> None:
        """Merge the statistics of all ranks, so that all have the same; every rank must call this."""
        self.histogram.all_reduce()
        batches = torch.tensor([self.batches], device=self._ema.device)
        sums = ranks.summed(torch.cat([self._ema.flatten() * self.batches, batches]))
        self.batches = int(sums[-1])
        self._ema = (sums[:-1] / max(1, self.batches)).reshape(2, -1)

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

    def packed_state(self, limit: int) -> dict[str, Any]:
        """Return the state for a checkpoint, in few bytes; what moving averages depend on is exact.

        Args:
            limit: Characters for the counts, see :meth:`Histogram.packed_state`.
        """
        histogram = self.histogram.packed_state(limit)
        return {"histogram": histogram, "ema": self._ema.tolist(), "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of :meth:`state_dict` or of :meth:`packed_state`.

        Raises:
            ConfigurationError: If the state has another number of channels.
        """
        self.histogram.load_state_dict(state["histogram"])
        with torch.inference_mode(False):
            self._ema = torch.as_tensor(state["ema"], dtype=torch.float64, device="cpu").clone()
        self.batches = state["batches"]

    def rows(self, x: Tensor) -> Tensor:
        """View or copy ``x`` as ``(channels, values)``.

        Raises:
            ConfigurationError: If ``x`` does not have the expected number of channels.
        """
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


class RangeStatistics(Statistics):
    """Statistics of the tensors of a point with one scale: extremes, their moving averages and a histogram.

    Args:
        ema_momentum: Weight of a new batch in the moving averages.

    Example:
        >>> statistics = RangeStatistics()
        >>> statistics.observe(torch.tensor([-1.0, 3.0, float("nan")]))
        >>> [end.item() for end in statistics.range], statistics.count, statistics.nan_count
        ([-1.0, 3.0], 2, 1)
    """

    def __init__(self, ema_momentum: float = 0.01) -> None:
        super().__init__(1, None, TENSOR_BINS, ema_momentum)


class PerChannelStatistics(Statistics):
    """The same statistics per channel, with fewer bins per histogram.

    A weight does not change during calibration: observe it once. (Observing it again changes no scale and takes time.)
    After training steps, call :meth:`reset` first.

    Args:
        axis: The channel axis.
        channels: Number of channels.
        ema_momentum: Weight of a new batch in the moving averages.

    Example:
        >>> statistics = PerChannelStatistics(axis=0, channels=2)
        >>> statistics.observe(torch.tensor([[1.0, 2.0], [-5.0, 3.0]]))
        >>> [end.tolist() for end in statistics.range]
        [[1.0, -5.0], [2.0, 3.0]]
    """

    def __init__(self, axis: int, channels: int, ema_momentum: float = 0.01) -> None:
        super().__init__(channels, axis, CHANNEL_BINS, ema_momentum)
