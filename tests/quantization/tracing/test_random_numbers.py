"""Random numbers that the deployed model draws are data, like an input; those that only training draws are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "randn": lambda x: torch.randn(x.shape[0], 4),
    "randn_like": torch.randn_like,
    "rand": lambda x: torch.rand(x.shape[0], 4),
    "normal": lambda x: torch.normal(0.0, 1.0, (x.shape[0], 4)),
    "normal_": lambda x: torch.empty(x.shape[0], 4).normal_(),
    "uniform_": lambda x: x.new_empty(x.shape[0], 4).uniform_(-1, 1),
    "bernoulli": lambda x: torch.bernoulli(torch.full((x.shape[0], 4), 0.5)),
}


class Generator(nn.Module):
    """Makes samples from noise that it draws itself, or from what it is given."""

    def __init__(self, draw: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.first, self.last, self.draw = nn.Linear(4, 8), nn.Linear(8, 2), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x if self.draw is None else self.draw(x))))  # type: ignore[no-any-return]


def points(region: Region) -> list[tuple[str, str, int | None]]:
    return [(p.name, p.role, p.axis) for p in region.plan.points]


@pytest.mark.parametrize("name", DRAWS)
def test_noise_that_a_model_draws_is_quantized_like_an_input(name: str) -> None:
    """A generator's layers got no quantizers at all, as the region's input does not reach them."""
    x = torch.ones(3, 4)
    region = insert(Generator(DRAWS[name]).eval(), (x,))
    assert points(region) == points(insert(Generator(None).eval(), (x,)))
    calibrate(region, [x, x])
    assert all(point.scale_source is not None for point in region.points.values())


class Latent(nn.Module):
    """Samples a latent variable: the mean, and noise times the deviation, as a variational autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return self.decoder(mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance))  # type: ignore[no-any-return]


def test_noise_of_a_latent_variable_is_an_operand_with_a_scale() -> None:
    region = insert(Latent().eval(), (torch.ones(3, 4),))
    assert ("mul_1.input0", "input", None) in points(region)
    assert ("decoder.weight", "weight", 0) in points(region)


class Aligned(nn.Module):
    """Repeats frames by durations that it draws: a matrix of zeros and ones whose size varies, as in VITS."""

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.ceil(4 * torch.rand(x.shape[1])).cumsum(0)
        path = (torch.arange(int(ends[-1]))[:, None] < ends).float()
        return path @ x[0]


def test_a_matrix_of_varying_size_made_from_noise_is_no_weight() -> None:
    """It had a scale for every row, and calibration failed as soon as there were more rows or fewer."""
    torch.manual_seed(0)
    x = torch.ones(1, 5, 3)
    region = insert(Aligned().eval(), (x,))
    assert [axis for name, _, axis in points(region) if name.startswith("matmul_0")] == [None, None]
    calibrate(region, [x] * 4)


class NoisyWeight(nn.Module):
    """Adds noise to its weight in training."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 0.1 * torch.randn_like(self.weight) if self.training else self.weight
        return nn.functional.linear(x, weight)


def test_a_weight_with_noise_in_training_is_a_weight() -> None:
    region = insert(NoisyWeight(), (torch.ones(3, 4),))
    assert ("linear_0.weight", "weight", 0) in points(region)


def test_random_integers_are_exact() -> None:
    """What is picked by random indices needs no scale of its own; nor do the indices."""

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Parameter(torch.ones(5, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x + self.table[torch.randperm(5)[: x.shape[0]]])  # type: ignore[no-any-return]

    region = insert(Shuffled().eval(), (torch.ones(3, 4),))
    assert region.graph.by_name["randperm_0"].data_dependent is False
