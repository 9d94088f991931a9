"""Small modules, data and Trainers that the tests of the callbacks share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.region.regions import find_regions


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


def trainer(path: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    """A quiet Trainer on one CPU."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": path,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


def qat_trainer(path: Path, *callbacks: Callback, qat: dict[str, Any] | None = None, **kwargs: Any) -> Trainer:
    """The same with QuantizationAwareTraining and Calibration in front."""
    return trainer(path, QuantizationAwareTraining(**(qat or {})), Calibration(batches=4), *callbacks, **kwargs)


def quantized_checkpoint(path: Path, module: LightningModule | None = None, **kwargs: Any) -> Path:
    """The checkpoint of a short QAT run."""
    run = qat_trainer(path, **kwargs)
    run.fit(module or Classifier())
    run.save_checkpoint(path / "quantized.ckpt")
    return path / "quantized.ckpt"


def float_checkpoint(path: Path, module: LightningModule | None = None) -> Path:
    """The checkpoint of a short float run."""
    run = trainer(path)
    run.fit(module or Classifier())
    run.save_checkpoint(path / "float.ckpt")
    return path / "float.ckpt"


def only_region(module: nn.Module) -> Any:
    (region,) = find_regions(module).values()
    return region


def scales(module: nn.Module) -> dict[str, Tensor]:
    """Every scale of a module, copied."""
    return {
        f"{path}:{name}": point.scale.clone()
        for path, region in find_regions(module).items()
        for name, point in region.points.items()
    }


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a module's state, copied."""
    return {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same names and, bit for bit, the same values."""
    assert list(one) == list(other)
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, differing


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
