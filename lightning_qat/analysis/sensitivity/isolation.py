"""Sensitivity by isolation: quantize one point in the float model, run it, compare."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_qat.analysis.captured_calls import RepeatableForward
from lightning_qat.analysis.metrics import error_sums
from lightning_qat.analysis.nan_origin import refuse_nan
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.analysis.sensitivity.sensitivity_metric import SensitivityMetric
from lightning_qat.quantization import ranks
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.region.region import Region


class Isolation:
    """Measures what each chosen point does to the output, batch by batch.

    Use it inside :func:`~lightning_qat.analysis.captured_calls.analysis_mode`. The result is that of a deployed model
    with this one quantized tensor: indices that change (``topk``, ``argmax``) change the output. Where they
    change its shape (boxes that a score selects), elements that only one of the two outputs has count as zero in the
    other.

    Args:
        region: a calibrated region.
        names: the points to measure; of points that share a quantizer, only the owner.
        select: the chosen output.
        metric: the metric to measure, in addition to the mean squared change.
        seed: seed of the random numbers that the forward draws.

    Attributes:
        sums: the sums per point, see :func:`~lightning_qat.analysis.metrics.error_sums`.
        reached: points that a batch ran.
        reshaped: points that change the shape of the output in some batch.
        batches: number of batches.
    """

    def __init__(
        self, region: Region, names: list[str], select: OutputSelector, metric: SensitivityMetric, seed: int
    ) -> None:
        self.region = region
        self.select = select
        self.metric = metric
        self.seed = seed
        self.sums = {name: torch.zeros(7, dtype=torch.float64) for name in names}
        self.custom = {name: metric.accumulator() for name in names}
        self.reached: set[str] = set()
        self.reshaped: set[str] = set()
        self.batches = 0
        self._owner = {point.name: point.same_as or point.name for point in region.plan.points}

    def run(self, call: Call) -> None:
        """Add one batch.

        Raises:
            ConfigurationError: the float output holds NaN, or the metric does not take an output of another shape.
        """
        seen: set[str] = set()
        with RepeatableForward(self.region.target, call, self.seed) as forward:
            with self.region.only(()), self.region.tap(lambda name, *_: seen.add(self._owner[name])):
                reference = [tensor.clone() for tensor in self.select(forward())]
            refuse_nan(reference, self.select.description, self.region, forward)
            unchanged = self._error(reference, reference)
            for name in self.sums:
                if name not in seen:  # quantizing it changes nothing here
                    self.sums[name] += unchanged
                    self.custom[name].update(reference, reference)
                    continue
                with self.region.only((name,)):
                    analysed = self.select(forward())
                    self.sums[name] += self._error(reference, analysed)
                    if _shapes(reference) == _shapes(analysed):
                        self.custom[name].update(reference, analysed)
                    else:
                        self.reshaped.add(name)
                        self._update_reshaped(name, reference, analysed)
        self.reached |= seen
        self.batches += 1

    def all_reduce(self) -> None:
        """Add the sums of all ranks."""
        if ranks.count() == 1:
            return
        custom = self.custom
        rows = [
            [*s.tolist(), float(n in self.reached), float(n in self.reshaped), *custom[n].sums]
            for n, s in self.sums.items()
        ]
        rows.append([0.0] * 7 + [float(self.batches), 0.0, 0.0, 0.0])
        table = ranks.summed(torch.tensor(rows, dtype=torch.float64))
        self.batches = int(table[-1, 7])
        for (name, sums), row in zip(self.sums.items(), table, strict=False):
            sums.copy_(row[:7])
            custom[name].sums = (float(row[9]), float(row[10]))
            if row[7]:
                self.reached.add(name)
            if row[8]:
                self.reshaped.add(name)

    def value(self, name: str) -> float:
        """Return the metric of a point."""
        return self.custom[name].compute(self.sums[name])

    def _update_reshaped(self, name: str, reference: list[Tensor], analysed: list[Tensor]) -> None:
        try:
            self.custom[name].update(reference, analysed)
        except Exception as error:  # a user's metric may raise anything
            raise ConfigurationError(
                f"quantizing {name} changes the shape of {self.select.description}, and the metric {self.metric.name} "
                f"does not accept this ({type(error).__name__}: {error}). Choose an output before the selection, or a "
                "metric that compares outputs of different shapes."
            ) from error

    def _error(self, reference: list[Tensor], analysed: list[Tensor]) -> Tensor:
        if [t.dim() for t in reference] != [t.dim() for t in analysed]:
            return torch.full((7,), torch.nan, dtype=torch.float64)
        total = torch.zeros(7, dtype=torch.float64)
        for base, analy in zip(reference, analysed, strict=True):
            count = base.isfinite().sum()
            base, analy = _padded(base, analy)
            finite = base.isfinite()
            if not bool(finite.all()):
                base, analy = torch.where(finite, base, 0), torch.where(finite, analy, 0)
            sums = error_sums(base, analy, self.metric.name == "KL").cpu()
            sums[0] = count
            total += sums
        return total


def choose_points(names: list[str], max_points: int | None, seed: int = 0, turn: int = 0) -> list[str]:
    """Choose which points are measured: all, or the next ``max_points`` of a fixed random order.

    The order depends on the seed only, and a turn continues where the one before ended, from the end on at the start.
    So every point is measured equally often, and no part of the model is preferred.

    Args:
        names: all points.
        max_points: how many to choose; None for all.
        seed: seed of the order.
        turn: number of this choice, from 0.

    Returns:
        The chosen names, in the order of ``names``.

    Example:
        >>> [choose_points(["a", "b", "c"], 2, turn=turn) for turn in range(3)]
        [['b', 'c'], ['a', 'b'], ['a', 'c']]
    """
    if max_points is None or max_points >= len(names):
        return list(names)
    order = random.Random(seed).sample(names, len(names))
    chosen = {order[(turn * max_points + index) % len(order)] for index in range(max_points)}
    return [name for name in names if name in chosen]


def _shapes(tensors: list[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pad two tensors with as many dimensions to one shape, with zeros at the end of each axis."""
    if a.shape == b.shape:
        return a, b
    lengths = [max(pair) for pair in zip(a.shape, b.shape, strict=True)]

    def padded(tensor: Tensor) -> Tensor:
        missing = [length - own for length, own in zip(lengths, tensor.shape, strict=True)]
        return F.pad(tensor, [n for count in reversed(missing) for n in (0, count)])

    return padded(a), padded(b)
