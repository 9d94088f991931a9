"""A small classifier with its data: nothing in it is odd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def dataset(size: int = 32, seed: int = 0) -> TensorDataset:
    """Images ``(size, 1, 6, 6)`` and labels 0 ... 3."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 6, 6, generator=generator)
    return TensorDataset(images, torch.randint(0, 4, (size,), generator=generator))


def loader(size: int = 32, batch_size: int = 8, seed: int = 0, **kwargs: Any) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(dataset(size, seed), batch_size=batch_size, **kwargs)


class ResumableLoader:
    """Batches in order; tells Lightning where it is, so that a run can resume in the middle of an epoch."""

    def __init__(self, size: int = 32, batch_size: int = 8) -> None:
        self.batches = list(loader(size, batch_size))
        self.position = 0
        self.start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        first, self.start = self.start, 0
        for index in range(first, len(self.batches)):
            self.position = index + 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"] % len(self.batches)


class Net(nn.Module):
    """Convolution, batch norm, relu, a functional add and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.conv2(x) + x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class Classifier(LightningModule):
    """The steps call the submodule ``net``; loaders come with it."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = Net()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return loader(shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(16, seed=1)

    def test_dataloader(self) -> Any:
        return loader(16, seed=2)

    def predict_dataloader(self) -> Any:
        return loader(16, seed=2)


class SelfClassifier(Classifier):
    """The steps call the LightningModule itself, which is the target then."""

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)
