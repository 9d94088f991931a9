"""Checks of the statistics in a checkpoint, before anything takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.numerics.histogram import CHANNEL_BINS, TENSOR_BINS
from lightning_qat.quantization.numerics.histogram_counts import unpacked
from lightning_qat.quantization.reading.checks import AT_LEAST_ZERO
from lightning_qat.quantization.reading.plain_values import UnreadableValueError
from lightning_qat.quantization.reading.schema import read_as

_MOST_EXPONENT = 1023
"""Of a float64."""


def check_statistics(state: Any, channels: int | None, split_sizes: Sequence[int] | None) -> None:
    """Refuse statistics that do not belong to a point, or that cannot have been observed.

    Args:
        state: as ``statistics_for(...)`` gives and takes it.
        channels: of the point, None for one scale.
        split_sizes: of the point.

    Raises:
        UnreadableValueError: a value does not fit; the message says which.
    """
    if split_sizes is None:
        _check_ranges(state, channels or 1, TENSOR_BINS if channels is None else CHANNEL_BINS)
        return
    groups = read_as(_Groups, state).groups
    if len(groups) != len(split_sizes):
        raise UnreadableValueError(f"has {len(groups)} groups, and its point has {len(split_sizes)}", ".groups")
    for index, group in enumerate(groups):
        try:
            _check_ranges(group, 1, TENSOR_BINS)
        except UnreadableValueError as error:
            raise error.inside(f".groups[{index}]") from None


def numbers(value: Any, shape: tuple[int, ...], place: str, least: float = -math.inf, most: float = math.inf) -> Tensor:
    """Return a tensor or nested list of numbers as float64, on the CPU.

    Args:
        value: what a checkpoint holds.
        shape: what it must have.
        place: where it is, for messages.
        least: the smallest number allowed.
        most: the largest number allowed. NaN never is.

    Raises:
        UnreadableValueError: it is something else.
    """
    try:
        found = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        plain = tuple(found.shape) == shape and found.layout is torch.strided
        plain = plain and not (isinstance(value, Tensor) and value.is_complex())
    except (TypeError, ValueError, RuntimeError, OverflowError, NotImplementedError):
        plain = False
    if not plain:
        raise UnreadableValueError(f"must be numbers of the shape {list(shape)}", place)
    if not bool(((found >= least) & (found <= most)).all()):
        bounds = f"between {least:g} and {most:g}" if math.isfinite(most) else f"at least {least:g}"
        raise UnreadableValueError(f"must be numbers {bounds if math.isfinite(least) else 'and not NaN'}", place)
    return found


@dataclass(frozen=True)
class _Groups:
    groups: list[dict[str, object]]


@dataclass(frozen=True)
class _Ranges:
    histogram: dict[str, object]
    ema: object
    batches: Annotated[int, AT_LEAST_ZERO]


@dataclass(frozen=True)
class _Histogram:
    bins: int
    exponent: object
    low: object
    high: object
    zeros: object
    nan_count: Annotated[int, AT_LEAST_ZERO]
    inf_count: Annotated[int, AT_LEAST_ZERO]
    counts: Tensor | None = None
    packed: str | None = None


def _check_ranges(state: Any, channels: int, bins: int) -> None:
    stored = read_as(_Ranges, state)
    limit = torch.finfo(torch.float64).max
    numbers(stored.ema, (2, channels), ".ema", -limit, limit)
    try:
        _check_histogram(read_as(_Histogram, stored.histogram), channels, bins)
    except UnreadableValueError as error:
        raise error.inside(".histogram") from None


def _check_histogram(stored: _Histogram, channels: int, bins: int) -> None:
    if stored.bins != bins:
        raise UnreadableValueError(f"must be {bins}, not {stored.bins}", ".bins")
    numbers(stored.exponent, (channels,), ".exponent", -_MOST_EXPONENT, _MOST_EXPONENT)
    numbers(stored.zeros, (channels,), ".zeros", 0)
    low, high = numbers(stored.low, (channels,), ".low"), numbers(stored.high, (channels,), ".high")
    is_empty = (low == math.inf) & (high == -math.inf)
    if not bool((is_empty | ((low <= high) & low.isfinite() & high.isfinite())).all()):
        raise UnreadableValueError("are no finite range", ".low and .high")
    counts: Any = stored.counts
    if stored.packed is not None:
        try:
            counts = unpacked(stored.packed, (channels, 2 * bins))
        except ConfigurationError as error:
            raise UnreadableValueError(f"is damaged ({str(error).rstrip('.')})", ".packed") from error
    numbers(counts, (channels, 2 * bins), ".counts", 0)
