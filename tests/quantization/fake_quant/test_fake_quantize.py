"""Arithmetic, gradient and state of fake-quantization (foundation 2, design section 6).

Against the formula ``round(x / scale)`` bit for bit, and against torch's operators but for ties.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.fake_quant.fake_quantize_function import fake_quantize
from tests.quantization.fake_quant.reference import (
    assert_same_bits,
    assert_torchs_but_for_ties,
    assert_torchs_gradient_but_for_ties,
    formula,
)

RANGES = [(-128, 127), (-127, 127), (0, 255), (-8, 7), (-2, 1), (0, 3), (-32768, 32767), (0, 65535), (-15, 16)]
SCALES = [1.0, 0.1, 0.02, 100 / 32768, 0.7764707, 0.2642754, 1 / 3, 1e-3, 3e-20, 7e11, 2.0**-126, 1.2e-38]
normal_scales = st.floats(2.0**-100, 2.0**60, width=32)


def near_thresholds(scale: float, quant_min: int, quant_max: int, zero_point: int = 0) -> Tensor:
    """Values around the ties of all (or, for wide types, many) codes, of which torch's operators overflow on none."""
    lowest, highest = quant_min - zero_point - 3, quant_max - zero_point + 3
    codes = torch.arange(lowest, highest + 1, max(1, (highest - lowest) // 500), dtype=torch.float64)
    codes = torch.cat([codes, torch.arange(lowest, lowest + 8), torch.arange(highest - 8, highest + 1)])
    ties = (torch.cat([codes, codes + 0.5]) * scale).float()
    inf = torch.tensor(torch.inf)
    up, down = torch.nextafter(ties, inf), torch.nextafter(ties, -inf)
    values = torch.cat([ties, up, down, torch.nextafter(up, inf), torch.nextafter(down, -inf)])
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-39]), torch.randn(257) * scale * quant_max])
    return values[values.isfinite()]


def run(function: Any, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Output and gradient, for a gradient of distinct numbers."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x, *args)
    y.backward(upstream(x))
    assert x.grad is not None
    return y.detach(), x.grad


def upstream(x: Tensor) -> Tensor:
    return torch.linspace(1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)


def assert_is_formula(results: tuple[Tensor, Tensor], x: Tensor, *args: Any) -> None:
    """Output and gradient, bit for bit."""
    value, inside = formula(x, *args)
    assert_same_bits(results[0], value)
    assert_same_bits(results[1], torch.where(inside, upstream(x), 0.0))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("quant_min", "quant_max"), RANGES)
