"""A sketch of a part of the samples, and what is remembered about samples from one sketch to the next (B2)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.analysis.region_memory import RegionMemory
from lightning_qat.analysis.sensitivity.sample_axes import fewer_samples
from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.region.region import Region
from tests.analysis.sensitivity.test_sensitivity_sketch import Net, region_of


class Counted(Net):
    """Notes the number of samples of every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.sizes.append(len(x))
        return super().forward(x)


class Mixed(Net):
    """Takes the mean over the batch off: samples act on each other."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(x - x.mean(0))


class FixedSize(nn.Module):
    """Knows no other batch size than eight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.view(8, 4))


def estimate(region: Region, x: Tensor, **kwargs: object) -> SensitivityResult:
    return sensitivity(region, [x], method="sketch", probes=2, confirm=0, **kwargs)  # type: ignore[arg-type]


def scores(result: SensitivityResult) -> list[tuple[str, float, float | None]]:
    return [(row.point, row.score, row.standard_error) for row in result.rows]


def test_part_of_the_samples_is_the_sketch_of_these_samples() -> None:
    """B2: max_samples, against a batch that has no others."""
    torch.manual_seed(0)
    x = torch.randn(8, 2, 6, 6)
    region = region_of(Net(), x)
    part, whole = estimate(region, x, max_samples=4), estimate(region, x)
    assert scores(part) == scores(estimate(region, x[:4]))
    assert scores(part) != scores(whole)
    assert scores(estimate(region, x, max_samples=8)) == scores(whole)
    exact = {row.point: row.score for row in sensitivity(region, [x[:4]], method="isolation").rows}
    many = sensitivity(region, [x], method="sketch", probes=64, confirm=0, max_samples=4)
    assert {row.point: row.score for row in many.rows} == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize(("model", "shape"), [(Mixed, (8, 2, 6, 6)), (FixedSize, (8, 4))])
def test_samples_that_cannot_be_left_out_are_all_used(model: type[nn.Module], shape: tuple[int, ...]) -> None:
    """B2: one sample says nothing about the others, or the model refuses fewer."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    region = region_of(model(), x)
    memory = RegionMemory()
    expected = scores(estimate(region, x))
    for _ in range(2):  # found out, remembered
        assert scores(estimate(region, x, max_samples=4, memory=memory)) == expected


def test_samples_are_searched_once_while_plan_and_shapes_stay() -> None:
    """Per-epoch cost: the forward with two samples is not repeated, and nothing changes without it."""
    torch.manual_seed(0)
    model, x = Counted(), torch.randn(8, 2, 6, 6)
    region = region_of(model, x)
    memory = RegionMemory()

    def sizes(batch: Tensor, **kwargs: object) -> list[int]:
        model.sizes.clear()
        result = estimate(region, batch, memory=memory, **kwargs)
        sizes = list(model.sizes)
        assert scores(result) == scores(estimate(region, batch, **kwargs))
        return sizes

    assert sizes(x) == [8, 2]
    with torch.no_grad():  # an epoch of training
        model.conv.weight.mul_(0.7)
    assert sizes(x) == [8]
    assert sizes(x[:6]) == [6, 2]
    assert sizes(x, max_samples=4) == [4, 2]
    assert sizes(x, max_samples=4) == [4]
    region.set_plan(region.graph, region.plan.from_dict(region.plan.to_dict()))
    with region.state("observe"):
        model(x)
    region.compute_scales()
    assert sizes(x) == [8, 2]


def test_mixed_samples_are_remembered_as_mixed() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 2, 6, 6)
    region, memory = region_of(Mixed(), x), RegionMemory()
    first = scores(estimate(region, x, memory=memory))
    assert scores(estimate(region, x, memory=memory)) == first
    assert {error for *_, error in first} != {None}  # two probes


def test_memory_of_shapes_is_bounded() -> None:
    memory, searches = RegionMemory(), []
    for length in [*range(100), 99, 0]:
        memory.find("plan", length, lambda length=length: searches.append(length))  # type: ignore[misc]
    assert searches == [*range(100), 0]  # the last ones are known, the first was forgotten


def test_number_of_samples_that_are_left() -> None:
    found = [fewer_samples(Call.of(torch.zeros(8, 3)), n) for n in (2, 5, 8, 20)]
    assert [f and (len(f[0].args[0]), f[1], f[2]) for f in found] == [(2, 8, 2), (5, 8, 5), (7, 8, 7), (7, 8, 7)]


def test_a_single_sample_is_refused() -> None:
    """Bad input."""
    x = torch.randn(8, 2, 6, 6)
    with pytest.raises(ConfigurationError, match="max_samples must be at least 2"):
        estimate(region_of(Net(), x), x, max_samples=1)
