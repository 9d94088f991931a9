"""The models that are measured: the three of the comparison, and a chain of any number of ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = (32, 3, 32, 32)
CLASSES = 10


class BasicBlock(nn.Module):
    """Two convolutions and a functional residual add."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Widths 16 to 128, two blocks each: 2-2-2-2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(BATCH[1], 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks, inputs = [], 16
        for width, stride in ((16, 1), (32, 2), (64, 2), (128, 2)):
            blocks += [BasicBlock(inputs, width, stride), BasicBlock(width, width, 1)]
            inputs = width
        self.layers = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Attention(nn.Module):
    """Self-attention spelled out in functions: two matrix products, a scale and a softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * self.scale, dim=-1)
        return self.proj(torch.matmul(weights, v).transpose(1, 2).reshape(batch, tokens, width))


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP, each with a residual add."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """64 patches of 4 x 4, width 192, 6 blocks with 3 heads; the mean of the tokens is classified."""

    def __init__(self) -> None:
        super().__init__()
        width = 192
        self.patches = nn.Conv2d(BATCH[1], width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, (BATCH[2] // 4) * (BATCH[3] // 4), width) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(width, 3) for _ in range(6)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, squeeze and excite, project; an add where the shape stays."""

    def __init__(self, inputs: int, expanded: int, outputs: int, stride: int, excites: bool) -> None:
        super().__init__()
        self.expand = _conv_norm(inputs, expanded, 1)
        self.depthwise = _conv_norm(expanded, expanded, 3, stride, expanded)
        self.squeeze = nn.Conv2d(expanded, expanded // 4, 1) if excites else None
        self.excite = nn.Conv2d(expanded // 4, expanded, 1) if excites else None
        self.project = _conv_norm(expanded, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.depthwise(F.hardswish(self.expand(x))))
        if self.squeeze is not None and self.excite is not None:
            weights = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))
            y = y * F.hardsigmoid(weights)
        y = self.project(y)
        return x + y if self.adds else y


class MobileNet(nn.Module):
    """After MobileNetV3: many ops on small tensors, where Python's overhead counts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm(BATCH[1], 16, 3, 2)
        self.blocks = nn.Sequential(
            InvertedResidual(16, 16, 16, 2, True),
            InvertedResidual(16, 72, 24, 2, False),
            InvertedResidual(24, 88, 24, 1, False),
            InvertedResidual(24, 96, 40, 2, True),
            InvertedResidual(40, 120, 40, 1, True),
        )
        self.last = _conv_norm(40, 240, 1)
        self.head = nn.Linear(240, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.last(self.blocks(F.hardswish(self.stem(x)))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Chain(nn.Module):
    """A chain of tiny ops, four per block: what it costs to handle an op, not to compute it."""

    OPS_PER_BLOCK = 4
    WIDTH = 8

    def __init__(self, ops: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(self.WIDTH, self.WIDTH) for _ in range(ops // self.OPS_PER_BLOCK))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = x + torch.sigmoid(linear(x)) * 0.5
        return x
