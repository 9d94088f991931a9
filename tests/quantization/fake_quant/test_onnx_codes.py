"""Codes are those of ONNX Runtime's QuantizeLinear, bit for bit (design section 6); so are the values they stand for.

More than ten million values for each type and granularity, and every tie of the type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.analysis.statistics.point_statistics import weight_codes
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.fake_quant.fake_quantize_function import codes_before_clipping, fake_quantize
from lightning_qat.quantization.fake_quant.learned_scale import fake_quantize_learned
from lightning_qat.quantization.numerics.dtypes import quant_dtype
from lightning_qat.quantization.numerics.scales import greatest_scale
from tests.quantization.fake_quant.onnx_quantize import TYPES, onnx_dequantize, onnx_quantize
from tests.quantization.fake_quant.reference import assert_same_bits
from tests.quantization.models import ResNet, calibrated

SCALES = (1.0, 0.1, 0.02, 100 / 32768, 0.7764707, 0.2642754, 1 / 3, 1e-3, 3e-20, 7e11, 2.0**-126, 1.2e-38)
VALUES = 1_000_000
"""Random values for each scale."""


def limits_of(dtype: str) -> tuple[int, int]:
    found = quant_dtype(dtype)
    return found.quant_min, found.quant_max


def random_values(scale: Tensor, limits: tuple[int, int], zero_point: int, generator: torch.Generator) -> Tensor:
    """Normal and uniform over the range, around its two ends, and of any bit pattern but NaN."""
    size, (low, high) = VALUES // 4, (limits[0] - zero_point, limits[1] - zero_point)
    normal = torch.randn(size, generator=generator) * (high - low) / 4
    uniform = torch.rand(size, generator=generator) * (high - low) * 1.2 + low - 0.1 * (high - low)
    ends = torch.where(torch.rand(size, generator=generator) < 0.5, float(low), float(high))
    ends += torch.randn(size, generator=generator)
    patterns = torch.randint(-(2**31), 2**31, (VALUES - 3 * size,), generator=generator).int().view(torch.float32)
    values = torch.cat([torch.cat([normal, uniform, ends]) * scale, patterns])
    values[values.isnan()] = scale
    values[:10] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 3.4e38, -3.4e38, torch.inf, -torch.inf])
    return values


def ties(scale: Tensor, limits: tuple[int, int], zero_point: int) -> Tensor:
    """``(k + 0.5) * scale`` for every code and some beyond, with two neighbours on either side."""
    codes = torch.arange(limits[0] - zero_point - 4, limits[1] - zero_point + 5, dtype=torch.float64)
    values = ((codes + 0.5) * scale.double()).float()
    inf = torch.tensor(torch.inf)
    up, down = torch.nextafter(values, inf), torch.nextafter(values, -inf)
    return torch.cat([values, up, down, torch.nextafter(up, inf), torch.nextafter(down, -inf)])


def scales_of(dtype: str, generator: torch.Generator) -> Tensor:
    """Fixed ones, the greatest, and four random ones between 1e-4 and 1."""
    random = 10 ** (torch.rand(4, generator=generator) * -4)
    return torch.cat([torch.tensor([*SCALES, greatest_scale(limits_of(dtype)[1] - limits_of(dtype)[0])]), random])


def zero_points_of(dtype: str, scheme: str, count: int, generator: torch.Generator) -> Tensor:
    """Zeros, or random ones and both limits."""
    low, high = limits_of(dtype)
    if scheme == "symmetric":
        return torch.zeros(count, dtype=torch.int32)
    random = torch.randint(low, high + 1, (count,), generator=generator, dtype=torch.int32)
    random[:2] = torch.tensor([low, high])
    return random


def assert_onnxs(x: Tensor, scale: Tensor, zero_point: Tensor, dtype: str, axis: int | None) -> int:
    """Compare codes, values, and values with a learned scale; return how many values there were."""
    low, high = limits_of(dtype)
    codes = onnx_quantize(x, scale, zero_point, dtype, axis)
    wide = [-1 if d == axis else 1 for d in range(x.dim())] if axis is not None else []
    ours = codes_before_clipping(x, scale.reshape(wide), zero_point.reshape(wide)).clamp_(low, high)
    assert int((ours.numpy() != codes).sum()) == 0
    values = torch.from_numpy(onnx_dequantize(codes, scale, zero_point, dtype, axis))
    assert_same_bits(fake_quantize(x, scale, zero_point, low, high, axis), values)
    assert_same_bits(fake_quantize_learned(x, scale, zero_point, low, high, axis), values)
    if low < 0 and not zero_point.any():  # a narrow range: their codes, clipped
        values = torch.from_numpy(onnx_dequantize(codes.clip(low + 1), scale, zero_point, dtype, axis))
        assert_same_bits(fake_quantize(x, scale, 0, low + 1, high, axis), values)
    return x.numel()


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("dtype", list(TYPES))
def test_per_tensor_no_code_differs_from_onnx_runtimes(dtype: str, scheme: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = scales_of(dtype, generator)
    zero_points = zero_points_of(dtype, scheme, len(scales), generator)
    count = 0
    for scale, zero_point in zip(scales, zero_points, strict=True):
        args = (scale, limits_of(dtype), int(zero_point))
        x = torch.cat([random_values(*args, generator), ties(*args)])
        count += assert_onnxs(x, scale, zero_point, dtype, None)
    assert count > 10_000_000


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("dtype", list(TYPES))
def test_per_channel_no_code_differs_from_onnx_runtimes(dtype: str, scheme: str) -> None:
    generator = torch.Generator().manual_seed(1)
    scales = scales_of(dtype, generator)
    zero_points = zero_points_of(dtype, scheme, len(scales), generator)
    rows = []
    for scale, zero_point in zip(scales, zero_points, strict=True):
        args = (scale, limits_of(dtype), int(zero_point))
        rows.append(torch.cat([random_values(*args, generator), ties(*args)]))
    assert assert_onnxs(torch.stack(rows), scales, zero_points, dtype, 0) > 10_000_000


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(list(TYPES)),
    scale=st.floats(2.0**-126, 2.0**110, width=32),
    quotients=st.lists(st.floats(-70_000, 70_000, width=32), min_size=1, max_size=30),
    others=st.lists(st.floats(width=32, allow_nan=False), max_size=10),
    data=st.data(),
)
def test_any_scale_zero_point_and_value(
    dtype: str, scale: float, quotients: list[float], others: list[float], data: st.DataObject
) -> None:
    zero_point = torch.tensor(data.draw(st.integers(*limits_of(dtype))), dtype=torch.int32)
    x = torch.cat([(torch.tensor(quotients, dtype=torch.float64) * scale).float(), torch.tensor(others)])
    s = torch.tensor(scale)
    assert_onnxs(x, s, zero_point, dtype, None)
    assert_onnxs(torch.stack([x, -x], 1), torch.stack([s, s]), torch.stack([zero_point] * 2), dtype, 1)


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("options", [{}, {"axis": 1, "channels": 6}, {"axis": 1, "channels": 6, "split_sizes": (2, 4)}])
def test_a_calibrated_point_has_onnxs_codes_in_its_values_and_in_its_statistics(
    dtype: str, scheme: Any, options: dict[str, Any]
) -> None:
    """With one scale, one per channel and one per group."""
    torch.manual_seed(0)
    x = torch.randn(50, 6, 100) + 0.3
    point = FakeQuantize(dtype, scheme=scheme, observer="minmax", **options)
    point.observe(x / 2)
    point.compute_scale()
    assert_point_is_onnxs(x, point(x), point)


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_weights_have_onnxs_codes(dtype: str, granularity: str) -> None:
    """As they are quantized: with one scale that is after their batch norm has been folded in."""
    torch.manual_seed(0)
    module, x = ResNet(), torch.randn(4, 1, 16, 16)
    module(x)
    weights = {"dtype": dtype, "granularity": granularity}
    region = calibrated(module.eval(), x, qconfig={"activation": {"dtype": dtype}, "weight": weights})
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with region.tap(lambda name, value, quantized: seen.update({name: (value, quantized)})), torch.no_grad():
        module(x)
    names = [point.name for point in region.plan.points if point.is_weight]
    assert len(names) == 7
    for name in names:
        assert_point_is_onnxs(*seen[name], region.points[name])


def assert_point_is_onnxs(x: Tensor, quantized: Tensor, point: FakeQuantize) -> None:
    """Values, and codes as the statistics count them."""
    scale, zero_point = point.channel_scale.detach(), point.channel_zero_point
    codes = onnx_quantize(x.detach(), scale, zero_point, point.dtype, point.axis).clip(point.quant_min, point.quant_max)
    values = torch.from_numpy(onnx_dequantize(codes, scale, zero_point, point.dtype, point.axis))
    assert_same_bits(quantized.contiguous(), values)
    counted = weight_codes(x, point).numpy().astype(np.int64) + point.quant_min
    rows = (
        codes.reshape(1, -1)
        if point.axis is None
        else np.moveaxis(codes, point.axis, 0).reshape(x.shape[point.axis], -1)
    )
    assert np.array_equal(counted, rows)
    assert len(np.unique(codes)) > 3
