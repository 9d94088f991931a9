"""Scales that follow each rank's own batches, kept the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lightning_qat.quantization import ranks
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize


def average_over_ranks(fake_quants: Iterable[FakeQuantize]) -> None:
    """Average the moving averages of the ranges over ranks, in one reduction, and compute the scales from them.

    The averages themselves become equal on all ranks, so every rank writes the same checkpoint. With one rank, and for
    scales that are fixed, frozen or not computed yet, nothing changes.

    Args:
        fake_quants: the points whose scales may move, in the same order on all ranks.
    """
    if ranks.count() == 1:
        return
    moving = [f for f in fake_quants if f.scale_source not in (None, "fixed") and not f.frozen]
    if not moving:
        return
    parts = [f.statistics.averages for f in moving]
    averages = ranks.averaged(torch.cat(parts, dim=1).to(torch.float32))
    for fake_quant, average in zip(moving, averages.split([p.shape[1] for p in parts], dim=1), strict=True):
        fake_quant.set_averages(average)
