"""Parts of a tensor that quantization destroys while the energy of the whole hides it.

A part is a set of indices along an axis: what one op puts into a join (the scores beside boxes in pixels), or indices
whose values are far smaller than those of the others. It is *lost* where the error varies at least half as much as the
values themselves: they all became zero or one code, or their order is gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_qat.analysis.comparison.axis_sums import AxisSums
from lightning_qat.analysis.comparison.best_split import best_groups

LOST_SHARE = 0.5
"""A part whose error has this share of the variation of its values is lost."""
LEAST_GAP = 4.0
"""Octaves between the largest value of a part and that of the next index, if nothing else says that it is a part."""
LEAST_SHARE = 0.1
"""Share of the indices that such a part has to have: single channels that hardly do anything are in every model."""
MOST_GROUPS = 4
LEAST_RATIO = 2.0**-20
"""What is a millionth of the others is taken for zero."""
_FEW_CODES = 8
"""Values with a range of their own, such as probabilities, may vanish below one part in eight of that range."""
KEPT = 4.0
"""A scale of its own has to bring the error of a part to a quarter of its variation, else the step is not to blame."""


_Chosen: TypeAlias = "NDArray[np.bool_]"


@dataclass(frozen=True)
class JoinedPart:
    """What one op contributes to a join.

    Args:
        axis: along which it is joined.
        start, stop: its indices, the last one excluded.
        maker: name of the op that made the values.
        bound: largest magnitude that op can give, such as 1 for a sigmoid; None without a limit.
    """

    axis: int
    start: int
    stop: int
    maker: str
    bound: float | None = None


@dataclass(frozen=True)
class Population:
    """Indices along an axis whose values are lost.

    Args:
        axis: number of the axis, ``length`` its length.
        indices: which.
        maker: op whose whole contribution to a join they are; empty if they are found by their size.
        apart: they are a part of the tensor: of a join, or far smaller than all others and not few.
        largest: their largest magnitude; ``others`` that of the other indices.
        zero: they all become zero.
        error: root mean square error, relative to the variation of the values.
        size: root mean square of that variation.
        groups: lengths of neighbouring groups along the axis that need a scale each; empty if they would be too many.
        group_error: what ``error`` falls to with them, predicted; ``own_error`` with a scale per index.
    """

    axis: int
    length: int
    indices: tuple[int, ...]
    maker: str
    apart: bool
    largest: float
    others: float
    zero: bool
    error: float
    size: float
    groups: tuple[int, ...] = ()
    group_error: float = math.inf
    own_error: float = math.inf

    @property
    def text(self) -> str:
        """The indices in words.

        Example:
            >>> Population(1, 8, (4, 5, 6, 7), "", True, 0.5, 300.0, True, 1.0, 0.2).text
            'indices 4 to 7 of axis 1'
        """
        first, last, count = self.indices[0], self.indices[-1], len(self.indices)
        if count == 1:
            return f"index {first} of axis {self.axis}"
        if last - first + 1 == count:
            return f"indices {first} to {last} of axis {self.axis}"
        shown = ", ".join(map(str, self.indices[:3])) + (" ..." if count > 3 else "")
        return f"{count} of {self.length} indices of axis {self.axis} ({shown})"


def lost_populations(
    sums: dict[int, AxisSums],
    quant_max: int,
    step: float,
    highest: float = math.inf,
    joined: Sequence[JoinedPart] = (),
    bound: float | None = None,
) -> tuple[Population, ...]:
    """Find what is lost along the axes of a tensor with one scale; of every axis at most one set of indices by size.

    Args:
        sums: by axis.
        quant_max: largest code.
        step: the scale.
        highest: largest magnitude that is represented: what is clipped is not lost to the size of others.
        joined: what ops put into the tensor.
        bound: as in :class:`JoinedPart`, for the tensor as a whole.
    """
    found: list[Population] = []
    for axis, one in sums.items():
        indices = _Indices(one, quant_max, highest)
        parts = [part for part in joined if part.axis == axis]
        if parts and max(part.stop for part in parts) == one.length:
            found += _lost_parts(axis, indices, parts, step)
        if bound is not None and step <= bound / _FEW_CODES:
            continue
        known = {i for population in found if population.axis == axis for i in population.indices}
        if not known and (population := _lost_by_size(axis, indices)) is not None:
            found.append(population)
    return tuple(found)


class _Indices:
    """What happens to the values of every index."""

    def __init__(self, sums: AxisSums, quant_max: int, highest: float) -> None:
        numpy = [t.numpy() for t in (sums.count, sums.largest, sums.left, sums.signal, sums.variation)]
        self.count, self.largest, self.left, signal, variation = numpy
        self.quant_max = quant_max
        own = self.count * (self.largest / quant_max) ** 2 / 12  # error with a scale of its own
        constant = variation <= KEPT * own  # as far as such a scale can tell: then the value itself counts
        self.variation = np.where(constant, signal, variation)
        self.error = np.where(constant, sums.error.numpy(), sums.error_variation.numpy())
        self.own = own
        something = self.largest > LEAST_RATIO * self.largest.max(initial=0.0)
        self.used = something & (self.largest <= highest) & (KEPT * own <= self.variation)

    def is_lost(self, chosen: _Chosen) -> bool:
        """Whether the chosen indices together are lost, and a scale of their own would have kept them."""
        chosen = chosen & self.used
        varying = self.variation[chosen].sum()
        return bool(varying > 0 and self.error[chosen].sum() >= LOST_SHARE * varying)

    def population(self, axis: int, chosen: _Chosen, maker: str, apart: bool) -> Population:
        """Describe the chosen indices, and find the groups that would keep them."""
        chosen = chosen & (self.largest > 0)
        varying, count = self.variation[chosen].sum(), self.count[chosen].sum()
        numbers: list[int] = np.flatnonzero(chosen).tolist()
        population = Population(
            axis=axis,
            length=len(self.count),
            indices=tuple(numbers),
            maker=maker,
            apart=apart,
            largest=float(self.largest[chosen].max()),
            others=float(self.largest[~chosen].max(initial=0.0)),
            zero=not self.left[chosen].any(),
            error=math.sqrt(self.error[chosen].sum() / varying),
            size=math.sqrt(varying / count),
        )
        groups, error = self._groups(chosen)
        own = math.sqrt(self.own[chosen].sum() / varying)
        return replace(population, groups=groups, group_error=error, own_error=own)

    def _groups(self, chosen: _Chosen) -> tuple[tuple[int, ...], float]:
        """The fewest neighbouring groups with which little of the chosen indices is lost."""
        # beside each other: an index that no scale could keep does not decide where the groups end
        weights = self.count / np.maximum(self.variation, 4 * self.own).clip(min=1e-300)
        weights = np.where(self.largest > 0, weights, 0.0)
        best: tuple[tuple[int, ...], float] = ((), math.inf)
        for groups in range(2, min(MOST_GROUPS, len(self.count)) + 1):
            _, sizes = best_groups(self.largest, weights, groups, self.quant_max)
            starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
            step = np.repeat(np.maximum.reduceat(self.largest, starts), sizes) / self.quant_max
            noise = (self.count * step**2 / 12)[chosen].sum()
            error = math.sqrt(noise / self.variation[chosen].sum())
            if error < best[1]:
                best = sizes, error
            if error <= 1 / _FEW_CODES:
                break
        return best


def _lost_parts(axis: int, indices: _Indices, parts: Iterable[JoinedPart], step: float) -> list[Population]:
    """What a single op contributes to a join, and what is lost of it as a whole while others are kept."""
    lost: list[tuple[JoinedPart, _Chosen]] = []
    kept = False
    for part in parts:
        chosen = np.zeros(len(indices.count), dtype=bool)
        chosen[part.start : part.stop] = True
        if part.bound is not None and step <= part.bound / _FEW_CODES:
            kept = True
        elif indices.is_lost(chosen):
            lost.append((part, chosen))
        elif indices.largest[chosen].any():
            kept = True
    return [indices.population(axis, chosen, part.maker, True) for part, chosen in lost] if kept else []


def _lost_by_size(axis: int, indices: _Indices) -> Population | None:
    """The most indices that are far smaller than all others and lost; else all that are lost."""
    present = indices.largest > 0
    order = np.argsort(indices.largest)[int((~present).sum()) :]
    octaves = np.log2(indices.largest[order])
    for cut in reversed(np.flatnonzero(np.diff(octaves) >= LEAST_GAP).tolist()):
        chosen = np.zeros(len(present), dtype=bool)
        chosen[order[: cut + 1]] = True
        if indices.is_lost(chosen):
            return indices.population(axis, chosen, "", cut + 1 >= LEAST_SHARE * len(order))
    single = indices.used & (indices.error >= LOST_SHARE * indices.variation)
    if not single.any() or single.sum() == present.sum():
        return None
    return indices.population(axis, single, "", False)


def joined_parts(
    shape: Sequence[int], operands: Sequence[tuple[tuple[int, ...], str, float | None]]
) -> list[JoinedPart]:
    """Tell from the shapes along which axis tensors were joined; nothing if that is not clear.

    Args:
        shape: of the result.
        operands: shape, maker and bound of each.

    Example:
        >>> parts = joined_parts((2, 12, 9), [((2, 4, 9), "boxes", None), ((2, 8, 9), "scores", 1.0)])
        >>> [(part.axis, part.start, part.stop) for part in parts]
        [(1, 0, 4), (1, 4, 12)]
    """
    if len(operands) < 2:
        return []
    axes = []
    for axis in range(len(shape)):
        rest = (*shape[:axis], *shape[axis + 1 :])
        if all(len(s) == len(shape) and (*s[:axis], *s[axis + 1 :]) == rest for s, _, _ in operands):
            lengths = [s[axis] for s, _, _ in operands]
        elif all(tuple(s) == rest for s, _, _ in operands):
            lengths = [1] * len(operands)  # stacked
        else:
            continue
        if sum(lengths) == shape[axis]:
            axes.append((axis, lengths))
    if len(axes) != 1:
        return []
    axis, lengths = axes[0]
    ends = np.cumsum(lengths).tolist()
    return [
        JoinedPart(axis, end - length, end, maker, bound)
        for end, length, (_, maker, bound) in zip(ends, lengths, operands, strict=True)
    ]
