"""How far a training can move its model: what one step changes, and what the plan makes of it until the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingPlan:
    """How far a training can move its model.

    Args:
        steps: optimizer steps until the planned end; 0 if that is not known.
        samples: samples that one step sees, on all ranks; None if that is not known.
        updates: by parameter group, how much one step changes its weights: length of the change relative to that of the
            weights, without weight decay, at the highest learning rate of the schedule. Measured in the first steps
            from the trained weights; empty if it could not be measured.
        kept: share of the gradient's length that clipping leaves, in the median step; None if it was not measured.
        base_rates: by group, the learning rate that schedules start from.
        rates: by group, the highest learning rate until the planned end.
        first_rates: by group, the first one.
        rate_shares: by group, the mean learning rate until the planned end, relative to the highest.
        decays: by group, the share of a weight that weight decay takes until the planned end.
        horizon: steps over which momentum averages.
    """

    steps: int = 0
    samples: float | None = None
    updates: tuple[float, ...] = ()
    kept: float | None = None
    base_rates: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()
    first_rates: tuple[float, ...] = ()
    rate_shares: tuple[float, ...] = ()
    decays: tuple[float, ...] = ()
    horizon: float = 1.0


def planned(steps: int, rates: Sequence[Sequence[float]], weight_decays: Sequence[float]) -> TrainingPlan:
    """Summarize simulated learning rates.

    Args:
        steps: optimizer steps until the planned end, at least the number of those simulated.
        rates: the learning rate of every simulated step, by group; at least one step.
        weight_decays: weight decay by group.

    Example:
        >>> plan = planned(4, [[0.1, 0.1, 0.0, 0.0]], [1.0])
        >>> plan.rates, plan.rate_shares, [round(decay, 3) for decay in plan.decays]
        ((0.1,), (0.5,), [0.181])
    """
    means = [math.fsum(group) / len(group) for group in rates]
    highest = [max(group) for group in rates]
    return TrainingPlan(
        steps,
        rates=tuple(highest),
        first_rates=tuple(group[0] for group in rates),
        rate_shares=tuple(mean / peak if peak > 0 else 0.0 for mean, peak in zip(means, highest, strict=True)),
        decays=tuple(-math.expm1(-decay * mean * steps) for decay, mean in zip(weight_decays, means, strict=True)),
    )
