"""Autocast changes no code: scales, codes and gradients of a quantizer are the same with it and without it.

The siblings: every kind of scale (per tensor, per channel, split, affine, of a folded batch norm), fixed, moving and
learned, and what calibration derives. A quantizer computes in float32 and returns the type that it is given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_qat.quantization.numerics.dtypes import quant_dtype
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.harness.classifier import Net, dataset

IMAGES = dataset(32).tensors[0]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SPLIT = [{"match": "conv1.input0", "activation": {"split": {"axis": 2, "sizes": [2, 4]}}}]
KINDS: dict[str, dict[str, Any]] = {
    "int8": {},
    "affine": {"qconfig": {"activation": {"dtype": "uint8", "scheme": "affine"}}},
    "int16": {"qconfig": {"activation": {"dtype": "int16"}, "weight": {"dtype": "int16"}}},
    "int4": {"qconfig": {"activation": {"dtype": "int4"}, "weight": {"dtype": "int4"}}},
    "folded batch norm": {"qconfig": {"weight": {"granularity": "per_tensor"}}},
    "split": {"overrides": SPLIT},
}


def quantized(kind: str, autocast: torch.dtype | None = None) -> tuple[nn.Module, Region]:
    """A calibrated network; the calibration may run under autocast."""
    torch.manual_seed(0)
    net = Net()
    region = insert(net, (IMAGES[:4],), **KINDS[kind])
    net.eval()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        calibrate(region, [IMAGES])
    return net.train(), region


def inputs_of(net: nn.Module, region: Region, dtype: torch.dtype) -> dict[str, Tensor]:
    """For every point what it may get: the weight, or values within and beyond its range."""
    found = {}
    for name, point in region.points.items():
        shape = (4, 1, 6, 6) if name == "conv1.input0" else (4, 4, 6, 6)
        values = torch.randn(shape) * float(point.scale.max()) * 2.0 ** (quant_dtype(point.dtype).bits - 1)
        weight = name.endswith("weight")
        found[name] = (net.get_parameter(name).detach() if weight else values).to(dtype).requires_grad_()
    return found


@pytest.mark.parametrize("autocast", TYPES[1:], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_no_code_and_no_gradient(kind: str, dtype: torch.dtype, autocast: torch.dtype) -> None:
    net, region = quantized(kind)
    for name, value in inputs_of(net, region, dtype).items():
        point = region.points[name]
        plain = point(value)
        plain.float().square().sum().backward()
        gradient, value.grad = value.grad, None
        with torch.autocast("cpu", autocast):
            found = point(value)
            found.float().square().sum().backward()
        assert found.dtype == dtype
        assert torch.equal(found, plain), name
        assert gradient is not None
        assert value.grad is not None
        assert torch.equal(value.grad, gradient), name
        value.grad = None


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_codes_are_those_of_numpy_in_float32(dtype: torch.dtype) -> None:
    net, region = quantized("int8")
    for name, value in inputs_of(net, region, dtype).items():
        point = region.points[name]
        scale = point.scale.reshape(-1, *[1] * (value.dim() - 1)).numpy()
        low = -128 if point.axis is None else -127
        codes = np.clip(np.rint(value.detach().float().numpy() / scale), low, 127)
        assert codes.dtype == np.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(point(value), torch.from_numpy(codes * scale).to(dtype)), name


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_the_input_and_of_weights_are_calibrated_alike(kind: str) -> None:
    """What arrives at other points is rounded by the layers before, which compute in bfloat16 then."""
    scales = [{n: p.scale for n, p in quantized(kind, autocast)[1].points.items()} for autocast in (None, *TYPES[1:])]
    for name in scales[0]:
        if name.endswith(("weight", "input0")):
            assert all(torch.equal(found[name], scales[0][name]) for found in scales), name
        assert all(found[name].dtype == torch.float32 for found in scales)


@pytest.mark.parametrize("learned", [False, True])
def test_scales_move_alike_under_autocast(learned: bool) -> None:
    """The gradient of a learned scale, and the moving average of a range, over the same input."""
    found = []
    for enabled in (False, True):
        _, region = quantized("int8")
        point, values = region.points["conv1.input0"], 3 * torch.randn(4, 1, 6, 6).bfloat16()
        if learned:
            region.learn_scales(("activation", "weight"))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            if learned:
                point(values).float().square().sum().backward()
            else:
                point.update_scale(values, ema=True)
        found.append(point.scale.grad if learned else point.scale.clone())
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], quantized("int8")[1].points["conv1.input0"].scale)
