"""Split quantization (B8): groups along an axis have scales of their own."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_qat.analysis.statistics.point_statistics import PointStatistics
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.numerics.split_statistics import SplitStatistics
from lightning_qat.quantization.overrides import Override, Split
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert


class PositionEmbedding(nn.Module):
    """The divisor of the source document: 1 ... 8659.6."""

    def forward(self, positions: Tensor) -> Tensor:
        channels = torch.arange(128, dtype=torch.float32)
        dim_t = 10000 ** (2 * (channels // 2) / 128)
        return torch.sin(positions[..., None] / dim_t)


POSITIONS = torch.linspace(0, 6.283, 40).reshape(4, 10)
RULE = {"match": "div_1.input1", "activation": {"dtype": "int16", "split": {"axis": 0, "sizes": [32, 96]}}}


def separate(x: Tensor, axis: int, sizes: tuple[int, ...], **options: Any) -> tuple[list[FakeQuantize], Tensor]:
    """What a user would write instead: split, quantize each group by itself, concatenate."""
    points = [FakeQuantize(**options) for _ in sizes]
    for point, part in zip(points, x.split(list(sizes), axis), strict=True):
        point.observe(part)
        point.compute_scale()
    return points, torch.cat([p(part) for p, part in zip(points, x.split(list(sizes), axis), strict=True)], axis)


def split_point(x: Tensor, axis: int, sizes: tuple[int, ...], **options: Any) -> FakeQuantize:
    point = FakeQuantize(axis=axis, channels=x.shape[axis], split_sizes=sizes, **options)
    point.observe(x)
    point.compute_scale()
    return point


def test_the_first_group_of_the_source_documents_divisor_gets_a_thousandth_of_the_scale() -> None:
    """B8: from 0.2643 to 0.000264, and the sine of the quotient is that much closer."""
    errors = []
    expected = PositionEmbedding()(POSITIONS)
    for overrides in ([{**RULE, "activation": {"dtype": "int16", "observer": "minmax"}}], [RULE]):
        module = PositionEmbedding()
        region = insert(module, (POSITIONS,), overrides=overrides, qconfig={"activation": {"observer": "minmax"}})
        calibrate(region, [(POSITIONS,)])
        with region.only(["div_1.input1"]), torch.no_grad():
            errors.append(float((module(POSITIONS) - expected).abs().max()))
        scale = region.points["div_1.input1"].scale
    assert scale.tolist() == pytest.approx([0.000264, 0.2643], rel=2e-3)
    assert errors[1] < errors[0] / 100


def test_plan_shows_the_groups_and_survives_json() -> None:
    region = insert(PositionEmbedding(), (POSITIONS,), overrides=[RULE])
    point = region.plan.by_name["div_1.input1"]
    assert (point.axis, point.channels, point.split_sizes) == (0, 128, (32, 96))
    assert QuantPlan.from_dict(json.loads(region.plan.to_json())) == region.plan
    assert region.plan.by_name["div_1.input0"].split_sizes is None


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"axis": 0, "sizes": [32, 90]}, r"div_1.input1 .*\(128,\).*128 channels along axis 0.*122.*add up to 128"),
        ({"axis": 1, "sizes": [32, 96]}, r"div_1.input1 .*\(128,\) has no axis 1: write one from -1 to 0"),
        ({"axis": -2, "sizes": [32, 96]}, r"div_1.input1 .*has no axis -2"),
        ({"axis": 0, "sizes": [128]}, "at least two groups"),
        ({"axis": 0, "sizes": [0, 128]}, r"such as split: \{axis: 0, sizes: \[32, 96\]\}"),
        ({"axis": 0, "sizes": "32,96"}, "at least two groups"),
        ({"axis": "0", "sizes": [32, 96]}, "needs an axis"),
        ({"axis": 0, "size": [32, 96]}, "did you mean 'sizes'"),
    ],
)
def test_a_split_that_does_not_fit_names_the_point_its_shape_and_what_to_write(split: Any, message: str) -> None:
    """B8, bad input."""
    rule = {"match": "div_1.input1", "activation": {"split": split}}
    with pytest.raises(ConfigurationError, match=message):
        insert(PositionEmbedding(), (POSITIONS,), overrides=[rule])


def test_split_and_a_single_scale_contradict_each_other_and_the_later_rule_wins() -> None:
    with pytest.raises(ConfigurationError, match="write either split or one of these"):
        Override.list_of([{"match": "a", "activation": {"split": {"axis": 0, "sizes": [1, 2]}, "threshold": 100}}])
    fixed = {"match": "div_1.input1", "activation": {"threshold": 100}}
    for rules, sizes, scale in (([RULE, fixed], None, 100 / 32768), ([fixed, RULE], (32, 96), None)):
        point = insert(PositionEmbedding(), (POSITIONS,), overrides=rules).plan.by_name["div_1.input1"]
        assert (point.split_sizes, point.fixed_scale) == (sizes, scale)
    assert Split(-1, [2, 3]) == Split(axis=-1, sizes=[2, 3])


@pytest.mark.parametrize("observer", ["minmax", "ema", "percentile", "mse", "kl"])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize(("axis", "sizes"), [(1, (1, 5)), (-1, (2, 3, 4)), (0, (3, 1))])
def test_one_split_point_equals_split_quantize_and_concatenate(
    observer: Any, scheme: Any, axis: int, sizes: tuple[int, ...]
) -> None:
    """B8: every observer, both schemes, the same bits; a second type from the same statistics too."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 9) * torch.logspace(-2, 2, 9) + 0.1
    options = {"dtype": "int8", "scheme": scheme, "observer": observer}
    parts, expected = separate(x, axis, sizes, **options)
    point = split_point(x, axis, sizes, **options)
    assert torch.equal(point(x), expected)
    assert torch.equal(point.zero_point, torch.stack([p.zero_point for p in parts]))
    for p in (point, *parts):
        p.change_dtype("uint4")
    assert torch.equal(point.scale, torch.stack([p.scale for p in parts]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    rank=st.integers(1, 4),
    data=st.data(),
    scheme=st.sampled_from(["symmetric", "affine"]),
    dtype=st.sampled_from(["int2", "int8", "uint8", "int16"]),
)
def test_any_sizes_along_any_axis(sizes: list[int], rank: int, data: st.DataObject, scheme: Any, dtype: str) -> None:
    """B8: values and gradients of x, while the scales follow the data, and when they are learned."""
    axis = data.draw(st.integers(-rank, rank - 1))
    shape = [3] * rank
    shape[axis] = sum(sizes)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(sizes) * 7 + rank))
    options = {"dtype": dtype, "scheme": scheme, "observer": "minmax", "batch_axis": None}
    parts, _ = separate(x, axis, tuple(sizes), **options)
    point = split_point(x, axis, tuple(sizes), **options)
    for ema, learned in itertools.product((False, True), (False, True)):
        if not learned:
            point.update_scale(x * 0.8, ema=ema)
        point.learn_scale(learned)
        leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        point(leaves[0]).square().sum().backward()
        for part, value in zip(parts, leaves[1].split(sizes, axis), strict=True):
            if not learned:
                part.update_scale(value.detach() * 0.8, ema=ema)
            part.learn_scale(learned)
            part(value).square().sum().backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)  # type: ignore[arg-type]
        assert torch.equal(point.scale, torch.stack([p.scale for p in parts]))
        if learned:
            expected = torch.stack([p.scale.grad for p in parts])  # type: ignore[misc]
            torch.testing.assert_close(point.scale.grad, expected, rtol=1e-4, atol=1e-5)
            for p in (point, *parts):
                p.scale.grad = None


