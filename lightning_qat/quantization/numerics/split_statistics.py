"""Statistics of groups of neighbouring channels, each with its own scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.numerics.range_statistics import PerChannelStatistics, RangeStatistics


class SplitStatistics:
    """The :class:`~lightning_qat.quantization.numerics.range_statistics.RangeStatistics` of each group along an axis.

    Args:
        axis: The axis that is split.
        sizes: Lengths of the groups, in order; they may be unequal.
        ema_momentum: Weight of a new batch in the moving averages.

    Attributes:
        groups: The statistics of every group.

    Example:
        >>> statistics = SplitStatistics(axis=0, sizes=(2, 3))
        >>> statistics.observe(torch.tensor([1.0, 2.0, -50.0, 30.0, 40.0]))
        >>> [end.tolist() for end in statistics.range]
        [[1.0, -50.0], [2.0, 40.0]]
    """

    def __init__(self, axis: int, sizes: tuple[int, ...], ema_momentum: float = 0.01) -> None:
        self.axis = axis
        self.sizes = sizes
        self.groups = tuple(RangeStatistics(ema_momentum) for _ in sizes)

    @property
    def batches(self) -> int:
        """How many batches are in the moving averages."""
        return max(group.batches for group in self.groups)

    @property
    def count(self) -> int:
        """Number of finite values observed, in all groups."""
        return sum(group.count for group in self.groups)

    @property
    def nan_count(self) -> int:
        """Number of NaN observed."""
        return sum(group.nan_count for group in self.groups)

    @property
    def inf_count(self) -> int:
        """Number of infinities observed."""
        return sum(group.inf_count for group in self.groups)

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value, float64 ``(groups,)``."""
        return _joined([group.range for group in self.groups])

    @property
    def ema_range(self) -> tuple[Tensor, Tensor]:
        """Moving averages of the batches' smallest and largest values, float64 ``(groups,)``."""
        return _joined([group.ema_range for group in self.groups])

    @property
    def averages(self) -> Tensor:
        """The moving averages in one tensor, ``(2, groups)``."""
        return torch.cat([group.averages for group in self.groups], dim=1)

    @averages.setter
    def averages(self, value: Tensor) -> None:
        for index, group in enumerate(self.groups):
            group.averages = value[:, index : index + 1]

    def observe(self, x: Tensor) -> None:
        """Record ``x``, whose axis has the length of all groups together.

        Raises:
            ConfigurationError: If it has another length.
        """
        for group, part in zip(self.groups, self._parts(x), strict=True):
            group.observe(part)

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of every group of ``x``, float64 ``(groups,)``; nothing is recorded."""
        return _joined([g.extremes(part) for g, part in zip(self.groups, self._parts(x), strict=True)])

    def update_ema(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Move the averages towards a batch's extremes, float64 ``(groups,)``, and return them."""
        ends = zip(self.groups, low.split(1), high.split(1), strict=True)
        return _joined([group.update_ema(*pair) for group, *pair in ends])

    def all_reduce(self) -> None:
        """Merge the statistics of all ranks; every rank must call this."""
        for part in self.groups:
            part.all_reduce()

    def reset(self) -> None:
        """Forget everything."""
        for group in self.groups:
            group.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return everything as primitives and CPU tensors."""
        return {"groups": [group.state_dict() for group in self.groups]}

    def packed_state(self, limit: int) -> dict[str, Any]:
        """Return the state for a checkpoint, in few bytes; all groups together get ``limit`` characters."""
        return {"groups": [group.packed_state(max(1, limit // len(self.groups))) for group in self.groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of :meth:`state_dict` or of :meth:`packed_state`.

        Raises:
            ConfigurationError: If the state has another number of groups.
        """
        stored = state.get("groups", ())
        if len(stored) != len(self.groups):
            raise ConfigurationError(f"the stored state has {len(stored)} groups, this point has {len(self.groups)}.")
        for group, part in zip(self.groups, stored, strict=True):
            group.load_state_dict(part)

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        if x.dim() == 0 or x.shape[self.axis] != sum(self.sizes):
            raise ConfigurationError(
                f"a tensor of shape {tuple(x.shape)} cannot be split into groups of {list(self.sizes)} along axis "
                f"{self.axis}."
            )
        return torch.split(x, list(self.sizes), dim=self.axis)


def statistics_for(
    axis: int | None, channels: int | None, split_sizes: tuple[int, ...] | None, ema_momentum: float
) -> RangeStatistics | PerChannelStatistics | SplitStatistics:
    """Return empty statistics for one scale, for one per channel, or for one per group of channels.

    Args:
        axis: the channel axis, None for one scale.
        channels: number of channels, with an axis.
        split_sizes: lengths of the groups of channels that share a scale, if they do.
        ema_momentum: weight of a new batch in the moving averages.

    Raises:
        ConfigurationError: an argument is out of its set, or two of them contradict each other.
    """
    if (axis is None) != (channels is None):
        raise ConfigurationError(f"axis and channels belong together, got axis={axis} and channels={channels}.")
    if split_sizes is not None and (channels != sum(split_sizes) or min(split_sizes) < 1):
        raise ConfigurationError(
            f"split_sizes must be positive and add up to the {channels} channels, not {list(split_sizes)}."
        )
    if not 0.0 < ema_momentum <= 1.0:
        raise ConfigurationError(f"ema_momentum must be above 0 and at most 1, such as 0.01, not {ema_momentum}.")
    if axis is None or channels is None:
        return RangeStatistics(ema_momentum)
    if split_sizes is None:
        return PerChannelStatistics(axis, channels, ema_momentum)
    return SplitStatistics(axis, split_sizes, ema_momentum)


def repeat_groups(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Repeat the value of each group for all its channels, ``(groups,)`` to ``(channels,)``; differentiable.

    Example:
        >>> repeat_groups(torch.tensor([0.5, 2.0]), (1, 3))
        tensor([0.5000, 2.0000, 2.0000, 2.0000])
    """
    return torch.cat([value.expand(size) for value, size in zip(values.unbind(), sizes, strict=True)])


def _joined(ends: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    low, high = (torch.cat(end) for end in zip(*ends, strict=True))
    return low, high