def test_per_tensor_output_and_gradient_around_every_tie_are_the_formulas_and_torchs_but_for_ties(
    scale: float, quant_min: int, quant_max: int
) -> None:
    torch.manual_seed(0)
    for zero_point in {0, quant_min, quant_max, (quant_min + quant_max) // 2 + 1}:
        if not quant_min <= zero_point <= quant_max:
            continue
        s = torch.tensor(scale)
        x = near_thresholds(s.item(), quant_min, quant_max, zero_point)
        torchs = run(torch.fake_quantize_per_tensor_affine, x, s.item(), zero_point, quant_min, quant_max)
        for z in (zero_point, torch.tensor(zero_point, dtype=torch.int32)):
            output, grad = run(fake_quantize, x, s, z, quant_min, quant_max)
            assert_is_formula((output, grad), x, s, zero_point, quant_min, quant_max)
            assert_torchs_but_for_ties(output, torchs[0], x, s)
            assert_torchs_gradient_but_for_ties(grad, torchs[1], x, s, zero_point, quant_min, quant_max)
            assert_same_bits(fake_quantize(x, s, z, quant_min, quant_max), output)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize(("quant_min", "quant_max"), RANGES)
def test_per_channel_output_and_gradient_are_the_formulas_and_torchs_but_for_ties(
    quant_min: int, quant_max: int, axis: int
) -> None:
    torch.manual_seed(0)
    scales = torch.tensor([s for s in SCALES if s > 1e-30])
    channels = len(scales)
    for zero in {0, quant_min, quant_max}:
        if not quant_min <= zero <= quant_max:
            continue
        zero_points = torch.full((channels,), zero, dtype=torch.int32)
        if zero == quant_max:
            zero_points = torch.randint(quant_min, quant_max + 1, (channels,), dtype=torch.int32)
        rows = [
            near_thresholds(s.item(), quant_min, quant_max, int(z)) for s, z in zip(scales, zero_points, strict=True)
        ]
        length = min(len(row) for row in rows)
        x = torch.stack([row[:length] for row in rows]).reshape(channels, -1, 1).movedim(0, axis)
        # On large non-contiguous tensors torch's operator is given the contiguous values.
        x = x.contiguous()
        torchs = run(torch.fake_quantize_per_channel_affine, x, scales, zero_points, axis % 3, quant_min, quant_max)
        args = (scales, zero_points, quant_min, quant_max, axis)
        output, grad = run(fake_quantize, x, *args)
        assert_is_formula((output, grad), x, *args)
        assert_torchs_but_for_ties(output, torchs[0], x, scales, axis)
        assert_torchs_gradient_but_for_ties(grad, torchs[1], x, *args)
        if zero_points.unique().numel() == 1:
            results = run(fake_quantize, x, scales, int(zero_points[0]), quant_min, quant_max, axis)
            assert_is_formula(results, x, *args)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    scale=normal_scales,
    codes=st.lists(st.floats(-70000, 70000, width=32), min_size=0, max_size=40),
    limits=st.sampled_from(RANGES),
    data=st.data(),
)
def test_any_input_gives_the_formulas_bits_and_within_torchs_limits_torchs_but_for_ties(
    scale: float, codes: list[float], limits: tuple[int, int], data: st.DataObject
) -> None:
    quant_min, quant_max = limits
    zero_point = data.draw(st.integers(quant_min, quant_max))
    x = (torch.tensor(codes, dtype=torch.float64) * scale).float()
    s = torch.tensor(scale)
    args = (s, torch.tensor(zero_point, dtype=torch.int32), quant_min, quant_max)
    torchs = run(torch.fake_quantize_per_tensor_affine, x, *args)
    output, grad = run(fake_quantize, x, *args)
    assert_is_formula((output, grad), x, *args)
    assert_torchs_but_for_ties(output, torchs[0], x, s)
    assert_torchs_gradient_but_for_ties(grad, torchs[1], x, *args)
    assert_is_formula(run(fake_quantize, x[None], s[None], args[1][None], quant_min, quant_max, 0), x[None], *args)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    scale=st.floats(2.0**-126, 2.0**110, width=32),
    limits=st.sampled_from(RANGES),
    end=st.sampled_from([0, 1]),
    double=st.booleans(),
    data=st.data(),
)
def test_the_gradient_mask_changes_at_the_very_value_whose_code_leaves_the_range(
    scale: float, limits: tuple[int, int], end: int, double: bool, data: st.DataObject
) -> None:
    """The sixteen values on both sides of either end of the range; per tensor it is found by bounds on ``x``."""
    zero_point = data.draw(st.integers(*limits))
    s = torch.tensor(scale)
    dtype = torch.float64 if double else torch.float32
    tie = (limits[end] - zero_point + (0.5 if end else -0.5)) * s.double()
    values = [tie.to(dtype)]
    for towards in (torch.inf, -torch.inf):
        value = values[0]
        for _ in range(16):
            value = torch.nextafter(value, torch.tensor(towards, dtype=dtype))
            values.append(value)
    x = torch.stack(values)
    _, inside = formula(x, s, zero_point, *limits)
    assert bool(inside.any()) != bool(inside.all())
    for args in ((s, zero_point, *limits), (s[None], torch.tensor([zero_point]), *limits, 0)):
        shaped = x if len(args) == 4 else x[None]
        _, grad = run(fake_quantize, shaped, *args)
        assert torch.equal((grad != 0).reshape(-1), inside)


