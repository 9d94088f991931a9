"""The LightningModule: what a step does, and what is logged."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from examples.bev.data import Batch
from examples.bev.losses import EXTENT, map_loss, metres, obstacle_loss
from examples.bev.metrics import DetectionAP, chamfer_distance
from examples.bev.model import CELLS, NOT_VISIBLE, PILLAR, BevNet
from examples.bev.scenes import LINE_CLASSES, VEHICLE_CLASSES, project

_MEAN, _STD = 0.42, 0.2


class BevModule(LightningModule):
    """Vehicles (``dynamic``) and lines of the road (``static``) from the cameras around a car.

    The last three arguments are there to make mistakes with; see README.md.

    Args:
        width: channels of the network.
        lr: largest learning rate.
        weight_decay: of AdamW.
        warm_up: share of the training in which the learning rate rises.
        annotate: mark the loop over the cameras, whose number varies, as a dynamic block.
        force_sharing: let all calls of the position embedding share their scales.
        training_images: what training normalises: ``shares`` of 255, as validation does, or ``bytes``, if the division
            is forgotten. Batch norm then counts with images 255 times as bright as those of validation.
    """

    reference_points: Tensor

    def __init__(
        self,
        width: int = 32,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        warm_up: float = 0.05,
        annotate: bool = True,
        force_sharing: bool = False,
        training_images: Literal["shares", "bytes"] = "shares",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.warm_up, self.training_images = lr, weight_decay, warm_up, training_images
        self.model = BevNet(width, annotate, force_sharing)
        self.register_buffer("reference_points", reference_points(), persistent=False)
        self.dynamic = DetectionAP(len(VEHICLE_CLASSES), (0.5, 1.0, 2.0))
        self.static = DetectionAP(len(LINE_CLASSES), (0.3, 0.6, 1.0))

    def detect(self, images: Tensor, batch: Batch) -> dict[str, list[dict[str, Tensor]]]:
        """What the network finds in normalised images."""
        cameras = batch.cameras.tolist()
        found: dict[str, list[dict[str, Tensor]]] = self.model(images, self.reference_points[:, cameras], cameras)
        return found

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = with_brightness(batch.images.float())
        if self.training_images == "shares":
            images = images / 255
        loss = self._loss(self.detect(normalised(images), batch), batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        found = self.detect(normalised(batch.images / 255), batch)
        self.log("val_loss", self._loss(found, batch), batch_size=len(batch.images))
        vehicles, lines = found["obstacles"][-1], found["map"][-1]
        centres = torch.cdist(metres(vehicles["places"]), batch.vehicles[..., :2])
        self.dynamic(vehicles["scores"].sigmoid(), centres, batch.vehicle_classes)
        between = chamfer_distance(metres(lines["points"]), batch.lines)
        self.static(lines["scores"].sigmoid(), between, batch.line_classes)
        self.log("dynamic", self.dynamic, prog_bar=True)
        self.log("static", self.static, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=steps, pct_start=self.warm_up, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss(self, found: dict[str, list[dict[str, Tensor]]], batch: Batch) -> Tensor:
        obstacles = obstacle_loss(found["obstacles"], batch.vehicles, batch.vehicle_classes)
        return obstacles + map_loss(found["map"], batch.lines, batch.line_classes)


def with_brightness(images: Tensor) -> Tensor:
    """Images of bytes, each a little brighter or darker."""
    factor = torch.empty(len(images), 1, 1, 1, 1, device=images.device).uniform_(0.9, 1.1)
    return (images * factor).clamp(0, 255)


def normalised(images: Tensor) -> Tensor:
    """Images from 0 to 1 with mean 0 and variance 1, or nearly."""
    return (images - _MEAN) / _STD


def reference_points() -> Tensor:
    """Where each camera sees the cells of the bird's-eye view: see ``BevNet.forward``."""
    ticks = ((torch.arange(CELLS) + 0.5) / CELLS * 2 - 1) * EXTENT
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    columns = torch.stack([torch.stack([x, y, torch.full_like(x, height)], dim=-1) for height in PILLAR], dim=2)
    places, visible = project(columns.reshape(-1, 3).numpy())
    points = torch.where(torch.from_numpy(visible)[..., None], 2 * torch.from_numpy(places) - 1, NOT_VISIBLE)
    cells: Tensor = points.unflatten(1, (CELLS * CELLS, len(PILLAR)))
    return cells[None]
