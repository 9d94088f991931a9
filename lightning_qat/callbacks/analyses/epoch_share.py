"""How much of a short epoch an analysis at its end looks at, so that it stays cheap."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning.pytorch as pl

from lightning_qat.analysis.sensitivity.sample_axes import number_of_samples
from lightning_qat.quantization.modules.call import Call

EPOCHS_SHARE = 40
"""An analysis that runs a forward or two on this fraction (1/40) of an epoch's samples takes 2 to 3 % of the epoch: a
training step does more with each of them."""
FEWEST_SAMPLES = 16


def batches_of_share(trainer: pl.Trainer) -> float:
    """Return a 40th of the batches that an epoch trains on; it may be less than one."""
    return float(trainer.num_training_batches) / EPOCHS_SHARE


def samples_of_share(batches: float, calls: Sequence[Call]) -> int | None:
    """Return how many samples to take of each call; None for all.

    Args:
        batches: the number that all calls together may stand for.
        calls: one for each batch, all of about the same size.

    Example:
        >>> import torch
        >>> calls = [Call.of(torch.zeros(64, 3))]
        >>> samples_of_share(16 / 40, calls), samples_of_share(1 / 40, calls), samples_of_share(1.5, calls)
        (26, 16, None)
    """
    share = batches / max(1, len(calls))
    samples = max((number_of_samples(call) or 0 for call in calls), default=0)
    return None if share >= 1 else max(FEWEST_SAMPLES, math.ceil(share * samples))