def test_two_million_random_ties_give_the_formulas_bits_and_torchs_but_for_ties() -> None:
    torch.manual_seed(0)
    x = (torch.randint(-140, 140, (2_000_000,)) + 0.5) * 0.05
    x.add_(torch.randn_like(x) * 1e-8)
    scale = torch.tensor(0.05)
    output = fake_quantize(x, scale, 0, -128, 127)
    torchs = torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127)
    assert_same_bits(output, formula(x, scale, 0, -128, 127)[0])
    assert_torchs_but_for_ties(output, torchs, x, scale)
    assert not torch.equal(output, torchs)  # torch multiplies


def test_float64_is_computed_in_float64_as_in_torchs_per_channel_operator() -> None:
    """(torch's per-tensor operator rounds its result to float32: the codes are the same, but for ties.)"""
    torch.manual_seed(0)
    x = torch.cat([(torch.arange(-140, 140) + 0.5).double() * 0.05, torch.randn(1000).double()])
    x = torch.cat([x, torch.nextafter(x, torch.tensor(torch.inf).double())])
    scale = torch.tensor(0.05)
    x = x[None]
    args = (scale[None], torch.tensor([3], dtype=torch.int32))
    per_channel = run(torch.fake_quantize_per_channel_affine, x, *args, 0, -128, 127)
    per_tensor = run(torch.fake_quantize_per_tensor_affine, x, scale.item(), 3, -128, 127)
    for output, grad in (
        run(fake_quantize, x, scale, 3, -128, 127),
        run(fake_quantize, x, *args, -128, 127, 0),
    ):
        assert_is_formula((output, grad), x, scale, 3, -128, 127)
        assert_torchs_but_for_ties(output, per_channel[0], x, scale)
        assert_torchs_but_for_ties(output.float(), per_tensor[0].float(), x, scale)
        for torchs in (per_channel[1], per_tensor[1]):
            assert_torchs_gradient_but_for_ties(grad, torchs, x, scale, 3, -128, 127)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize(("quant_min", "quant_max"), [(-128, 127), (0, 255), (-32768, 32767)])
def test_half_precision_is_computed_in_float32(
    dtype: torch.dtype, axis: int | None, quant_min: int, quant_max: int
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 1000) * 2).to(dtype)
    scale = torch.tensor(2.0 / quant_max) if axis is None else torch.tensor([0.5, 1.0, 2.0]) / quant_max
    zero_point = torch.zeros(scale.shape, dtype=torch.int32)
    output, grad = run(fake_quantize, x, scale, zero_point, quant_min, quant_max, axis)
    wide, wide_grad = run(fake_quantize, x.float(), scale, zero_point, quant_min, quant_max, axis)
    if axis is None:
        torchs = run(torch.fake_quantize_per_tensor_affine, x.float(), scale, zero_point, quant_min, quant_max)
    else:
        torchs = run(torch.fake_quantize_per_channel_affine, x.float(), scale, zero_point, 0, quant_min, quant_max)
    value, inside = formula(x.float(), scale, zero_point, quant_min, quant_max, axis)
    assert_same_bits(output, value.to(dtype))
    assert grad.dtype == dtype
    assert torch.equal(grad != 0, inside)
    assert_torchs_but_for_ties(wide, torchs[0], x.float(), scale, axis)
    assert_torchs_gradient_but_for_ties(wide_grad, torchs[1], x.float(), scale, zero_point, quant_min, quant_max, axis)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 64, 1003])
def test_nan_stays_nan_with_zero_gradient_and_infinities_and_huge_values_saturate(
    axis: int | None, dtype: torch.dtype, size: int
) -> None:
    huge = 3e38
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, huge, -huge, 0.5], dtype=dtype).repeat_interleave(size)[None]
    scale, zero_point = torch.tensor(0.5), torch.tensor(0)
    if axis is not None:
        scale, zero_point = scale[None], zero_point[None]
    output, grad = run(fake_quantize, x, scale, zero_point, -8, 7, axis)
    expected = torch.tensor([torch.nan, 3.5, -4.0, 3.5, -4.0, 0.5], dtype=dtype).repeat_interleave(size)[None]
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    passes = torch.tensor([False, False, False, False, False, True]).repeat_interleave(size)[None]
    assert torch.equal(grad != 0, passes)


