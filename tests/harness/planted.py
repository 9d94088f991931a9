"""Small models that are trained well in float, each with one thing planted that int8 calibration destroys."""

from __future__ import annotations

import functools
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.harness.small_digits import digits


class Planted(LightningModule):
    """A model of some inputs and labels; its float weights are trained once per class and process."""

    def __init__(self, lr: float = 1e-4) -> None:
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.build()

    def build(self) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def samples(cls) -> tuple[Tensor, Tensor]:
        """All inputs and labels."""
        raise NotImplementedError

    @classmethod
    def plant(cls, module: Planted) -> None:
        """Plant what calibration destroys, and nothing that the float model notices."""

    @classmethod
    def pretrained(cls, **kwargs: Any) -> Any:
        """The float model, about to be quantized."""
        module = cls(**kwargs)
        module.load_state_dict(_weights(cls))
        with torch.no_grad():
            cls.plant(module)
        return module

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(*batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        x, y = self.samples()
        return DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=100, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        x, y = self.samples()
        return DataLoader(TensorDataset(x[1200:], y[1200:]), batch_size=50)


@functools.cache
def _weights(cls: type[Planted]) -> dict[str, Tensor]:
    model = cls()
    x, y = cls.samples()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(300):
        optimizer.zero_grad()
        model.loss(x[:1200], y[:1200]).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class SinePlaces(Planted):
    """Sine features of a place, divided by 1 ... 8660: int8 turns the small divisors into zero."""

    divisor: Tensor

    def build(self) -> None:
        self.register_buffer("divisor", 10000.0 ** (2 * torch.arange(64).div(2, rounding_mode="floor") / 64))
        self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        angles = x / self.divisor
        features = torch.where(torch.arange(64) % 2 == 0, angles.sin(), angles.cos())
        logits: Tensor = self.head(F.relu(self.hidden(features)))
        return logits

    @classmethod
    def samples(cls) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = 12 * torch.rand(1600, 1, generator=generator)
        return x, x[:, 0].div(3, rounding_mode="floor").long()


class SmallDivisor(Planted):
    """Inputs of very different units are divided by their deviations, which span four decades."""

    deviation: Tensor

    def build(self) -> None:
        self.register_buffer("deviation", torch.logspace(-2, 2, 64))
        self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.hidden(x / self.deviation)))
        return logits

    @classmethod
    def samples(cls) -> tuple[Tensor, Tensor]:
        images, labels = digits()
        return images[:1600].flatten(1) / 16 * torch.logspace(-2, 2, 64), labels[:1600]


class DominatingChannel(Planted):
    """One channel of a weight with one scale is far larger than the others; the relu behind it is never open."""

    def build(self) -> None:
        self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.hidden(x.flatten(1))))
        return logits

    @classmethod
    def plant(cls, module: Planted) -> None:
        assert isinstance(module, DominatingChannel)
        module.hidden.weight[0], module.hidden.bias[0] = torch.linspace(-150, 150, 64), -1e5

    @classmethod
    def samples(cls) -> tuple[Tensor, Tensor]:
        images, labels = digits()
        return images[:1600] / 16, labels[:1600]


class Sentinel(Planted):
    """Inputs of 0 to 1, and -99 for what is missing: one task counts what is missing, the other adds the values."""

    def build(self) -> None:
        self.count, self.total = nn.Linear(6, 7), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        there = (x > -50).float()
        return torch.cat([self.count(there), self.total(x * there)], 1)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        found = self(x)
        return F.cross_entropy(found[:, :7], y[:, 0].long()) + F.l1_loss(found[:, 7], y[:, 1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        found, y = self(batch[0]), batch[1]
        self.log("val_acc", (found[:, :7].argmax(1) == y[:, 0]).float().mean())
        self.log("val_mae", (found[:, 7] - y[:, 1]).abs().mean())

    @classmethod
    def samples(cls) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        values = torch.rand(1600, 6, generator=generator)
        missing = torch.rand(1600, 6, generator=generator) < 0.3
        total = 4 * values.masked_fill(missing, 0.0).sum(1) + 0.5 * torch.randn(1600, generator=generator)
        return values.masked_fill(missing, -99.0), torch.stack([missing.sum(1).float(), total], 1)
