"""Scales that follow the data: the short ways of `update_scale` give the bits of the general one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.quantization.fake_quantize import FakeQuantize
from lightning_qat.quantization.scales import scale_from_bounds, scale_from_numbers, scale_from_range

DTYPES = ["int2", "int4", "int8", "int16", "uint2", "uint8", "uint16"]
ends = st.floats(-(2.0**127), 2.0**127, width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.2e-38, 3.4028235e38])
elements = st.floats(-100, 100, width=32) | st.sampled_from([0.0, float("nan"), float("inf"), float("-inf"), 1e-40])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(low=ends, high=ends, dtype=st.sampled_from(DTYPES), narrow=st.booleans(), affine=st.booleans())
def test_scale_of_numbers_and_of_bounds_is_that_of_a_range_of_tensors(
    low: float, high: float, dtype: str, narrow: bool, affine: bool
) -> None:
    low, high = min(low, high), max(low, high)
    point = FakeQuantize(dtype, narrow_range=narrow)
    limits, scheme = (point.quant_min, point.quant_max), "affine" if affine else "symmetric"
    tensors = torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64)
    scale, zero_point = scale_from_range(*tensors, *limits, scheme)
    number, zero = scale_from_numbers(low, high, *limits, scheme)
    assert torch.tensor(number, dtype=torch.float32) == scale
    assert zero == zero_point.item()
    if not affine and point.quant_min < 0:
        assert torch.equal(scale_from_bounds(torch.maximum(-tensors[0], tensors[1]), *limits), scale)


def general_update(point: FakeQuantize, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rule of `update_scale` by its definition: range times ratio, unless an end is not finite."""
    ratio = point.get_statistics_state()["ratio"]
    rows = x.reshape(1, -1) if point.axis is None else x.movedim(point.axis, 0).reshape(x.shape[point.axis], -1)
    low, high = rows.amin(1).double() * ratio[0], rows.amax(1).double() * ratio[1]
    scale, zero_point = scale_from_range(low, high, point.quant_min, point.quant_max, point.scheme)
    usable = low.isfinite() & high.isfinite()
    shape = point.scale.shape
    return (
        torch.where(usable.reshape(shape), scale.reshape(shape), point.scale),
        torch.where(usable.reshape(shape), zero_point.reshape(shape), point.zero_point),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    values=st.lists(elements, min_size=12, max_size=12),
    dtype=st.sampled_from(DTYPES),
    scheme=st.sampled_from(["symmetric", "affine"]),
    axis=st.sampled_from([None, 0, 1, -1]),
    options=st.fixed_dictionaries(
        {"observer": st.sampled_from(["minmax", "mse", "percentile"]), "narrow_range": st.booleans()}
    ),
    precision=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_update_gives_the_bits_of_its_definition(
    values: list[float], dtype: str, scheme: Any, axis: int | None, options: dict[str, Any], precision: torch.dtype
) -> None:
    x = torch.tensor(values).reshape(3, 4).to(precision)
    channels = None if axis is None else x.shape[axis]
    point = FakeQuantize(dtype, scheme=scheme, axis=axis, channels=channels, percentile=90.0, **options)
    point.observe(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    point.compute_scale()
    scale, zero_point = general_update(point, x)
    point.update_scale(x)
    assert torch.equal(point.scale, scale)
    if scheme == "affine":
        assert torch.equal(point.zero_point, zero_point)


@pytest.mark.parametrize("axis", [None, 0])
def test_update_of_a_memory_format_without_order_looks_at_every_value(axis: int | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 3)
    point = FakeQuantize("int8", axis=axis, channels=None if axis is None else 4, observer="minmax")
    point.observe(x)
    point.compute_scale()
    scale = point.scale.clone()
    for view in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        point.scale.fill_(1.0)
        point.update_scale(view)
        assert torch.equal(point.scale, scale)