def test_gradient_mask_follows_the_rounding_of_ties() -> None:
    """-128.5 rounds to the even -128, which is inside; 127.5 rounds to 128, which is outside."""
    x = torch.tensor([-128.5, -128.50002, 127.5, 127.49999], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), 0, -128, 127).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_numpys_formula_gives_the_same() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=5000).astype(np.float32)
    scale = np.float32(0.013)
    codes = np.clip(np.rint(x / scale) + 7, 0, 255)
    expected = (codes - 7).astype(np.float32) * scale
    assert np.array_equal(fake_quantize(torch.from_numpy(x), torch.tensor(scale), 7, 0, 255).numpy(), expected)


@pytest.mark.parametrize("axis", [None, 1])
def test_strides_are_kept_and_the_input_is_not_changed(axis: int | None) -> None:
    torch.manual_seed(0)
    scale = torch.tensor(0.02) if axis is None else torch.rand(5) / 50 + 0.01
    base = torch.randn(2, 5, 6, 7)
    layouts = {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base.transpose(2, 3),
        "sliced": base[..., ::2],
        "expanded": base[:, :, :1].expand(2, 5, 6, 7),
    }
    for name, x in layouts.items():
        before = x.clone()
        output, grad = run(fake_quantize, x, scale, 0, -128, 127, axis)
        expected, expected_grad = run(fake_quantize, x.contiguous(), scale, 0, -128, 127, axis)
        assert torch.equal(output, expected), name
        assert torch.equal(grad, expected_grad), name
        assert torch.equal(x, before), name
        if name in ("channels_last", "transposed"):
            assert output.stride() == x.stride(), name


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_empty_and_zero_dimensional_tensors_work(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 0.26)
    output, grad = run(fake_quantize, x, torch.tensor(0.5), 0, -8, 7)
    assert torch.equal(output, torch.full(shape, 0.5))
    assert grad.shape == shape


def test_nothing_is_saved_where_no_gradient_is_needed() -> None:
    x = torch.randn(10)
    assert fake_quantize(x, torch.tensor(0.1), 0, -8, 7).grad_fn is None
    with torch.no_grad():
        assert fake_quantize(x.requires_grad_(), torch.tensor(0.1), 0, -8, 7).grad_fn is None


def test_wrong_axis_and_integer_input_are_clear_errors() -> None:
    with pytest.raises(ConfigurationError, match=r"\(2, 3\) does not have 2 channels at axis 1"):
        fake_quantize(torch.zeros(2, 3), torch.ones(2), 0, -8, 7, axis=1)
    with pytest.raises(ConfigurationError, match="int64"):
        fake_quantize(torch.arange(3), torch.tensor(1.0), 0, -8, 7)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
