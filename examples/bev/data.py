"""The scenes as a LightningDataModule: batches of images from the cameras that work, and what there is to find."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from examples.bev.scenes import CAMERAS, make_scene

_FIRST_VALIDATION_SCENE = 1_000_000


class Batch(NamedTuple):
    """What a step gets.

    Args:
        images: ``(N, cameras, 3, height, width)``, bytes as a camera gives them.
        cameras: ``(cameras,)``, the numbers of those that work; a batch may lack one.
        vehicles: ``(N, MOST_VEHICLES, 6)``, see ``Scene``.
        vehicle_classes: ``(N, MOST_VEHICLES)``, -1 where there is none.
        lines: ``(N, MOST_LINES, LINE_POINTS, 2)``.
        line_classes: ``(N, MOST_LINES)``, -1 where there is none.
    """

    images: Tensor
    cameras: Tensor
    vehicles: Tensor
    vehicle_classes: Tensor
    lines: Tensor
    line_classes: Tensor


class BevDataModule(LightningDataModule):
    """Made-up driving scenes; they are rendered once and kept in a file.

    Args:
        train_scenes: number of scenes to train with.
        val_scenes: number of scenes to validate with.
        batch_size: scenes per batch.
        folder: where the rendered scenes are kept; None to render them anew in every process.
    """

    def __init__(
        self,
        train_scenes: int = 3000,
        val_scenes: int = 256,
        batch_size: int = 32,
        folder: str | None = "logs/bev/scenes",
    ) -> None:
        super().__init__()
        self.train_scenes, self.val_scenes, self.batch_size, self.folder = train_scenes, val_scenes, batch_size, folder

    def setup(self, stage: str | None = None) -> None:
        self.train_set = scenes(0, self.train_scenes, self.folder)
        self.val_set = scenes(_FIRST_VALIDATION_SCENE, self.val_scenes, self.folder)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, collate_fn=collated)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val_set, self.batch_size, collate_fn=collated)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.val_dataloader()


def scenes(first: int, count: int, folder: str | None) -> TensorDataset:
    """Return scenes as tensors, from a file if they are there; the last tensor has their numbers.

    Args:
        first: number of the first scene.
        count: how many.
        folder: of the file.
    """
    path = None if folder is None else Path(folder) / f"{first}_{count}.pt"
    if path is not None and path.exists():
        return TensorDataset(*torch.load(path, weights_only=True))
    made = [make_scene(number) for number in range(first, first + count)]
    tensors = [
        torch.stack([torch.from_numpy((s.images * 255).round().astype("uint8")) for s in made]),
        *(
            torch.stack([torch.from_numpy(getattr(s, name)) for s in made])
            for name in ("vehicles", "vehicle_classes", "lines", "line_classes")
        ),
        torch.arange(count),
    ]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(f".{os.getpid()}")
        torch.save(tensors, written)
        written.replace(path)
    return TensorDataset(*tensors)


def collated(rows: list[tuple[Tensor, ...]]) -> Batch:
    """Make a batch of scenes. In one recording of five, a camera was dead: the batch lacks its images.

    Args:
        rows: tensors of each scene.
    """
    images, vehicles, vehicle_classes, lines, line_classes, numbers = (
        torch.stack(column) for column in zip(*rows, strict=True)
    )
    recording = int(numbers[0]) // 32
    dead = recording % CAMERAS if recording % 5 == 1 else None
    cameras = torch.tensor([camera for camera in range(CAMERAS) if camera != dead])
    return Batch(images[:, cameras], cameras, vehicles, vehicle_classes, lines, line_classes)
