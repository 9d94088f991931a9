"""A small classifier of the scanned digits with batch norm, whose training pipeline can be sabotaged."""

from __future__ import annotations

import functools
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from tests.harness.trainers import quiet

MEAN, STD = 4.884, 6.017


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.from_numpy(data.images).float().unsqueeze(1), torch.from_numpy(data.target).long()


class OnDigits(LightningModule):
    """Trains with Adam on 1,200 digits, and validates on 300 others."""

    lr: float

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = digits()
        return DataLoader(TensorDataset(images[:1200], labels[:1200]), batch_size=64, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        images, labels = digits()
        return DataLoader(TensorDataset(images[1200:1500], labels[1200:1500]), batch_size=50)


class Digits(OnDigits):
    """Images come as they are, 0 to 16; every step normalizes them, unless training forgets to."""

    def __init__(self, lr: float = 1e-3, normalized_in_training: bool = True) -> None:
        super().__init__()
        self.lr = lr
        self.normalized_in_training = normalized_in_training
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(256, 10)
        self.val_acc = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        logits: Tensor = self.head(F.relu(self.bn2(self.conv2(h))).flatten(1))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self((x - MEAN) / STD if self.normalized_in_training else x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self((batch[0] - MEAN) / STD)
        self.val_acc(logits, batch[1])
        self.log("val_loss", F.cross_entropy(logits, batch[1]), sync_dist=True)
        self.log("val_acc", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_acc", (self((batch[0] - MEAN) / STD).argmax(1) == batch[1]).float().mean())

    def test_dataloader(self) -> DataLoader[Any]:
        images, labels = digits()
        return DataLoader(TensorDataset(images[1500:], labels[1500:]), batch_size=99)


def float_weights(seed: int = 0) -> dict[str, Tensor]:
    """Train the float model, once per seed and process."""
    return {name: tensor.clone() for name, tensor in _trained(seed).items()}


@functools.cache
def _trained(seed: int) -> dict[str, Tensor]:
    seed_everything(seed, verbose=False)
    model = Digits(lr=0.01)
    settings = quiet() | {"max_epochs": 6, "limit_val_batches": 0}
    Trainer(**settings).fit(model)
    return dict(model.state_dict())


def pretrained(seed: int = 0, **kwargs: Any) -> Digits:
    """The float model, about to be trained with quantization."""
    weights = float_weights(seed)
    model = Digits(**kwargs)
    model.load_state_dict(weights)
    return model
