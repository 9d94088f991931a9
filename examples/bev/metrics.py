"""Average precision of detections, for things that match by a distance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat


class DetectionAP(Metric):
    """Mean average precision, in percent, over classes and over the distances up to which a detection is right.

    As in nuScenes: detections of a class are taken by falling score, and each takes the nearest free object of the
    scene. A state holds one row for each detection: class, score, and for each distance whether it is right.

    Args:
        classes: number of classes.
        distances: the largest distances, in metres.
        least_score: what scores less is no detection.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, classes: int, distances: Sequence[float], least_score: float = 0.02) -> None:
        super().__init__()
        self.classes, self.distances, self.least_score = classes, tuple(distances), least_score
        self.rows: list[Tensor]
        self.objects: Tensor
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("objects", default=torch.zeros(classes), dist_reduce_fx="sum")

    def update(self, scores: Tensor, distances: Tensor, classes: Tensor) -> None:
        """Add scenes.

        Args:
            scores: ``(N, detections, classes)``, 0 to 1.
            distances: ``(N, detections, objects)``, from each detection to each object.
            classes: ``(N, objects)``, -1 where there is none.
        """
        self.objects += torch.stack([(classes == kind).sum() for kind in range(self.classes)])
        for scene_scores, scene_distances, scene_classes in zip(scores, distances, classes, strict=True):
            for kind in range(self.classes):
                mine = scene_scores[:, kind]
                order = mine.argsort(descending=True)
                order = order[mine[order] > self.least_score]
                right = self._matched(scene_distances[order][:, scene_classes == kind])
                label = torch.full_like(mine[order], kind)
                self.rows.append(torch.cat([label[:, None], mine[order][:, None], right], dim=1))

    def compute(self) -> Tensor:
        """Return the mean average precision in percent."""
        rows = dim_zero_cat(self.rows)
        by_kind = [(rows[rows[:, 0] == kind], int(count)) for kind, count in enumerate(self.objects) if count]
        found = [
            average_precision(mine[:, 1], mine[:, 2 + column], count)
            for mine, count in by_kind
            for column in range(len(self.distances))
        ]
        return 100 * torch.tensor(found).mean()

    def _matched(self, distances: Tensor) -> Tensor:
        """Which detections are right, ``(detections, limits)``; the first ones choose first."""
        right = torch.zeros(len(distances), len(self.distances))
        for column, limit in enumerate(self.distances):
            free = distances.clone().nan_to_num(nan=float("inf"))
            for row in range(len(free) if free.shape[1] else 0):
                nearest = int(free[row].argmin())
                if free[row, nearest] <= limit:
                    right[row, column] = 1
                    free[:, nearest] = float("inf")
        return right


def average_precision(scores: Tensor, right: Tensor, objects: int) -> float:
    """Area under precision over recall, with precision made to fall.

    Args:
        scores: ``(detections,)``.
        right: ``(detections,)``, 1 where the detection is right.
        objects: how many there are to find.

    Example:
        >>> average_precision(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1.0, 0.0, 1.0]), 2)
        0.8333333134651184
    """
    if not len(scores):
        return 0.0
    hits = right[scores.argsort(descending=True, stable=True)].cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    precision = precision.flip(0).cummax(0).values.flip(0)
    steps = torch.diff(hits, prepend=hits.new_zeros(1)) / objects
    return float((precision * steps).sum())


def chamfer_distance(predicted: Tensor, lines: Tensor) -> Tensor:
    """Mean distance of the points of two lines from the nearest points of the other, both ways.

    Args:
        predicted: ``(N, detections, points, 2)``.
        lines: ``(N, objects, points, 2)``.

    Returns:
        ``(N, detections, objects)``.
    """
    between = (predicted[:, :, None, :, None] - lines[:, None, :, None, :]).square().sum(-1).sqrt()
    return (between.amin(-1).mean(-1) + between.amin(-2).mean(-1)) / 2
