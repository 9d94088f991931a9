"""A zoo of small models, each with something in it that quantizers stumble over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.quantization.interception.dynamic_block import dynamic_block
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region


class Wired(nn.Module):
    """Layers, put together by a function of the test: ``Wired(lambda m, x: m.relu(m.conv(x)), conv=..., relu=...)``."""

    def __init__(self, function: Callable[[Any, Any], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class BasicBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int, inplace: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=inplace)  # used twice
        self.inplace = inplace
        self.down = None
        if stride > 1 or channels != out_channels:
            self.down = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.down is None else self.down(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.inplace:
            x += identity
        else:
            x = x + identity
        return self.relu(x)


class ResNet(nn.Module):
    """Functional or in-place residual additions, a reused activation."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.layers = nn.Sequential(BasicBlock(8, 8, 1, inplace), BasicBlock(8, 16, 2, inplace))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        return self.fc(self.layers(x).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class Encoder(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Functional attention, class token, learned position embedding."""

    def __init__(self, depth: int = 2, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.1)
        self.blocks = nn.ModuleList([Encoder(width, 2) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Transformer(nn.Module):
    """torch's own encoder, which has a fused fast path in eval mode, with padding and causal masks."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None, causal: bool = False) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if causal else None
        if padding is not None and mask is not None:
            padding = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, float("-inf"))
        return self.head(self.encoder(x, mask, src_key_padding_mask=padding, is_causal=causal))


class MultiheadAttention(nn.Module):
    def __init__(self, batch_first: bool = True, need_weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first, dropout=0.1)
        self.need_weights = need_weights

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor | None = None) -> Any:
        out, weights = self.attention(x, memory, memory, key_padding_mask=padding, need_weights=self.need_weights)
        return (out, weights) if self.need_weights else out


class UNet(nn.Module):
    """Skip connections by cat, interpolation in two modes, in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 4, 3, 1, 1)
        self.down2 = nn.Conv2d(4, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.fuse = nn.Conv2d(20, 4, 3, 1, 1)
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.act(self.down1(x))
        b = self.act(self.down2(F.max_pool2d(a, 1)))
        smooth = F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=False)
        sharp = F.interpolate(self.up(b), size=a.shape[-2:], mode="nearest")
        return {"map": self.out(self.act(self.fuse(torch.cat([a, smooth, sharp], 1)))), "features": b}


class Branching(nn.Module):
    """A branch that depends on the data and adds an op, and a loop whose length depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.step = nn.Linear(8, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        y = self.first(x)
        if x.sum() > 0:
            y = y + 1.0
        y = y + y.mean(0)
        for _ in range(steps if steps is not None else 2):
            y = torch.tanh(self.step(y))
        return self.last(y)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        return self.fc(states[:, -1])


class Shared(nn.Module):
    """A block, an activation and a weight that are used twice, and a helper called from two places."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.act = nn.GELU()
        self.embed = nn.Linear(6, 6, bias=False)

    @staticmethod
    def scaled(x: Tensor, factor: float) -> Tensor:
        return x * factor

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.block(x))
        y = self.scaled(y, 4.0)
        y = self.act(self.block(y))
        y = self.scaled(self.embed(y), 0.25)
        return F.linear(y, self.embed.weight)


class Cameras(nn.Module):
    """A loop over cameras that picks modules from a dict; a functional add follows each (A2)."""

    def __init__(self, annotated: bool = False, names: tuple[str, ...] = ("front", "left", "right")) -> None:
        super().__init__()
        self.input_proj = nn.ModuleDict({name: nn.Conv2d(2, 4, 1) for name in names})
        self.level = nn.Parameter(torch.randn(4, 1, 1))
        self.out = nn.Conv2d(4, 2, 1)
        self.annotated = annotated

    def one(self, name: str, x: Tensor) -> Tensor:
        return self.input_proj[name](x) + self.level

    def forward(self, images: dict[str, Tensor]) -> Tensor:
        features = []
        for name, image in images.items():
            if self.annotated:
                with dynamic_block(self, "cameras"):
                    features.append(self.one(name, image))
            else:
                features.append(self.one(name, image))
        return self.out(torch.stack(features).sum(0))


@dataclass(frozen=True)
class Example:
    """A model of the zoo and the arguments of a forward."""

    build: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def make(self, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...]]:
        """Build both, with weights and statistics that are not the ones of initialisation."""
        torch.manual_seed(seed)
        module, args = self.build(), self.args()
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight), nn.init.normal_(m.bias)
                m.running_mean.normal_(), m.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
        return module, args


def _padding() -> Tensor:
    return torch.tensor([[False] * 5, [False, False, False, True, True]])


ZOO: dict[str, Example] = {
    "resnet": Example(ResNet, lambda: (torch.randn(4, 1, 8, 8),)),
    "resnet_inplace": Example(lambda: ResNet(inplace=True), lambda: (torch.randn(4, 1, 8, 8),)),
    "vit": Example(ViT, lambda: (torch.randn(2, 3, 16, 16),)),
    "transformer": Example(Transformer, lambda: (torch.randn(2, 5, 16),)),
    "transformer_padding": Example(Transformer, lambda: (torch.randn(2, 5, 16), _padding())),
    "transformer_causal": Example(Transformer, lambda: (torch.randn(2, 5, 16), _padding(), True)),
    "attention": Example(MultiheadAttention, lambda: (torch.randn(2, 5, 16), torch.randn(2, 5, 16), _padding())),
    "attention_weights": Example(
        lambda: MultiheadAttention(need_weights=True),
        lambda: (torch.randn(2, 3, 16), torch.randn(2, 5, 16), _padding()),
    ),
    "attention_seq_first": Example(
        lambda: MultiheadAttention(batch_first=False), lambda: (torch.randn(3, 2, 16), torch.randn(5, 2, 16))
    ),
    "unet": Example(UNet, lambda: (torch.randn(2, 3, 8, 8),)),
    "branching": Example(Branching, lambda: (torch.rand(3, 4),)),
    "recurrent": Example(Recurrent, lambda: (torch.randn(2, 4, 6),)),
    "shared": Example(Shared, lambda: (torch.randn(5, 6),)),
    "cameras": Example(Cameras, lambda: ({n: torch.randn(2, 2, 3, 3) for n in ("front", "left", "right")},)),
    "cameras_annotated": Example(
        lambda: Cameras(annotated=True), lambda: ({n: torch.randn(2, 2, 3, 3) for n in ("front", "left", "right")},)
    ),
}


MINMAX = {"activation": {"observer": "minmax"}}  # cheaper than the default


def calibrated(module: nn.Module, *args: Any, state: str = "quantize", **options: Any) -> Region:
    """Insert fake-quant, calibrate on the example itself and quantize. ``options`` are those of ``insert``."""
    region = insert(module, args, **{"qconfig": MINMAX, **options})
    calibrate(region, [Call(args)])
    region.set_state(state)  # type: ignore[arg-type]
    return region
