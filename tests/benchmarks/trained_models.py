"""Trained models for the sensitivity benchmark: digits ResNet, digits ViT, EfficientNet-Lite0 with ImageNet weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.models import EncoderBlock


@dataclass(frozen=True)
class Trained:
    """A trained model with data.

    Attributes:
        model: in evaluation mode.
        calibration: a batch to calibrate on.
        inputs: a batch to measure the sensitivity on.
        accuracy: on validation data; None where there are no labels.
    """

    model: nn.Module
    calibration: Tensor
    inputs: Tensor
    accuracy: float | None


class DigitsViT(nn.Module):
    """A ViT for 8 x 8 digits: 16 patches of 2 x 2; the mean of the tokens is classified."""

    def __init__(self, width: int = 48, blocks: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def digits_resnet() -> Trained:
    """The ResNet of ``examples/digits.py``, trained as in ``configs/digits_float.yaml``."""
    from examples.digits import DigitsClassifier
    from tests.conftest import train_digits_float

    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "digits.ckpt"
        train_digits_float(checkpoint)
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
    model = DigitsClassifier()
    model.load_state_dict(state)
    return _on_digits(model)


def digits_vit(steps: int = 900, **size: int) -> Trained:
    """A small ViT, trained on the digits: AdamW, one cycle, batches of 64."""
    images, labels = _digits("train_set")
    torch.manual_seed(0)
    model = DigitsViT(**size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (64,))
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return _on_digits(model)


def efficientnet_lite0(side: int = 160) -> Trained:
    """ImageNet weights, on photographs of scikit-image: the middle of each, and its upper left."""
    from skimage import data

    from tests.zoo.models import efficientnet_lite0

    names = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry", "retina")
    pictures = [getattr(data, name)() for name in names] + [data.stereo_motorcycle()[0]]
    crops = []
    for picture in pictures:
        image = torch.from_numpy(picture.copy()).permute(2, 0, 1).float()[None] / 255
        short = min(image.shape[-2:])
        top, left = ((length - short) // 2 for length in image.shape[-2:])
        for crop in (
            image[..., top : top + short, left : left + short],
            image[..., : short * 2 // 3, : short * 2 // 3],
        ):
            crops.append(F.interpolate(crop, (side, side), mode="bilinear", antialias=True, align_corners=False))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (torch.cat(crops) - mean[:, None, None]) / deviation[:, None, None]
    return Trained(efficientnet_lite0().eval(), x, x, None)


TRAINED: dict[str, Callable[[], Trained]] = {
    "digits ResNet": digits_resnet,
    "digits ViT": digits_vit,
    "EfficientNet-Lite0": efficientnet_lite0,
}


def _on_digits(model: nn.Module) -> Trained:
    model.eval()
    images, labels = _digits("val_set")
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == labels).float().mean())
    return Trained(model, _digits("train_set")[0][:256], images[:64], accuracy)


def _digits(part: str) -> tuple[Tensor, Tensor]:
    from examples.digits import DigitsDataModule

    data = DigitsDataModule()
    data.setup()
    images, labels = getattr(data, part).tensors
    return images, labels
