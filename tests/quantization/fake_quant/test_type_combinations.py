"""Every type with every scheme, granularity and kind of scale works through insert, calibrate and a training step."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.quantization.numerics.dtypes import QuantizedDtypeName, quant_dtype
from lightning_qat.quantization.region.parameter_groups import parameter_groups
from tests.quantization.fake_quant.reference import assert_same_bits, assert_torchs_but_for_ties, formula
from tests.quantization.models import calibrated

KINDS = list(itertools.product(["symmetric", "affine"], ["per_tensor", "per_channel"], [False, True]))
ALL_TYPES = [(dtype, *KINDS[i * 3 % 8]) for i, dtype in enumerate(get_args(QuantizedDtypeName))]
COMBINATIONS = sorted({*ALL_TYPES, *((dtype, *kind) for dtype in ("int2", "int4", "uint8", "int16") for kind in KINDS)})
"""Every type in one way, and four of them in every way."""


class ConvLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn(self.conv(x)))
        return torch.tanh(self.head(x.mean((2, 3))))


def torchs(x: Tensor, point: Any) -> Tensor:
    """Torch's own operators."""
    limits = (point.quant_min, point.quant_max)
    scale, zero_point = point.scale.detach(), point.zero_point
    if point.axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *limits)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, point.axis, *limits)


@pytest.mark.parametrize(("dtype", "scheme", "granularity", "learned"), COMBINATIONS)
def test_any_combination_quantizes_as_torch_does_but_for_ties_and_trains(
    dtype: str, scheme: str, granularity: str, learned: bool
) -> None:
    """2 to 16 bits, signed and unsigned, per tensor (with batch norm folded) and per channel, learned or not."""
    torch.manual_seed(0)
    module, x = ConvLinear(), torch.randn(8, 2, 6, 6)
    weights = {"dtype": dtype, "granularity": granularity, "observer": "minmax"}  # of 2 bits it would be mse
    region = calibrated(
        module, x, qconfig={"activation": {"dtype": dtype, "scheme": scheme, "observer": "minmax"}, "weight": weights}
    )
    region.learn_scales(("weight", "activation") if learned else ())
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with region.tap(lambda name, value, quantized: seen.update({name: (value, quantized)})), torch.no_grad():
        module.eval()(x)
    assert set(seen) == set(region.points)
    for name, point in region.points.items():
        value, quantized = seen[name]
        assert_torchs_but_for_ties(quantized, torchs(value, point), value, point.scale, point.axis)
        limits = (point.quant_min, point.quant_max)
        expected, _ = formula(value, point.scale.detach(), point.zero_point, *limits, point.axis)
        assert_same_bits(quantized, expected)
        calibrated_on_it = name.endswith("weight") or name == "conv.input0"  # the others see quantized data here
        if calibrated_on_it and (quant_dtype(dtype).signed or point.scheme == "affine"):
            step = point.scale.detach().max() * (1.0 if point.scheme == "affine" else 0.5)
            assert (quantized - value).abs().max() <= 1.01 * step, name
    optimizer = torch.optim.SGD(parameter_groups(module, lr=0.01, scale_lr_factor=1e-3), lr=0.01)
    module.train()(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())
    optimizer.step()
    module(x)
    for name, point in region.points.items():
        assert bool((point.scale > 0).all() and point.scale.isfinite().all())
        assert point.learned == learned, name