@pytest.mark.parametrize("options", [{}, {"scheme": "affine"}, {"axis": 0, "channels": 3, "narrow_range": True}])
def test_compiled_in_one_graph_it_gives_the_same_output_and_gradient(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    point = calibrated(torch.randn(3, 50), **options)
    x = torch.randn(3, 50) * 3
    compiled = torch.compile(point, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(run(compiled, x), run(point, x), strict=True):
        assert torch.equal(actual, expected)


def test_second_derivatives_pass_through_the_same_mask() -> None:
    x = torch.tensor([[0.5, 9.0, -9.0]], requires_grad=True)
    for args in ((torch.tensor(0.5), 0, -8, 7), (torch.tensor([0.5]), 0, -8, 7, 0)):
        (grad,) = torch.autograd.grad(fake_quantize(x, *args).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), x)
        assert second.tolist() == [[2.0, 0.0, 0.0]]


# The module -----------------------------------------------------------------------------------------------------------


def calibrated(x: Tensor, dtype: str = "int8", **options: Any) -> FakeQuantize:
    point = FakeQuantize(dtype, **{"observer": "minmax", **options})
    point.observe(x)
    point.compute_scale()
    return point


@pytest.mark.parametrize("options", [{}, {"scheme": "affine", "axis": 0, "channels": 3}])
def test_exported_it_gives_the_same_output(options: dict[str, Any]) -> None:
    x = torch.randn(3, 50)
    point = calibrated(x / 2, **options)
    assert torch.equal(torch.export.export(torch.nn.Sequential(point), (x,)).module()(x), point(x))


def test_built_on_another_default_device_it_can_be_materialized_and_calibrated() -> None:
    with torch.device("meta"):
        point = FakeQuantize("int8", observer="minmax", axis=0, channels=2)
    assert point.scale.is_meta
    point.to_empty(device="cpu")
    point.observe(torch.tensor([[1.27], [2.54]]))
    point.compute_scale()
    assert point.scale.tolist() == pytest.approx([0.01, 0.02])


def test_uncalibrated_or_disabled_point_returns_its_input_itself() -> None:
    x = torch.randn(5)
    point = FakeQuantize("int8")
    assert point(x) is x
    point.observe(x)
    assert point.scale_source is None
    assert point(x) is x
    point.compute_scale()
    assert point.scale_source == "mse"
    assert point(x) is not x
    point.enabled = False
    assert point(x) is x


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "int16"])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("axis", [None, 1])
def test_quantizing_equals_torchs_operator_with_the_same_scale_but_for_ties(
    dtype: str, scheme: Any, axis: int | None
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5) + 0.3
    point = calibrated(x, dtype, scheme=scheme, axis=axis, channels=6 if axis else None)
    limits = (point.quant_min, point.quant_max)
    if axis is None:
        torchs = torch.fake_quantize_per_tensor_affine(x, point.scale, point.zero_point, *limits)
    else:
        torchs = torch.fake_quantize_per_channel_affine(x, point.scale, point.zero_point, axis, *limits)
    assert_same_bits(point(x), formula(x, point.scale, point.zero_point, *limits, axis)[0])
    assert_torchs_but_for_ties(point(x), torchs, x, point.scale, axis)
    if scheme == "affine":
        # The ends are half a step off where the zero point was rounded.
        step = point.scale.max().item()
        assert (point(x) - x).abs().max() <= step * (1 + 1e-5)
        assert torch.equal(point(torch.zeros_like(x)), torch.zeros_like(x))


def test_scale_is_derived_again_with_other_methods_and_types_without_recalibrating() -> None:
    """Design section 6: the histogram is kept. Deriving there and back gives the same number."""
    torch.manual_seed(0)
    point = calibrated(torch.randn(10_000), observer="mse")
    first = point.scale.clone()
    buffer = point.scale
    seen = set()
    for observer in ("minmax", "percentile", "ema", "kl"):
        point.compute_scale(observer)
        assert point.scale_source == observer
        seen.add(point.scale.item())
    assert len(seen) == 3  # of a single batch, ema is minmax
    point.change_dtype("int16")
    assert (point.dtype, point.quant_min, point.quant_max, point.scale_source) == ("int16", -32768, 32767, "kl")
    point.compute_scale("mse", "int8")
    assert torch.equal(point.scale, first)
    assert point.scale is buffer


def test_fixed_scale_is_used_at_once_and_never_moves_but_statistics_are_recorded() -> None:
    """B6: 100/32768 on int16."""
    point = FakeQuantize("int16", fixed_scale=100 / 32768)
    assert point.scale_source == "fixed"
    assert point.scale.item() == 100 / 32768
    point.observe(torch.tensor([-7.0, 3.0]))
    point.compute_scale()
    point.update_scale(torch.tensor([1000.0]))
    assert (point.scale_source, point.scale.item()) == ("fixed", 100 / 32768)
    assert [end.item() for end in point.statistics.range] == [-7.0, 3.0]
    point.compute_scale("minmax")
    assert point.scale.item() == pytest.approx(7 / 32767)


def test_narrow_range_leaves_out_the_smallest_signed_code_only() -> None:
    assert FakeQuantize("int8", narrow_range=True).quant_min == -127
    assert FakeQuantize("uint8", narrow_range=True).quant_min == 0
    point = FakeQuantize("int8", narrow_range=True)
    point.change_dtype("int4")
    assert (point.quant_min, point.quant_max) == (-7, 7)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("axis", [None, 0])
