"""What is kept of the values along an axis: a few sums per index, from which follows what quantization does to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_qat.analysis.statistics.point_statistics import CHUNK

LONGEST_AXIS = 4096
"""Nothing is kept of a longer axis: nobody treats its indices apart by hand."""


class AxisSums:
    """Sums over the values at every index of one axis; mergeable, in float64.

    Values that are not finite enter nothing.

    Args:
        sums: ``(6, length)``: number of values, sums of values, of their squares, of errors, of squared errors, and of
            ``1 / x**2`` over the values that are not zero.
        maxima: ``(2, length)``: largest magnitude of the values, and of what quantization leaves of them.
    """

    def __init__(self, sums: Tensor, maxima: Tensor) -> None:
        self.sums = sums
        self.maxima = maxima

    @property
    def length(self) -> int:
        """Length of the axis."""
        return self.sums.shape[1]

    @property
    def count(self) -> Tensor:
        """Number of values, ``(length,)`` as all that follow."""
        return self.sums[0]

    @property
    def signal(self) -> Tensor:
        """Sum of squares."""
        return self.sums[2]

    @property
    def variation(self) -> Tensor:
        """Sum of squared deviations from the mean of the index."""
        return (self.sums[2] - self.sums[1].square() / self.count.clamp(min=1)).clamp(min=0)

    @property
    def error(self) -> Tensor:
        """Sum of squared errors."""
        return self.sums[4]

    @property
    def error_variation(self) -> Tensor:
        """Sum of squared deviations of the error from its mean: an offset of all values leaves their order alone."""
        return (self.sums[4] - self.sums[3].square() / self.count.clamp(min=1)).clamp(min=0)

    @property
    def inverse_squares(self) -> Tensor:
        """Sum of ``1 / x**2`` over the values that are not zero."""
        return self.sums[5]

    @property
    def largest(self) -> Tensor:
        """Largest magnitude."""
        return self.maxima[0]

    @property
    def left(self) -> Tensor:
        """Largest magnitude after quantization; 0 where all values became zero."""
        return self.maxima[1]

    def merge(self, other: AxisSums) -> None:
        """Add what was seen elsewhere along an axis of the same length."""
        self.sums = self.sums + other.sums
        self.maxima = torch.maximum(self.maxima, other.maxima)


class SumsByAxis:
    """The sums of a tensor along several axes, over batches. An axis whose length follows the data is given up."""

    def __init__(self) -> None:
        self._axes: dict[int, AxisSums | None] = {}

    @property
    def known(self) -> dict[int, AxisSums]:
        """By axis."""
        return {axis: sums for axis, sums in self._axes.items() if sums is not None}

    @property
    def seen(self) -> bool:
        """Whether there was anything to sum up."""
        return bool(self._axes)

    def add(self, value: Tensor, quantized: Tensor, axes: Sequence[int]) -> None:
        """Add a tensor and what quantization makes of it."""
        self._merge(sums_along(value, quantized, [axis for axis in axes if self._axes.get(axis, ()) is not None]))

    def merge(self, other: SumsByAxis) -> None:
        """Add what was seen elsewhere, on another rank for instance."""
        self._merge(other._axes)

    def _merge(self, other: Mapping[int, AxisSums | None]) -> None:
        for axis, sums in other.items():
            known = self._axes.get(axis, sums)
            if known is None or sums is None or known.length != sums.length:
                self._axes[axis] = None
            elif axis in self._axes:
                known.merge(sums)
            else:
                self._axes[axis] = sums


def sums_along(value: Tensor, quantized: Tensor, axes: Sequence[int]) -> dict[int, AxisSums]:
    """Sum up a tensor and what quantization makes of it, along several axes in one pass.

    Args:
        value: float values, of any shape.
        quantized: of the same shape.
        axes: which axes; those that are longer than :data:`LONGEST_AXIS` are left out.

    Example:
        >>> x = torch.tensor([[100.0, 0.25], [50.0, 0.5]])
        >>> sums = sums_along(x, x.round(), [1])[1]
        >>> sums.largest.tolist(), sums.left.tolist(), sums.error.tolist()
        ([100.0, 0.5], [100.0, 0.0], [0.0, 0.3125])
    """
    chosen = [axis for axis in axes if value.shape[axis] <= LONGEST_AXIS]
    if not chosen or not value.numel():
        return {}
    if len(chosen) == value.dim() > 1:  # no axis is left to sum over first: one at a time
        return {axis: sums_along(value, quantized, [axis])[axis] for axis in chosen}
    values, codes = _rows(value, chosen), _rows(quantized, chosen)
    step = max(1, CHUNK // values[0].numel())
    first, *others = (_along(x, q) for x, q in zip(values.split(step), codes.split(step), strict=True))
    for other in others:
        for sums, more in zip(first, other, strict=True):
            sums.merge(more)
    return dict(zip(chosen, first, strict=True))


def _rows(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """The chosen axes behind one that holds all others."""
    moved = tensor.detach().movedim(tuple(axes), tuple(range(-len(axes), 0)))
    return moved.flatten(0, -len(axes) - 1) if moved.dim() > len(axes) else moved[None]


def _along(value: Tensor, quantized: Tensor) -> list[AxisSums]:
    """Reduce ``(rows, ...)`` over the rows first, then what is left over all axes but one; for each of them."""
    x, q = value.double(), quantized.double()
    finite = x.isfinite() & q.isfinite()
    if not bool(finite.all()):
        x, q = torch.where(finite, x, 0.0), torch.where(finite, q, 0.0)
    maxima = torch.stack([x.abs().amax(0), q.abs().amax(0)])
    error = q - x
    squares = x * x
    sums = [finite.sum(0).double(), x.sum(0), squares.sum(0), error.sum(0), error.square_().sum(0)]
    sums.append(squares.reciprocal_().masked_fill_(x == 0, 0.0).sum(0))
    every = torch.stack(sums)
    found = []
    for axis in range(1, every.dim()):
        others = [d for d in range(1, every.dim()) if d != axis]
        summed = every.sum(others) if others else every
        largest = maxima.amax(others) if others else maxima
        found.append(AxisSums(summed.cpu(), largest.cpu()))
    return found
