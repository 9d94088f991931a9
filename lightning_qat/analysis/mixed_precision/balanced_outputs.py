"""Outputs of several tensors in one unit, so that no task is lost beside one of larger numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_qat.analysis.captured_calls import RepeatableForward, analysis_mode
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.quantization import ranks
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.region.region import Region


@dataclass(frozen=True)
class BalancedOutputs(OutputSelector):
    """Picks tensors as :class:`~lightning_qat.analysis.outputs.OutputSelector` does, each times a factor.

    Args:
        factors: one for each tensor.
    """

    factors: tuple[float, ...] = ()

    @override
    def differentiable(self, region_output: Any) -> list[Tensor]:
        tensors = super().differentiable(region_output)
        return [tensor * factor for tensor, factor in zip(tensors, self.factors, strict=True)]

    @property
    @override
    def description(self) -> str:
        number = sum(factor > 0 for factor in self.factors)
        return super().description + (f" ({number} tensors, which count alike)" if number > 1 else "")


def balanced(
    region: Region, calls: Sequence[Call], select: OutputSelector, seed: int = 0, across_ranks: bool = False
) -> OutputSelector:
    """Return a selector after which the mean squared error is the mean over tensors of their relative ones.

    The squared error of a tensor, relative to the mean square of its float values, is the noise-to-signal ratio. A
    single number beside other tensors, such as a loss, does not count. An output of one tensor is left as it is; so is
    one whose number of tensors is not always the same.

    Args:
        region: a calibrated region.
        calls: the inputs.
        select: the chosen output.
        seed: of the random numbers that the forward draws.
        across_ranks: add up what all ranks measure.
    """
    found: list[list[Tensor]] = []
    with ranks.failing_together(across_ranks), analysis_mode(region, buffers=False), region.only(()):
        for call in calls:
            with RepeatableForward(region.target, call, seed) as forward:
                tensors = select(forward())
                found.append(
                    [count_and_squares(t) * counts for t, counts in zip(tensors, counted(tensors), strict=True)]
                )
            if len(tensors) < 2:
                break
    numbers = {len(sums) for sums in found}
    if across_ranks:
        numbers = set().union(*ranks.gathered_objects(numbers))
    if len(numbers) != 1 or max(numbers) < 2:
        return select
    total = sum(map(torch.stack, found), torch.zeros(max(numbers), 2, dtype=torch.float64))
    factors = _factors((ranks.summed(total) if across_ranks else total).tolist())
    return BalancedOutputs(select.output, select.post_process, factors)


def counted(tensors: Sequence[Tensor]) -> list[bool]:
    """Return which tensors of an output count: single numbers, such as a loss, only if there is nothing else.

    Example:
        >>> counted([torch.tensor(1.0), torch.ones(2, 3)]), counted([torch.tensor(1.0)])
        ([False, True], [True])
    """
    if all(tensor.ndim == 0 for tensor in tensors):
        return [True] * len(tensors)
    return [tensor.ndim > 0 for tensor in tensors]


def count_and_squares(tensor: Tensor) -> Tensor:
    """Return the number of finite elements and the sum of their squares, float64 ``(2,)`` on the CPU."""
    finite = tensor[tensor.isfinite()].double()
    return torch.stack([finite.new_tensor(float(finite.numel())), finite.square().sum()]).cpu()


def _factors(sums: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the factors for tensors whose numbers of elements and sums of squares are given.

    A tensor that does not count, or holds only zeros, has 0; the only one that counts stays in its own unit.
    """
    whole = sum(count for count, _ in sums)
    used = sum(square > 0 for _, square in sums)
    if used == 1:
        return tuple(float(square > 0) for _, square in sums)
    return tuple(math.sqrt(whole / (used * square)) if square > 0 else 0.0 for _, square in sums)