def test_a_weights_scale_follows_its_range_in_proportion_and_does_not_jump(scheme: Any, axis: int | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 500)
    point = calibrated(weight, "int4", scheme=scheme, axis=axis, channels=4 if axis == 0 else None, observer="mse")
    before, zero_point = point.scale.clone(), point.zero_point.clone()
    assert (before < calibrated(weight, "int4", scheme=scheme).scale).all()  # it does clip
    point.update_scale(weight)
    torch.testing.assert_close(point.scale, before, rtol=1e-6, atol=0)
    point.update_scale(weight * 3)
    torch.testing.assert_close(point.scale, before * 3, rtol=1e-6, atol=0)
    assert torch.equal(point.zero_point, zero_point)
    point.update_scale(weight * torch.nan)
    torch.testing.assert_close(point.scale, before * 3, rtol=1e-6, atol=0)


def test_an_activations_scale_is_a_moving_average_and_does_not_jump() -> None:
    torch.manual_seed(0)
    point = FakeQuantize("int8", observer="mse", ema_momentum=0.1)
    batches = [torch.randn(1000) for _ in range(20)]
    for batch in batches:
        point.observe(batch)
    point.compute_scale()
    before = point.scale.item()
    low, high = (end.item() for end in point.statistics.ema_range)
    average = max(-low, high)
    point.update_scale(torch.tensor([low, high]), ema=True)
    assert point.scale.item() == pytest.approx(before, rel=1e-6)
    point.update_scale(torch.tensor([-10.0, 10.0]), ema=True)
    low, high = (end.item() for end in point.statistics.ema_range)
    expected = max(-low, high) / average
    assert point.scale.item() == pytest.approx(before * expected, rel=1e-6)
    assert high == pytest.approx(0.9 * average + 1.0, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"axis": 0, "channels": 2}, {"scheme": "affine"}])
def test_ranges_of_zero_denormals_and_huge_values_give_usable_scales(options: dict[str, Any]) -> None:
    for value in (0.0, 1e-45, 1e-39, 1.2e-38, 1.0, 1e38, 3.4028235e38):
        for dtype in ("int2", "int8", "uint16"):
            x = torch.tensor([[value, 0.0], [0.0, value]])
            for observer in ("minmax", "ema", "percentile", "mse", "kl"):
                point = calibrated(x, dtype, observer=observer, **options)
                assert (point.scale >= 2.0**-126).all()
                assert point.scale.isfinite().all()
                assert point.degenerate == (value == 0.0)
                assert point(x).isfinite().all()
                assert (1 / point.scale).isfinite().all()
                if value >= 1.0 and dtype != "int2":
                    assert torch.allclose(point(x) / value, x / value, rtol=0.01)


def test_one_sided_data_on_symmetric_types_are_fine() -> None:
    assert calibrated(torch.tensor([1.0, 2.54])).scale.item() == pytest.approx(0.02)
    assert calibrated(torch.tensor([-1.0, -2.54])).scale.item() == pytest.approx(0.02)
    assert calibrated(torch.tensor([-9.0, 5.1]), "uint8").scale.item() == pytest.approx(0.02)


def test_computing_a_scale_without_data_is_a_clear_error() -> None:
    point = FakeQuantize("int8")
    point.observe(torch.tensor([torch.nan, torch.inf]))
    with pytest.raises(ConfigurationError, match="no finite value was observed"):
        point.compute_scale()
    assert point.scale_source is None


def test_scale_updated_under_inference_mode_works_in_the_next_backward() -> None:
    """Design section 6: a buffer born under inference_mode breaks the next backward."""
    x = torch.randn(50)
    with torch.inference_mode():
        point = FakeQuantize("int8", scheme="affine")
        weights = FakeQuantize("int8", axis=0, channels=1)
        for p, value in ((point, torch.randn(50)), (weights, torch.randn(1, 50))):
            p.observe(value)
            p.compute_scale()
            p.update_scale(value * 2)
            p(value)
        point.double()
    for p, value in ((point, x), (weights, x[None])):
        assert not p.scale.is_inference()
        assert not p.zero_point.is_inference()
        p.observe(value)
        p.compute_scale()
        p.update_scale(value, ema=True)
        leaf = value.clone().requires_grad_()
        p(leaf).sum().backward()
        assert leaf.grad is not None


