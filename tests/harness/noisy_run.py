"""A small run that has everything an analysis could disturb: shuffling, augmentation, dropout, batch norm, metrics."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from tests.harness.state import assert_same
from tests.harness.trainers import qat_trainer


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.dropout(F.relu(self.bn(self.conv(x))).mean((2, 3)))
        return {"logits": self.head(h), "features": h}

    def step(self, batch: tuple[Tensor, Tensor], name: str) -> Tensor:
        x, y = batch
        logits = self(x + 0.01 * torch.randn_like(x))["logits"]
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log(f"{name}_loss", loss)
        self.log(f"{name}_accuracy", self.accuracy)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.step(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def loader(self, shuffle: bool) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        y = torch.arange(24) % 3
        x = torch.randn(24, 1, 6, 6, generator=generator) + y[:, None, None, None]
        return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(shuffle=False)


class RandomNumbers(Callback):
    """Notes what every batch of training draws: any disturbance shows here at once."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.drawn += [torch.get_rng_state(), batch[0].clone()]


def trainer_of(directory: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    """Two epochs of QAT whose activation scales move."""
    quantization = kwargs.pop("quantization", None) or QuantizationAwareTraining(activation_scales="ema")
    settings = {"max_epochs": 2, "calibration_batches": 2, **kwargs}
    return qat_trainer(directory, *callbacks, quantization=quantization, **settings)


def run(directory: Path, *callbacks: Callback, **kwargs: Any) -> tuple[Classifier, Trainer]:
    """Train the classifier from a fixed seed."""
    seed_everything(0, verbose=False)
    model = Classifier()
    trainer = trainer_of(directory, *callbacks, **kwargs)
    trainer.fit(model)
    return model, trainer


def assert_same_run(directory: Path, *callbacks: Callback, own_metrics: str | tuple[str, ...], **kwargs: Any) -> None:
    """Train with and without callbacks and compare everything there is, bit for bit."""
    plain_numbers, other_numbers = RandomNumbers(), RandomNumbers()
    plain, plain_trainer = run(directory / "plain", plain_numbers, **kwargs)
    after_plain = torch.get_rng_state()
    other, other_trainer = run(directory / "other", *callbacks, other_numbers, **kwargs)
    assert torch.equal(torch.get_rng_state(), after_plain)
    assert all(torch.equal(a, b) for a, b in zip(plain_numbers.drawn, other_numbers.drawn, strict=True))
    assert_same(plain.state_dict(), other.state_dict())
    assert_same(plain_trainer.optimizers[0].state_dict(), other_trainer.optimizers[0].state_dict())
    assert_same(plain.accuracy.metric_state, other.accuracy.metric_state)
    assert [m.training for m in plain.modules()] == [m.training for m in other.modules()]
    metrics = {k: v for k, v in other_trainer.callback_metrics.items() if not k.startswith(own_metrics)}
    assert_same(dict(plain_trainer.callback_metrics), metrics)
    assert len(metrics) < len(other_trainer.callback_metrics)


def rows_of(path: Path, epoch: int | None = None) -> list[dict[str, str]]:
    """The rows of one epoch in a csv file that grows; those of the last if not given."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    assert epochs == sorted(epochs)
    wanted = epochs[-1] if epoch is None else epoch
    return [row for row in rows if int(row["epoch"]) == wanted]
