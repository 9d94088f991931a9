"""What bounds the values of a point: found for every graph, in time linear in its ops.

Siblings: a chain far longer than Python's recursion limit, values that meet themselves again and again, a loop whose
rounds share their quantizers (its ops come before themselves), and bounds that no op limits.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.analysis.comparison.comparison import compare
from lightning_qat.analysis.comparison.tensor_makers import TensorMakers
from lightning_qat.quantization.interception.dynamic_block import dynamic_block
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.quantization.models import Wired

WIDTH = 4


def region_of(function: Callable[[nn.Module, Tensor], Tensor]) -> Region:
    torch.manual_seed(0)
    return insert(Wired(function, first=nn.Linear(WIDTH, WIDTH)), (torch.randn(8, WIDTH),))


def long_chain(module: nn.Module, x: Tensor) -> Tensor:
    x = module.first(x).sigmoid()
    for _ in range(1200):
        x = x.relu()
    return x


def meets_itself(module: nn.Module, x: Tensor) -> Tensor:
    x = module.first(x).sigmoid()
    for _ in range(60):  # 2**60 paths lead back to the sigmoid
        x = x * x.neg()
    return x


def own_rounds(module: nn.Module, x: Tensor) -> Tensor:
    x = module.first(x).sigmoid()
    for _ in range(3):
        with dynamic_block(module, "rounds"):
            x = x.relu().mul(x)
    return x


def unlimited(module: nn.Module, x: Tensor) -> Tensor:
    return module.first(x).sigmoid() + module.first(x)


def joined(module: nn.Module, x: Tensor) -> Tensor:
    left, right = module.first(x).sigmoid(), module.first(x).tanh()
    return torch.cat([left, right], 0).neg()


@pytest.mark.parametrize(
    ("function", "expected"), [(long_chain, 1.0), (meets_itself, 1.0), (joined, 1.0), (unlimited, None)]
)
def test_bound_is_found_whatever_the_length_and_the_number_of_paths(
    function: Callable[[nn.Module, Tensor], Tensor], expected: float | None
) -> None:
    assert TensorMakers(region_of(function)).output_bound == expected


@pytest.mark.parametrize("function", [long_chain, own_rounds, meets_itself])
def test_comparison_ends_on_graphs_that_are_long_or_come_back_to_themselves(
    function: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    region = region_of(function)
    x = torch.randn(8, WIDTH)
    calibrate(region, [x])
    assert "first" in {row.mod_name for row in compare(region, [x]).rows}
