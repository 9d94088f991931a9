"""Losses of both heads: every layer's detections are assigned to what is there, and pulled towards it."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from examples.bev.scenes import RANGE

EXTENT = 1.125 * RANGE
"""The bird's-eye view reaches from -EXTENT to EXTENT, so that places from 0 to 1 are not used up to their ends."""


def metres(places: Tensor) -> Tensor:
    """Places before the sigmoid as coordinates in metres."""
    return (2 * places.sigmoid() - 1) * EXTENT


def obstacle_loss(found: list[dict[str, Tensor]], vehicles: Tensor, classes: Tensor) -> Tensor:
    """Sum over the layers of the obstacle head.

    Args:
        found: what the head returned.
        vehicles: see ``Scene``.
        classes: see ``Scene``.
    """
    losses = []
    for layer in found:
        centres = metres(layer["places"])
        distance = (centres[:, :, None] - vehicles[:, None, :, :2]).abs().sum(-1)
        rows = assigned(layer["scores"], 0.5 * distance, classes)
        scene, detection, thing = rows
        shapes = F.l1_loss(layer["shapes"][scene, detection], vehicles[scene, thing, 2:], reduction="sum")
        centre = F.l1_loss(centres[scene, detection], vehicles[scene, thing, :2], reduction="sum")
        count = max(1, len(scene))
        losses.append(class_loss(layer["scores"], rows, classes) + (0.5 * centre + 0.1 * shapes) / count)
    return torch.stack(losses).sum()


def map_loss(found: list[dict[str, Tensor]], lines: Tensor, classes: Tensor) -> Tensor:
    """Sum over the layers of the map head.

    Args:
        found: what the head returned.
        lines: see ``Scene``.
        classes: see ``Scene``.
    """
    losses = []
    for layer in found:
        points = metres(layer["points"])
        distance = (points[:, :, None] - lines[:, None]).abs().sum(-1).mean(-1)
        rows = assigned(layer["scores"], 0.5 * distance, classes)
        scene, detection, thing = rows
        off = (points[scene, detection] - lines[scene, thing]).abs().sum(-1).mean(-1).sum()
        losses.append(class_loss(layer["scores"], rows, classes) + 0.5 * off / max(1, len(scene)))
    return torch.stack(losses).sum()


def assigned(scores: Tensor, distance: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Assign a detection to everything that is there, at the least cost.

    Args:
        scores: logits, ``(N, detections, classes)``.
        distance: ``(N, detections, things)``, in the unit of the loss.
        classes: ``(N, things)``, -1 where there is none.

    Returns:
        Numbers of the scene, the detection and the thing of each pair.
    """
    probability = scores.detach().sigmoid()
    wanted = classes.clamp(min=0)[:, None].expand(-1, scores.shape[1], -1)
    cost = (distance.detach() - 2 * probability.gather(2, wanted)).nan_to_num(1e4, 1e4, -1e4).cpu()
    scene, detection, thing = [], [], []
    for number, present in enumerate((classes >= 0).cpu()):
        columns = present.nonzero().flatten()
        chosen, of = linear_sum_assignment(cost[number][:, columns].numpy())
        scene += [number] * len(chosen)
        detection += chosen.tolist()
        thing += columns[of].tolist()
    return (
        torch.tensor(scene, dtype=torch.long),
        torch.tensor(detection, dtype=torch.long),
        torch.tensor(thing, dtype=torch.long),
    )


def class_loss(scores: Tensor, rows: tuple[Tensor, Tensor, Tensor], classes: Tensor) -> Tensor:
    """Focal loss (arXiv:1708.02002) of all detections, per thing.

    Args:
        scores: logits, ``(N, detections, classes)``.
        rows: what :func:`assigned` returned.
        classes: ``(N, things)``.
    """
    scene, detection, thing = rows
    target = torch.zeros_like(scores)
    target[scene, detection, classes[scene, thing]] = 1
    probability = scores.sigmoid()
    wrong = torch.where(target > 0, 1 - probability, probability)
    loss = F.binary_cross_entropy_with_logits(scores, target, reduction="none") * wrong**2
    return 2 * loss.sum() / max(1, len(scene))
