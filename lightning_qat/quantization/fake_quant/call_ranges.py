"""The range of each call of a point that runs several times per forward with one scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_qat.quantization import ranks
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.tracing.op_graph import OpGraph

Range = tuple[float, float]
EMPTY: Range = (math.inf, -math.inf)


class CallRanges:
    """Smallest and largest finite value of every call of a point, over all calibration batches.

    Attributes:
        points: by point, the range of its first, second, ... call within a forward; ``(inf, -inf)`` without a value.

    Example:
        >>> ranges = CallRanges()
        >>> ranges.observe("sine.output", 0, torch.tensor([0.0, 4.59]))
        >>> ranges.observe("sine.output", 1, torch.tensor([0.0, 6.28]))
        >>> [round(high, 2) for low, high in ranges.points["sine.output"]]
        [4.59, 6.28]
    """

    def __init__(self) -> None:
        self.points: dict[str, list[Range]] = {}

    def reset(self) -> None:
        """Forget everything."""
        self.points.clear()

    @torch.no_grad()
    def observe(self, point: str, call: int, x: Tensor) -> None:
        """Record one call.

        Args:
            point: name of the point.
            call: number of the call within the forward, from 0.
            x: the tensor at the point.
        """
        calls = self.points.setdefault(point, [])
        calls.extend([EMPTY] * (call + 1 - len(calls)))
        finite = x.detach()[x.isfinite()]
        if finite.numel():
            low, high = torch.aminmax(finite)
            calls[call] = (min(calls[call][0], low.item()), max(calls[call][1], high.item()))

    def all_reduce(self, points: Iterable[str]) -> None:
        """Combine the ranges of all ranks; every rank must call this, with the same points in the same order."""
        names = list(points)
        if not names:
            return
        counts = ranks.largest(torch.tensor([len(self.points.get(name, ())) for name in names]))
        own = [[*self.points.get(name, ())] for name in names]
        padded = [r + [EMPTY] * (count - len(r)) for r, count in zip(own, counts.tolist(), strict=True)]
        own_ends = [(-low, high) for calls in padded for low, high in calls]
        ends = ranks.largest(torch.tensor(own_ends, dtype=torch.float64)) if own_ends else torch.empty(0, 2)
        rows = iter((-low, high) for low, high in ends.tolist())
        self.points = {
            name: [next(rows) for _ in range(count)] for name, count in zip(names, counts.tolist(), strict=True)
        }
        self.points = {name: ranges for name, ranges in self.points.items() if ranges}

    def state_dict(self) -> dict[str, list[list[float]]]:
        """Return the ranges of every point as lists of numbers."""
        return {name: [list(r) for r in ranges] for name, ranges in self.points.items()}

    def load_state_dict(self, state: Mapping[str, list[list[float]]]) -> None:
        """Take the state of :meth:`state_dict`."""
        self.points = {name: [(low, high) for low, high in ranges] for name, ranges in state.items()}


def repeating_points(graph: OpGraph, plan: QuantPlan) -> list[str]:
    """Return the activation points that several calls within one forward share: those in dynamic blocks."""
    return [p.name for p in plan.points if not p.is_weight and graph.by_name[p.op].calls > 1]
