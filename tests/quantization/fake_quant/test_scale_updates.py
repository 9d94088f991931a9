"""Scales that follow the data: the short ways of `update_scale` give the bits of the general one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.numerics.scales import scale_from_numbers, scale_from_range
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import find_regions
from tests.quantization.models import calibrated as calibrated_region

DTYPES = ["int2", "int4", "int8", "int16", "uint2", "uint8", "uint16"]
ends = st.floats(-(2.0**127), 2.0**127, width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.2e-38, 3.4028235e38])
elements = st.floats(-100, 100, width=32) | st.sampled_from([0.0, float("nan"), float("inf"), float("-inf"), 1e-40])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(low=ends, high=ends, dtype=st.sampled_from(DTYPES), narrow=st.booleans(), affine=st.booleans())
def test_scale_of_numbers_is_that_of_a_range_of_tensors(
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


class General(FakeQuantize):
    """Has no short way."""

    def _followed(self, x: Tensor, ema: bool) -> bool:
        return False


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    batches=st.lists(st.lists(elements, min_size=6, max_size=6), min_size=1, max_size=4),
    scheme=st.sampled_from(["symmetric", "affine"]),
    axis=st.sampled_from([None, 1]),
    observed=st.integers(1, 3),
    precision=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    was_compiled=st.booleans(),
)
def test_a_moving_average_has_the_bits_of_the_general_way(
    batches: list[list[float]],
    scheme: Any,
    axis: int | None,
    observed: int,
    precision: torch.dtype,
    was_compiled: bool,
) -> None:
    """Scale, zero point, averages and the count of batches, also where a batch holds values that are not finite."""
    torch.manual_seed(0)
    first = torch.randn(observed, 2, 3)
    points = [cls("uint8", scheme=scheme, axis=axis, channels=axis and 3) for cls in (FakeQuantize, General)]
    for point in points:
        for batch in first:
            point.observe(batch)
        point.compute_scale()
        point.statistics._counts_in_tensor = was_compiled  # type: ignore[union-attr]
        for values in batches:
            point.update_scale(torch.tensor(values).reshape(2, 3).to(precision), ema=True)
    ours, general = points
    assert torch.equal(ours.scale, general.scale)
    assert torch.equal(ours.zero_point, general.zero_point)
    assert torch.equal(ours.statistics.averages, general.statistics.averages)
    assert ours.statistics.batches == general.statistics.batches


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


def trained_int16() -> tuple[nn.Module, Any, Tensor]:
    """A model whose optimizer has stepped since its last training forward."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(16, 8)
    region = insert(module, (x,), qconfig={"activation": {"dtype": "int16"}, "weight": {"dtype": "int16"}})
    with region.state("observe"):
        module(x)
    region.compute_scales()
    region.set_state("quantize")
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    return module.eval(), region, x


def scale_of_the_weight(module: nn.Module) -> Tensor:
    """Per-channel min-max, symmetric."""
    weight: Tensor = module[0].weight.detach()  # type: ignore[index]
    return weight.abs().amax(dim=1) / 32767


def test_evaluation_after_a_step_has_the_scales_of_the_present_weights() -> None:
    """At int16, the scale of the weights before the last step would clip the largest ones."""
    module, region, x = trained_int16()
    point = region.points["0.weight"]
    assert not torch.equal(point.scale, scale_of_the_weight(module))
    with region.state("quantize", updates=()):  # an analysis changes nothing
        module(x)
    assert not torch.equal(point.scale, scale_of_the_weight(module))
    module(x)
    torch.testing.assert_close(point.scale, scale_of_the_weight(module), rtol=1e-6, atol=0)
    module[0].weight.data.mul_(2)  # type: ignore[index, union-attr, operator]
    before = point.scale.clone()
    module(x)
    assert torch.equal(point.scale, before)  # once after training, not whenever it is evaluated


def test_checkpoint_between_a_step_and_an_evaluation_says_so() -> None:
    module, _, x = trained_int16()
    other, other_region, _ = trained_int16()
    other(x)
    other.load_state_dict(module.state_dict())
    other_region.set_state("quantize")
    assert torch.equal(other(x), module(x))
    torch.testing.assert_close(other_region.points["0.weight"].scale, scale_of_the_weight(module), rtol=1e-6, atol=0)


