"""How far a number may fall on a rung before the rung breaks.

What chance explains is in :mod:`lightning_qat.analysis.tolerance`. Here is the least that each kind of number may
differ.
"""

from __future__ import annotations

from lightning_qat.analysis.tolerance import COLLAPSE, ROUNDING, tolerance

ROUNDING_OF_A_MEAN = 1e-6
"""Relative difference that float32 makes of the same mean."""


def metric_tolerance(expected: float, standard_error: float) -> float:
    """Return how much worse a metric may be that was measured on other batches, or after a training.

    Without an estimate of the noise only a collapse counts: with one batch, for a metric of the whole epoch, or where
    all batches agree.

    Args:
        expected: the value before.
        standard_error: its variation over the evaluation batches; 0 if it is not known.

    Example:
        >>> metric_tolerance(0.9, 0.01), metric_tolerance(0.9, 0.0)
        (0.03, 0.09000000000000001)
    """
    if standard_error > 0:
        return tolerance(standard_error, least=ROUNDING_OF_A_MEAN * abs(expected))
    return COLLAPSE * abs(expected)


def same_samples_tolerance(expected: float) -> float:
    """Return how much worse a metric of the same samples may be: another device or precision rounds differently."""
    return ROUNDING * abs(expected)


def train_loss_tolerance(reference: float, standard_error: float | None) -> float:
    """Return how much higher than in the float run a training loss may be.

    Batch norm and dropout are in another mode than in the float run, so that less than double says nothing.
    """
    return abs(reference) + tolerance(standard_error or 0.0)


def first_losses_tolerance(reference: float, *standard_errors: float) -> float:
    """Return how far the training losses of the same first batches may lie apart in two pipelines."""
    return tolerance(*standard_errors, least=COLLAPSE * abs(reference))
