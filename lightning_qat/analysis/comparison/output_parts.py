"""Whether a part of the chosen output is lost in the quantized model, whatever the energy of the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lightning_qat.analysis.comparison.axis_sums import AxisSums, SumsByAxis
from lightning_qat.analysis.comparison.populations import lost_populations
from lightning_qat.quantization import ranks

_QUANT_MAX = 127
"""A part counts if eight bits of its own would keep it."""


class OutputParts:
    """Sums along the axes of every tensor of the chosen output."""

    def __init__(self) -> None:
        self._sums: dict[int, SumsByAxis] = {}

    def add(self, base: Sequence[Tensor], analysed: Sequence[Tensor]) -> None:
        """Add the output of the float model and of the quantized one."""
        for number, (b, a) in enumerate(zip(base, analysed, strict=False)):
            if b.is_floating_point() and b.shape == a.shape and b.dim() > 1:
                axes = sorted({1, b.dim() - 1})
                self._sums.setdefault(number, SumsByAxis()).add(b, a, axes)

    def all_reduce(self) -> None:
        """Put the sums of all ranks together; every rank must call this."""
        every = ranks.gathered_objects(self._sums)
        self._sums = {}
        for number, sums in (item for rank in every for item in rank.items()):
            if number in self._sums:
                self._sums[number].merge(sums)
            else:
                self._sums[number] = sums

    def are_lost(self, bound: float | None) -> bool:
        """Whether a part of one of the tensors is lost.

        Args:
            bound: the largest magnitude that the values can have by what made them; None without a limit.
        """
        return any(_are_lost(sums.known, bound) for sums in self._sums.values())


def _are_lost(sums: dict[int, AxisSums], bound: float | None) -> bool:
    rounding = max((float((s.error / s.count.clamp(min=1)).max()) for s in sums.values()), default=0.0)
    step = math.sqrt(12 * rounding)  # as if one step had made the error
    return any(population.apart for population in lost_populations(sums, _QUANT_MAX, step, bound=bound))
