"""The models of ``gpu.py``: a ResNet-50 and a ViT-S, and tiny ones with the same ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.models import EncoderBlock


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a functional residual add."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class BottleneckNet(nn.Module):
    """ResNet-50 with ``width=64`` and ``depths=(3, 4, 6, 3)``."""

    def __init__(self, width: int, depths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage, depth in enumerate(depths):
            for block in range(depth):
                blocks.append(Bottleneck(inputs, width * 2**stage, 2 if stage and not block else 1))
                inputs = 4 * width * 2**stage
        self.layers = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 3, 2, 1)
        logits: Tensor = self.head(F.adaptive_avg_pool2d(self.layers(x), 1).flatten(1))
        return logits


class PatchNet(nn.Module):
    """ViT-S/16 with ``width=384``, 12 blocks and 6 heads; the mean of the tokens is classified."""

    def __init__(self, width: int, depth: int, heads: int, patch: int, image: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (image // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(dim=1))
        return logits


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        batch: images per step.
        image: pixels per side.
        classes: what is told apart.
        steps: timed steps.
    """

    batch: int
    image: int
    classes: int
    steps: int


SIZES = {"full": Size(64, 224, 1000, 20), "tiny": Size(4, 32, 10, 2)}


def models(size: str) -> dict[str, nn.Module]:
    """Return the models of a size, on the CPU."""
    if size == "full":
        return {
            "ResNet-50": BottleneckNet(64, (3, 4, 6, 3), SIZES[size].classes),
            "ViT-S": PatchNet(384, 12, 6, 16, SIZES[size].image, SIZES[size].classes),
        }
    return {
        "ResNet-50": BottleneckNet(8, (1, 1), SIZES[size].classes),
        "ViT-S": PatchNet(16, 1, 2, 8, SIZES[size].image, SIZES[size].classes),
    }