def test_scales_that_are_kept_are_those_of_the_weights_at_that_moment() -> None:
    """freeze_observers_after: whether or not an evaluation or a checkpoint came between."""
    module, region, x = trained_int16()
    region.scales.keep_weights()
    kept = scale_of_the_weight(module)
    module[0].weight.data.mul_(2)  # type: ignore[index, union-attr, operator]
    module(x)
    torch.testing.assert_close(region.points["0.weight"].scale, kept, rtol=1e-6, atol=0)


def test_frozen_scales_are_those_of_the_frozen_weights() -> None:
    module, region, x = trained_int16()
    region.freeze("0")
    module(x)
    torch.testing.assert_close(region.points["0.weight"].scale, scale_of_the_weight(module), rtol=1e-6, atol=0)


def test_a_saved_state_has_the_scales_of_the_saved_weights() -> None:
    module, _, x = trained_int16()
    saved = {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    expected = saved["0.weight"].abs().amax(dim=1) / 32767
    name = next(name for name in saved if name.endswith("0/weight.scale"))
    torch.testing.assert_close(saved[name], expected, rtol=1e-6, atol=0)
    module(x)
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items() if name in saved)


class Weights(nn.Module):
    """A weight that is a part of a parameter, one with a batch norm folded into it, and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(8, 4))
        self.conv = nn.Conv2d(1, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        parts = nn.functional.linear(x, self.both[:4]) + nn.functional.linear(x, self.both[4:])
        y = self.norm(self.conv(parts[:, None, :, None]))
        return self.computed(y.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def test_refreshed_scales_are_those_that_an_evaluation_takes() -> None:
    """All kinds of weights; one that is computed waits for the evaluation."""
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    module = Weights()
    region = calibrated_region(module, x, qconfig={"weight": {"granularity": "per_tensor"}})
    assert any(point.batch_norm for point in region.plan.points)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.train()(x).square().sum().backward()
    optimizer.step()
    module.eval()
    twin = copy.deepcopy(module)
    twin(x)
    expected = {name: point.scale for name, point in next(iter(find_regions(twin).values())).points.items()}
    region.scales.refresh_weights()
    waiting = [name for name, point in region.points.items() if point.outdated]
    assert waiting == ["computed.linear_0.weight"]
    for name, point in region.points.items():
        assert torch.equal(point.scale, expected[name]) == (name not in waiting), name
    module(x)
    assert torch.equal(region.points["computed.linear_0.weight"].scale, expected["computed.linear_0.weight"])


def test_refreshing_does_not_change_training() -> None:
    """Bit for bit, at every step."""
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    module = Weights()
    region = calibrated_region(module, x)
    twin = copy.deepcopy(module)
    for net, saves in ((module, False), (twin, True)):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        net.train()
        for _ in range(4):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
            if saves:
                net.state_dict()
    region.scales.refresh_weights()
    other = twin.state_dict()
    assert all(torch.equal(v, other[n]) for n, v in module.state_dict().items() if isinstance(v, Tensor))


@pytest.mark.parametrize("replaced", [False, True])
def test_weights_that_are_elsewhere_now(replaced: bool) -> None:
    """`module.to(device)` gives a parameter new data; others put a new parameter in its place."""
    torch.manual_seed(0)
    module, x = Weights(), torch.randn(16, 4)
    region = calibrated_region(module, x)
    module.train()(x).square().sum().backward()
    new = 2 * module.both.data
    if replaced:
        module.both = nn.Parameter(new)
    else:
        module.both.data = new
    region.scales.refresh_weights()
    names, halves = ["linear_0.weight", "linear_1.weight"], (new[:4], new[4:])
    assert [region.points[name].outdated for name in names] == [replaced, replaced]
    module.eval()(x)
    for name, half in zip(names, halves, strict=True):
        torch.testing.assert_close(region.points[name].scale, half.abs().amax(dim=1) / 127, rtol=1e-6, atol=0)


def test_calibrating_again_after_a_step_gives_the_calibrated_scales() -> None:
    """The evaluation behind it has nothing to take anew, which would change the last bits."""
    module, region, x = trained_int16()
    calibrate(region, [x])
    before = region.points["0.weight"].scale.clone()
    assert not region.points["0.weight"].outdated
    module(x)
    assert torch.equal(region.points["0.weight"].scale, before)
