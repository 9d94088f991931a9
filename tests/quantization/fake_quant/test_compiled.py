"""Compiled to C++ by inductor, a point has the bits of eager mode: no product with the inverse, no fused arithmetic."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from tests.quantization.fake_quant.reference import assert_same_bits, formula

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler"
)


def around_ties(scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """A row for each scale: every tie, its two neighbours, and random values."""
    ties = (torch.arange(quant_min - 3, quant_max + 4) + 0.5) * scale.reshape(-1, 1)
    inf = torch.tensor(torch.inf)
    random = torch.randn(len(ties), 10_001) * scale.reshape(-1, 1) * quant_max
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -0.0, 1e-45]).repeat(len(ties), 1)
    return torch.cat([ties, torch.nextafter(ties, inf), torch.nextafter(ties, -inf), random, special], 1)


def run(point: Any, x: Tensor) -> list[Tensor]:
    """Output and gradient."""
    leaf = x.clone().requires_grad_()
    y = point(leaf)
    y.backward(torch.linspace(1, 2, x.numel()).reshape(x.shape))
    assert leaf.grad is not None
    return [y.detach(), leaf.grad]


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # by inductor itself
@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("options", [{}, {"axis": 0, "channels": 3, "scheme": "affine"}])
def test_output_and_gradient_are_the_same_bits_as_in_eager(dtype: str, learned: bool, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    point = FakeQuantize(dtype, observer="minmax", **options)
    point.observe(torch.randn(3, 50))
    point.compute_scale()
    point.learn_scale(learned)
    x = around_ties(point.scale.detach().expand(3), point.quant_min, point.quant_max)
    expected = run(point, x)
    for actual, eager in zip(run(torch.compile(point, fullgraph=True), x), expected, strict=True):
        assert_same_bits(actual.nan_to_num(7.0), eager.nan_to_num(7.0))
    finite = x[:, :-6]
    value, _ = formula(finite, point.scale, point.channel_zero_point, point.quant_min, point.quant_max, point.axis)
    assert_same_bits(expected[0][:, :-6].contiguous(), value)
