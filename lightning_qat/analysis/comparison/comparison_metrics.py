"""The errors of all rows of a layer comparison, as one torchmetrics Metric: streamed over batches, reduced over ranks.

One Metric with a row per tensor rather than a Metric per tensor: a model with a thousand points is reduced over ranks
with a handful of collectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_qat.analysis.metrics import MetricName, error_sums, metric_of_sums, rtol
from lightning_qat.quantization.errors import ConfigurationError

_FROM_SUMS: tuple[MetricName, ...] = ("Cosine", "MSE", "L1", "KL", "SQNR")
PIECE = 1 << 20
"""Values compared at a time: they are copied in float64, and a tensor may be of any size."""


@dataclass(frozen=True)
class TensorErrors:
    """How a tensor of the quantized model (``analy``) differs from that of the float model (``base``).

    The fields have the names and definitions of the columns, see :class:`LayerErrors`.
    """

    Cosine: float
    MSE: float
    L1: float
    KL: float
    SQNR: float
    Atol: float
    Rtol: float
    base_model_min: float
    analy_model_min: float
    base_model_max: float
    analy_model_max: float
    base_model_mean: float
    analy_model_mean: float
    base_model_var: float
    analy_model_var: float
    count: float


class LayerErrors(Metric):
    """Errors of many tensors over several batches and ranks.

    With ``b`` a tensor of the float model and ``a`` that of the quantized one, in float64: Cosine of the flattened
    tensors; MSE and L1 are means; ``SQNR = 20 log10(|b| / |b - a|)``; ``Atol = max |b - a|``;
    ``Rtol = max(|b - a| / |b|)``; KL is the mean of ``softmax(b) * (log_softmax(b) - log_softmax(a))`` with the softmax
    along dimension 1 if there are more than two, else along the last; variances are unbiased. Several batches are one
    long tensor, and KL is the mean over all of them. Elements that are not finite in ``b`` are left out.

    Means and squared deviations are merged pairwise (Chan, Golub, LeVeque, 1979), over pieces, batches and ranks.

    Args:
        rows: how many tensors are compared.
        kwargs: see ``torchmetrics.Metric``.

    Example:
        >>> errors = LayerErrors(rows=2)
        >>> errors.update(0, torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
        >>> first, second = errors.errors()
        >>> first.SQNR, first.Atol, second
        (20.0, 0.5, None)
    """

    is_differentiable = False
    full_state_update = False
    sums: Tensor
    largest: Tensor
    lowest: Tensor
    highest: Tensor
    moments: Tensor

    def __init__(self, rows: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        double = torch.float64
        self.add_state("sums", torch.zeros(rows, 7, dtype=double), dist_reduce_fx="sum")
        self.add_state("largest", torch.zeros(rows, 2, dtype=double), dist_reduce_fx="max")
        self.add_state("lowest", torch.full((rows, 2), torch.inf, dtype=double), dist_reduce_fx="min")
        self.add_state("highest", torch.full((rows, 2), -torch.inf, dtype=double), dist_reduce_fx="max")
        # count, mean and sum of squared deviations, of base and of analy
        self.add_state("moments", torch.zeros(rows, 2, 3, dtype=double), dist_reduce_fx=_merged)

    @torch.no_grad()
    def update(self, row: int, base: Tensor, analy: Tensor) -> None:
        """Add a tensor to a row.

        Raises:
            ConfigurationError: the shapes differ.
        """
        if base.shape != analy.shape:
            raise ConfigurationError(f"cannot compare tensors of shapes {tuple(base.shape)} and {tuple(analy.shape)}.")
        for b, a in _pieces(base, analy):
            self._add(row, b, a)

    def _add(self, row: int, b: Tensor, a: Tensor) -> None:
        finite = b.isfinite()
        count = b.numel()
        if not bool(finite.all()):
            count = int(finite.sum())
            zero_b, zero_a = torch.where(finite, b, 0), torch.where(finite, a, 0)
        else:
            zero_b, zero_a = b, a
        if not count:
            return
        device = self.sums.device
        sums = error_sums(zero_b, zero_a, with_kl=True)
        sums[0] = count
        self.sums[row] += sums.to(device)
        atol = (zero_b.double() - zero_a.double()).abs().max()
        self.largest[row] = torch.maximum(self.largest[row], torch.stack([atol, rtol(zero_b, zero_a)]).to(device))
        chosen = [zero_b[finite].double(), zero_a[finite].double()] if count < b.numel() else [b.double(), a.double()]
        low, high = (torch.stack([getattr(v, n)() for v in chosen]).to(device) for n in ("min", "max"))
        self.lowest[row] = torch.minimum(self.lowest[row], low)
        self.highest[row] = torch.maximum(self.highest[row], high)
        means = [v.mean() for v in chosen]
        new = torch.stack(
            [
                torch.stack([v.new_tensor(float(count)), m, (v - m).square().sum()])
                for v, m in zip(chosen, means, strict=True)
            ]
        )
        self.moments[row] = _merged(torch.stack([self.moments[row], new.to(device)]))

    def compute(self) -> Tensor:
        """Return the errors of every row, float64 ``(rows, 16)``: the fields of :class:`TensorErrors` in order."""
        metrics = [torch.stack([metric_of_sums(name, row) for row in self.sums]) for name in _FROM_SUMS]
        counts, means, squares = self.moments.unbind(-1)
        variances = torch.where(counts > 1, squares / (counts - 1).clamp(min=1.0), torch.nan)
        ends = (self.lowest, self.highest, means, variances)
        columns = [*metrics, *self.largest.unbind(1), *(column for pair in ends for column in pair.unbind(1))]
        return torch.stack([*columns, self.sums[:, 0]], dim=1)

    def errors(self) -> tuple[TensorErrors | None, ...]:
        """Return the errors of every row (of all ranks, if synchronized); None for a row without an element."""
        return tuple(TensorErrors(*row) if row[-1] else None for row in self.compute().tolist())


def _merged(stacked: Tensor) -> Tensor:
    """Merge ``(parts, ..., 3)`` counts, means and squared deviations along the first axis."""
    total = stacked[0]
    for part in stacked[1:]:
        count = total[..., 0] + part[..., 0]
        share = torch.where(count > 0, part[..., 0] / count.clamp(min=1.0), 0.0)
        delta = torch.where(part[..., 0] > 0, part[..., 1] - total[..., 1], 0.0)
        mean = total[..., 1] + delta * share
        squares = total[..., 2] + part[..., 2] + delta.square() * total[..., 0] * share
        total = torch.stack([count, mean, squares], dim=-1)
    return total


def _pieces(base: Tensor, analy: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut along the first axis, which no softmax runs along (but for a vector, which stays whole)."""
    base, analy = base.detach(), analy.detach()
    if base.dim() == 0:
        base, analy = base.reshape(1), analy.reshape(1)
    if base.dim() == 1 or base.numel() <= PIECE:
        yield base, analy
        return
    step = max(1, PIECE * base.shape[0] // base.numel())
    yield from zip(base.split(step), analy.split(step), strict=True)
