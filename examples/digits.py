"""Scanned handwritten digits with a small ResNet: the project's runnable example.

The data are the 1,797 real 8x8 scans that ship with scikit-learn: nothing is downloaded. Everything else is an
ordinary LightningCLI project; quantization-aware training comes from the YAML file alone::

    python examples/digits.py fit --config configs/digits_float.yaml
    python examples/digits.py test --config configs/digits_int16.yaml
    python examples/digits.py fit --config configs/digits_int8.yaml
    python examples/digits.py test --config configs/digits_int8.yaml --ckpt_path logs/digits/int8/int8.ckpt
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_qat  # also makes the callbacks' short names known to the YAML files

Batch = tuple[Tensor, Tensor]


class DigitsDataModule(LightningDataModule):
    """Digits in a fixed split: 1,077 images to train, 270 to validate, 450 to test.

    Args:
        batch_size: Images per batch, in every stage.
        augment: Rotate, scale and shift the training images at random.
        split_seed: Decides which image belongs to which part; independent of the training seed.
        num_workers: Processes that load data; the data are in memory, so 0 is fastest.
    """

    def __init__(self, batch_size: int = 64, augment: bool = True, split_seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.augment = augment
        self.split_seed = split_seed
        self.num_workers = num_workers

    def setup(self, stage: str | None = None) -> None:
        digits = load_digits()
        order = np.random.default_rng(self.split_seed).permutation(len(digits.target))
        train, val, test = np.split(order, [1077, 1347])
        mean, std = digits.images[train].mean(), digits.images[train].std()
        images = torch.from_numpy((digits.images - mean) / std).float().unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        self.train_set, self.val_set, self.test_set = (
            TensorDataset(images[part], labels[part]) for part in (train, val, test)
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val_set, self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test_set, self.batch_size, num_workers=self.num_workers)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images, labels = batch
        if self.augment and self.trainer is not None and self.trainer.training:
            images = random_affine(images)
        return images, labels


def random_affine(images: Tensor, degrees: float = 10.0, zoom: float = 0.1, shift: float = 0.1) -> Tensor:
    """Rotate, zoom and shift every image of a batch ``(N, C, H, W)`` by its own uniformly drawn amounts.

    Args:
        images: The batch.
        degrees: Largest rotation, either way.
        zoom: Largest relative change of size, either way.
        shift: Largest shift, either way, as a share of the image.
    """

    def draw(largest: float) -> Tensor:
        return torch.empty(len(images), device=images.device).uniform_(-largest, largest)

    angle, size = torch.deg2rad(draw(degrees)), 1 + draw(zoom)
    cos, sin = size * angle.cos(), size * angle.sin()
    theta = torch.stack([cos, -sin, 2 * draw(shift), sin, cos, 2 * draw(shift)], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, added and rectified by functions as most code in the field does."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class DigitsClassifier(LightningModule):
    """A ResNet with three stages of ``width``, ``2 * width`` and ``4 * width`` channels.

    Args:
        width: Channels of the first stage.
        blocks: Residual blocks per stage.
        lr: Learning rate at the start; a cosine takes it to zero at the last step.
        weight_decay: Of AdamW.
        scale_lr_factor: Learning rate of learned scales, relative to ``lr``.
    """

    def __init__(
        self,
        width: int = 16,
        blocks: int = 1,
        lr: float = 4e-3,
        weight_decay: float = 0.05,
        scale_lr_factor: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.scale_lr_factor = lr, weight_decay, scale_lr_factor
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layers = nn.Sequential()
        channels = width
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                self.layers.append(BasicBlock(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.head = nn.Linear(channels, 10)
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, 10)`` of normalised images ``(N, 1, 8, 8)``."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layers(x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # the same as self.parameters(), but for learned scales: those have their own group, without weight decay
        groups = lightning_qat.parameter_groups(self, self.lr, self.scale_lr_factor)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    torch.set_num_threads(1)  # the model is too small to gain from more
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 on torch 2.13, at every data loader
    LightningCLI(
        DigitsClassifier, DigitsDataModule, seed_everything_default=0, save_config_kwargs={"overwrite": True}
    )  # without a logger, config.yaml has one place for all runs


if __name__ == "__main__":
    main()
