"""How much one step of an optimizer changes the weights."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups, in their order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def largest_step(optimizer: Optimizer, before: list[Tensor]) -> float:
    """The largest change relative to the largest weight of its tensor, without the change by weight decay."""
    steps, old_ones = [], iter(before)
    for group in optimizer.param_groups:
        decay = float(group.get("lr", 0.0)) * float(group.get("weight_decay", 0.0))
        for now, old in zip(group["params"], old_ones, strict=False):
            if old.numel() and bool(old.any()):
                steps.append(float((now.detach() - old * (1 - decay)).abs().max()) / float(old.abs().max()))
    return max(steps, default=0.0)


def relative_update(group: dict[str, Any], before: dict[int, Tensor], scales: set[int]) -> float:
    """Length of the change of the weights of a group relative to theirs, without the change by weight decay."""
    decay = float(group.get("lr", 0.0)) * float(group.get("weight_decay", 0.0))
    changed, length = 0.0, 0.0
    for parameter in (p for p in group["params"] if id(p) not in scales):
        old = before[id(parameter)]
        changed += float((parameter.detach() - old * (1 - decay)).double().square().sum())
        length += float(old.double().square().sum())
    return math.sqrt(changed / length) if length > 0 else 0.0