def test_scale_updated_between_forward_and_backward_does_not_change_the_gradient() -> None:
    for options in ({}, {"axis": 0, "channels": 1, "scheme": "affine"}):
        x = torch.tensor([[-3.0, 0.5, 3.0]])
        point = calibrated(x / 2, **options)
        leaf = x.clone().requires_grad_()
        y = point(leaf)
        point.update_scale(x * 100)
        y.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("convert", ["bfloat16", "half", "double", "float"])
@pytest.mark.parametrize("channels", [None, 3])
def test_converting_the_model_keeps_scale_and_zero_point_exact(convert: str, channels: int | None) -> None:
    point = calibrated(torch.randn(3, 40), scheme="affine", axis=None if channels is None else 0, channels=channels)
    scale, zero_point = point.scale.clone(), point.zero_point.clone()
    getattr(torch.nn.Sequential(point), convert)()
    assert_same_bits(point.scale, scale)
    assert_same_bits(point.zero_point, zero_point)
    point.type(torch.float16)
    assert_same_bits(point.scale, scale)
    assert_same_bits(point.zero_point, zero_point)


def test_copies_and_pickles_are_independent() -> None:
    point = calibrated(torch.randn(100))
    for twin in (copy.deepcopy(point), pickle.loads(pickle.dumps(point))):
        before, count = point.scale.item(), point.statistics.count
        assert twin.scale.item() == before
        twin.observe(torch.full((10,), 50.0))
        twin.compute_scale("minmax", "int4")
        assert (point.scale.item(), point.statistics.count, point.dtype) == (before, count, "int8")
        assert twin.scale.item() == pytest.approx(50 / 7)


@pytest.mark.parametrize("options", [{}, {"axis": 1, "channels": 4, "scheme": "affine"}])
def test_state_is_restored_exactly_from_a_weights_only_file(options: dict[str, Any]) -> None:
    """Derived scales, averages and later updates are the same bits in the restored point."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 100)
    point = calibrated(x, "int4", observer="mse", **options)
    point.observe(x * 2)
    point.compute_scale("mse", "int8")
    file = io.BytesIO()
    torch.save({"state": point.state_dict(), "statistics": point.get_statistics_state()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    restored = FakeQuantize("int4", observer="mse", **options)
    restored.load_state_dict(stored["state"])
    restored.load_statistics_state(stored["statistics"])
    assert (restored.dtype, restored.scale_source) == ("int8", "mse")
    for ema in (None, True, False):
        for p in (point, restored):
            if ema is not None:
                p.update_scale(x * 1.5, ema=ema)
        assert_same_bits(restored.scale, point.scale)
    for observer in ("ema", "percentile", "kl", "mse"):
        for p in (point, restored):
            p.compute_scale(observer)
        assert_same_bits(restored.scale, point.scale)
        assert_same_bits(restored.zero_point, point.zero_point)


def test_state_dict_keys_are_the_two_buffers() -> None:
    assert list(FakeQuantize("int8").state_dict()) == ["scale", "zero_point"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int17"}, "did you mean"),
        ({"dtype": "float32"}, "not a quantized type"),
        ({"scheme": "symetric"}, "'symmetric'"),
        ({"observer": "mean"}, "unknown observer 'mean'"),
        ({"observer": "fixed"}, "needs a fixed_scale"),
        ({"axis": 0}, "belong together"),
        ({"percentile": 0.0}, "percentile"),
        ({"ema_momentum": 0.0}, "ema_momentum"),
        ({"fixed_scale": 0.0}, "fixed_scale"),
        ({"fixed_scale": float("nan")}, "fixed_scale"),
        ({"fixed_scale": 2.0**126}, "fixed_scale"),  # loading would refuse it
    ],
)
def test_a_wrong_argument_is_an_error_that_says_what_to_write(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FakeQuantize(**{"dtype": "int8", **arguments})