def test_split_scales_in_checkpoints_and_copies() -> None:
    """B8: the groups, their statistics and whether they are learned are restored from the state_dict alone."""
    module = PositionEmbedding()
    region = insert(module, (POSITIONS,), overrides=[RULE])
    calibrate(region, [(POSITIONS,)])
    region.learn_scales({"activation"})
    restored = PositionEmbedding()
    again = insert(restored, (POSITIONS,))
    restored.load_state_dict(module.state_dict())
    assert again.points["div_1.input1"].learned
    again.set_state("quantize")
    assert torch.equal(restored(POSITIONS), module(POSITIONS))
    for which in (region, again):
        which.compute_scales("percentile")
    assert torch.equal(again.points["div_1.input1"].scale, region.points["div_1.input1"].scale)
    other = FakeQuantize("int8", axis=0, channels=4, split_sizes=(1, 1, 2))
    with pytest.raises(ConfigurationError, match="2 groups, this point has 3"):
        other.load_statistics_state(region.points["div_1.input1"].get_statistics_state())


def test_layer_statistics_of_a_split_point_are_those_of_its_groups() -> None:
    """B10: nothing is clipped at min-max scales, and the codes of both groups are seen."""
    torch.manual_seed(0)
    x = torch.randn(6, 8) * torch.tensor([0.01] * 3 + [5.0] * 5)
    point = split_point(x, 1, (3, 5), dtype="int8", observer="minmax")
    statistics = PointStatistics.of(point)
    quantized = point(x)
    statistics.update(x, quantized, point)
    assert statistics.clipped == 0
    assert statistics.rounding == pytest.approx(float((quantized - x).double().square().sum()), rel=1e-6)
    assert statistics.code_high.max() == 127 + 128


@pytest.mark.parametrize("sizes", [(1, 2), (0, 4), (5, -1)])
def test_wrong_split_sizes_of_a_single_point_are_an_error(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="add up to the 4 channels"):
        FakeQuantize("int8", axis=0, channels=4, split_sizes=sizes)


def test_another_shape_at_run_time_is_an_error_that_names_it() -> None:
    point = split_point(torch.randn(2, 8), 1, (3, 5), dtype="int8")
    with pytest.raises(ConfigurationError, match=r"\(2, 7\) does not have 8 channels"):
        point(torch.randn(2, 7))
    with pytest.raises(ConfigurationError, match=r"\(2, 7\) cannot be split into groups of \[3, 5\] along axis 1"):
        point.observe(torch.randn(2, 7))


def test_a_point_with_more_groups_than_characters_for_their_counts_is_saved_and_loaded() -> None:
    count, limit = 500, 384
    values = torch.arange(1.0, 2 * count + 1)
    statistics = SplitStatistics(axis=0, sizes=(2,) * count)
    statistics.observe(values)
    restored = SplitStatistics(axis=0, sizes=(2,) * count)
    restored.load_state_dict(statistics.packed_state(limit))
    low, high = restored.range
    assert torch.equal(low.flatten().float(), values[0::2])
    assert torch.equal(high.flatten().float(), values[1::2])
