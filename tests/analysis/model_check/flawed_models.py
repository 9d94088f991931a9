"""Models that have one flaw each, for the model check."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.quantization.interception.dynamic_block import dynamic_block


def mlp(last: nn.Module | None = None) -> nn.Sequential:
    """Nothing to find: two linear layers."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers, *([last] if last is not None else []))


class VaryingCameras(nn.Module):
    """A loop over cameras that picks convolutions from a dict; which cameras there are varies from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.input_proj = nn.ModuleDict({name: nn.Conv2d(2, 4, 1, bias=False) for name in ("front", "left", "right")})
        self.level = nn.Parameter(torch.randn(4, 1, 1))
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, images: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(4, 3, 3)
        for name, image in images.items():
            projected = self.input_proj[name](image)
            total = total + torch.tanh(projected + self.level)
        return self.out(total)


class SineEmbedding(nn.Module):
    """As in the source: coordinates divided by a table, then sine."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * (2 * torch.pi))


class Decoder(nn.Module):
    """Calls a position embedding in a loop, with coordinates whose range grows."""

    def __init__(self, calls: int, growth: float, dynamic: bool = False) -> None:
        super().__init__()
        self.embedding = SineEmbedding()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls, self.growth, self.dynamic = calls, growth, dynamic

    def forward(self, x: Tensor) -> Tensor:
        total = torch.tanh(self.fc(x))
        reference = x
        for _ in range(self.calls):
            if self.dynamic:
                with dynamic_block(self, "layers"):
                    total = total + self.embedding(reference)
            else:
                total = total + self.embedding(reference)
            reference = reference * self.growth
        return self.out(total)


class TwoReaders(nn.Module):
    """A convolution whose result two ops read, so that it cannot be fused with the add."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.out = nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.out(F.relu(y) * torch.sigmoid(y))


class SharedActivation(nn.Module):
    """One activation registered at two places."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.Tanh()
        self.first, self.second = nn.Sequential(nn.Linear(4, 4), act), nn.Sequential(nn.Linear(4, 4), act)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x)))


class Unused(nn.Module):
    """A layer that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class _Recomputed(torch.autograd.Function):
    """Keeps no activations, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        return module(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Deviation(nn.Module):
    """Takes the standard deviation of every row."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sqrt(x.var(dim=1, keepdim=True) + 1e-5))  # type: ignore[no-any-return]


class Hidden(nn.Module):
    """Calls a layer inside a custom autograd.Function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_Recomputed.apply(self.first(x), self.inner))  # type: ignore[no-any-return, no-untyped-call]


class Floor(nn.Module):
    """Has no op that is quantized."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.floor(x)


class FloatOp(nn.Module):
    """An op without a quantized form between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.special.i1e(self.a(x)))


class Divided(nn.Module):
    """Divides by an input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, divisor: Tensor) -> Tensor:
        return self.linear(x / divisor)


class InverseSigmoid(nn.Module):
    """Takes the logit of a place as Deformable-DETR does: with divisors of at least 1e-5."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        with torch.no_grad():
            self.first.weight.mul_(40)

    def forward(self, x: Tensor) -> Tensor:
        place = self.first(x).sigmoid().clamp(min=0, max=1)
        return self.last(torch.log(place.clamp(min=1e-5) / (1 - place).clamp(min=1e-5)))


class HardDropout(nn.Module):
    """Functional dropout that nobody can switch off."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.25, training=True))


class Tied(nn.Module):
    """One parameter, read by an embedding and by the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.norm(self.embedding(tokens)), self.embedding.weight)


class Branch(nn.Module):
    """An op that only some batches run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if x.sum() > 0:
            y = torch.tanh(y)
        return self.b(y)


def scaled_channel(factor: float, bias: bool = True) -> nn.Sequential:
    """The first layer's first channel is much larger, or zero."""
    model = mlp()
    with torch.no_grad():
        model[0].weight.fill_(0.1)
        model[0].weight[0] *= factor
    return model


class BoxLoop(nn.Module):
    """Post-processing inside forward: a loop over boxes, or the same with a static number of rounds."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.rounds = rounds
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        boxes = self.head(x)
        return torch.stack([torch.tanh(boxes[i] * 2.0) for i in range(self.rounds)])


class FusedAttention(nn.Module):
    """Attention in one call, whose scores and softmax have no quantizers; written out, it has the same weights."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.qkv = nn.Linear(4, 12)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.fused:
            return self.fc(F.scaled_dot_product_attention(q, k, v))  # type: ignore[no-any-return]
        return self.fc(torch.softmax(q @ k.transpose(-2, -1) * 0.5, dim=-1) @ v)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Recurrent layers, whose gates have no quantizers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)
        self.gru = nn.GRU(4, 4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(self.lstm(x)[0])[0])  # type: ignore[no-any-return]
