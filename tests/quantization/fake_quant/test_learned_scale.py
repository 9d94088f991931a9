"""Learned scales (LSQ, arXiv:1902.08153; design section 6): the gradient, and what a point with one can do."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.fake_quant.fake_quantize_function import fake_quantize
from lightning_qat.quantization.fake_quant.learned_scale import fake_quantize_learned, gradient_scale
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.parameter_groups import parameter_groups
from lightning_qat.quantization.region.region import find_regions
from tests.quantization.models import calibrated

RANGES = [(-128, 127), (-127, 127), (0, 255), (-8, 7), (-2, 1), (0, 3), (-32768, 32767)]


def paper_gradient(value: float, scale: float, negative: int, positive: int) -> float:
    """Equation 3 of the paper; ``negative`` is -Q_N, with a zero point both are less by it."""
    quotient = value / scale
    if quotient <= negative:
        return float(negative)
    if quotient >= positive:
        return float(positive)
    return -quotient + round(quotient)


def learned_point(x: Tensor, dtype: str = "int4", **options: Any) -> FakeQuantize:
    """A point calibrated on half of ``x``, so that some of it is clipped, whose scale is learned."""
    point = FakeQuantize(dtype, observer="minmax", **options)
    point.observe(x / 2)
    point.compute_scale()
    point.learn_scale()
    return point


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    scale=st.sampled_from([1.0, 0.5, 0.1, 0.0371, 3.0, 1e-3]),
    quotients=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=30),
    limits=st.sampled_from(RANGES),
    data=st.data(),
)
def test_gradient_of_the_scale_is_equation_3_of_the_paper(
    scale: float, quotients: list[float], limits: tuple[int, int], data: st.DataObject
) -> None:
    """LSQ; in float64, where the quotient is the same number here and there, ties included."""
    zero_point = data.draw(st.integers(max(limits[0], -300), min(limits[1], 300)))
    s = torch.tensor(scale, requires_grad=True)
    x = torch.tensor(quotients, dtype=torch.float64) * s.item()
    upstream = torch.linspace(1, 2, len(x), dtype=torch.float64)
    fake_quantize_learned(x, s, zero_point, *limits).mul(upstream).sum().backward()
    exact = [paper_gradient(v, s.item(), limits[0] - zero_point, limits[1] - zero_point) for v in x.tolist()]
    expected = sum(g * w for g, w in zip(exact, upstream.tolist(), strict=True))
    assert s.grad is not None
    assert float(s.grad) == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("zero_point", [0, 3])
def test_gradient_of_every_case_in_numbers(zero_point: int) -> None:
    """Below, at, inside, on a tie, at and above the range; int4, with and without a zero point."""
    low, high = -8 - zero_point, 7 - zero_point
    quotients = [low - 3.0, float(low), low + 0.25, -1.25, 0.0, 0.5, 1.5, high - 0.25, float(high), high + 0.25, 99.0]
    expected = [low, low, -0.25, 0.25, 0.0, -0.5, 0.5, 0.25, high, high, high]
    for quotient, value in zip(quotients, expected, strict=True):
        scale = torch.tensor(0.5, requires_grad=True)
        fake_quantize_learned(torch.tensor([quotient * 0.5]), scale, zero_point, -8, 7).sum().backward()
        assert scale.grad is not None
        assert scale.grad.item() == value, quotient


def test_gradient_is_the_derivative_where_the_forward_has_one() -> None:
    """Finite differences: with the codes frozen it is the code; beyond the range, the code at the limit.

    LSQ's own term -v/s is the straight-through derivative of the rounding, that of round(v/s) ~ v/s.
    """
    x = torch.tensor([-9.0, -3.3, -0.4, 0.2, 1.7, 2.6, 30.0], dtype=torch.float64)
    s, step = 0.75, 2.0**-20
    upper, lower = (fake_quantize(x, torch.tensor(s + d), 0, -8, 7) for d in (step, -step))
    difference = (upper - lower) / (2 * step)
    for value, slope in zip(x.tolist(), difference.tolist(), strict=True):
        scale = torch.tensor(s, requires_grad=True)
        fake_quantize_learned(torch.tensor([value], dtype=torch.float64), scale, 0, -8, 7).sum().backward()
        assert scale.grad is not None
        through_rounding = -value / s if -8 < value / s < 7 else 0.0
        assert scale.grad.item() == pytest.approx(slope + through_rounding, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"axis": 1, "channels": 6}, {"axis": 1, "channels": 6, "split_sizes": (2, 4)}])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_and_gradient_of_x_are_those_of_fake_quantize_bit_for_bit(
    options: dict[str, Any], scheme: Any, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 6, 5) + 0.3).to(dtype)
    x[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    learned = learned_point(x.nan_to_num(0, 1, -1), scheme=scheme, **options)
    fixed = copy.deepcopy(learned)
    fixed.learn_scale(False)
    gradients = []
    for point in (learned, fixed):
        leaf = x.clone().requires_grad_()
        y = point(leaf)
        y.nan_to_num().mul(torch.linspace(1, 2, y.numel()).reshape(y.shape)).sum().backward()
        gradients.append((y.detach(), leaf.grad))
    for mine, theirs in zip(*gradients, strict=True):
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == theirs.dtype == dtype
        assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
    with torch.no_grad():
        assert torch.equal(learned(x).nan_to_num(7.0), fixed(x).nan_to_num(7.0))


def test_each_channel_has_the_gradient_of_its_own_values() -> None:
    torch.manual_seed(0)
    x, scales = torch.randn(3, 4, 5) * 3, torch.tensor([0.1, 0.2, 0.5, 1.0])
    zero_points = torch.tensor([0, -2, 3, 7], dtype=torch.int32)
    together = scales.clone().requires_grad_()
    fake_quantize_learned(x, together, zero_points, -8, 7, axis=1).square().sum().backward()
    for index in range(4):
        alone = scales[index].clone().requires_grad_()
        fake_quantize_learned(x[:, index], alone, int(zero_points[index]), -8, 7).square().sum().backward()
        assert together.grad is not None
        torch.testing.assert_close(together.grad[index], alone.grad)


@pytest.mark.parametrize(
    ("shape", "options", "batch_axis", "values"),
    [
        ((16, 8, 3, 3), {}, None, [16 * 8 * 9]),  # a weight with one scale
        ((16, 8, 3, 3), {"axis": 0, "channels": 16}, None, [8 * 9] * 16),
        ((32, 8, 5, 5), {}, 0, [8 * 25]),  # an activation: of one sample, whatever the batch
        ((32, 8, 5), {"axis": 1, "channels": 8, "split_sizes": (2, 6)}, 0, [10, 30]),
        ((128,), {"axis": 0, "channels": 128, "split_sizes": (32, 96)}, 0, [32, 96]),
        ((7,), {}, 0, [1]),
        ((), {}, 0, [1]),
    ],
)
def test_gradient_scale_is_that_of_section_2_2(
    shape: tuple[int, ...], options: dict[str, Any], batch_axis: int | None, values: list[int]
) -> None:
    """LSQ: g = 1 / sqrt(N * Q_P), N weights or features."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    point = learned_point(x + torch.sign(x), "int4", batch_axis=batch_axis, **options)
    leaf = point.channel_scale.detach().requires_grad_()
    fake_quantize_learned(x, leaf, 0, -8, 7, point.axis).square().sum().backward()
    point(x).square().sum().backward()
    assert leaf.grad is not None
    plain = leaf.grad.split(options["split_sizes"]) if "split_sizes" in options else leaf.grad.reshape(-1).split(1)
    expected = torch.stack([part.sum() / math.sqrt(n * 7) for part, n in zip(plain, values, strict=True)])
    assert point.scale.grad is not None
    torch.testing.assert_close(point.scale.grad.reshape(-1), expected)
    sizes = options.get("split_sizes")
    factors = gradient_scale(shape, 7, point.axis, batch_axis, sizes)
    assert factors == pytest.approx([1 / math.sqrt(n * 7) for n in (values if sizes else values[:1])])


@pytest.mark.parametrize("options", [{}, {"axis": 0, "channels": 2}, {"scheme": "affine"}])
def test_values_that_are_not_finite_do_not_poison_the_scale(options: dict[str, Any]) -> None:
    """NaN adds nothing, even where the gradient that arrives is NaN; infinities are clipped values."""
    gradients = []
    x = torch.tensor([[torch.nan, 0.3, torch.inf], [torch.nan, -torch.inf, 0.1]])
    for value in (x, x.nan_to_num(0.0, 1e9, -1e9)):
        point = learned_point(torch.tensor([[-4.0, 3.0], [2.0, -4.0]]), **options)
        point(value).mul(torch.where(value.isnan(), torch.nan, 2.0)).sum().backward()
        assert point.scale.grad is not None
        assert point.scale.grad.isfinite().all()
        gradients.append(point.scale.grad)
    assert torch.equal(*gradients)


def test_a_scale_that_an_optimizer_made_negative_is_positive_again_and_can_recover() -> None:
    x = torch.tensor([-1.0, 0.5, 2.0])
    point = learned_point(x)
    for value in (-0.3, 0.0):
        with torch.no_grad():
            point.scale.fill_(value)
            assert point(x).isfinite().all()  # also in evaluation
        assert point.scale.item() == 2.0**-126
        with torch.no_grad():
            point.scale.fill_(value)
        point.scale.grad = None
        (point(x) - x).square().sum().backward()
        assert point.scale.item() == 2.0**-126
        assert point.scale.grad is not None
        assert point.scale.grad.item() < 0  # growing makes the error smaller


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_training_moves_the_scale_to_about_the_one_with_the_smallest_error(bits: int) -> None:
    """From calibrated minimum and maximum to the grid search's optimum, on normal data.

    The straight-through derivative is not exactly that of the error, so the error is compared, not the scale.
    """
    torch.manual_seed(0)
    x = torch.randn(4000)
    point = FakeQuantize(f"int{bits}", observer="minmax", narrow_range=True)
    point.observe(x)
    point.compute_scale()

    def error(scale: Tensor) -> float:
        return float((fake_quantize(x, scale, 0, point.quant_min, point.quant_max) - x).square().mean())

    start = point.scale.item()
    best = min(error(torch.tensor(start * k / 200)) for k in range(10, 201))
    before = error(point.scale)
    point.learn_scale()
    optimizer = torch.optim.Adam([point.scale], lr=start / 200)
    for _ in range(300):
        optimizer.zero_grad()
        (point(x) - x).square().mean().backward()
        optimizer.step()
    after = error(point.scale.detach())
    assert before > 1.3 * best
    assert after < 1.15 * best


@pytest.mark.parametrize(
    "options", [{}, {"axis": 0, "channels": 3, "scheme": "affine"}, {"axis": 0, "channels": 3, "split_sizes": (1, 2)}]
)
def test_the_kind_changes_without_changing_name_value_or_output(options: dict[str, Any]) -> None:
    """Fixed and learned checkpoints have the same keys, in the same order."""
    torch.manual_seed(0)
    x = torch.randn(3, 50)
    point = FakeQuantize("int4", observer="minmax", **options)
    point.learn_scale()
    parameter = point.scale
    assert isinstance(parameter, torch.nn.Parameter)
    assert point(x) is x
    point.observe(x)
    point.compute_scale()
    assert point.scale is parameter  # filled in place: an optimizer has it
    assert list(point.state_dict()) == ["scale", "zero_point"]
    y, scale = point(x).detach(), point.scale.detach().clone()
    point.learn_scale()
    assert point.scale is parameter
    point.learn_scale(False)
    assert not list(point.parameters())
    assert list(point.state_dict()) == ["scale", "zero_point"]
    assert torch.equal(point.scale, scale)
    assert torch.equal(point(x), y)


def test_a_learned_scale_moves_by_its_optimizer_only() -> None:
    x = torch.randn(2, 100)
    for options in ({}, {"axis": 0, "channels": 2}):
        point = learned_point(x, **options)
        before = point.scale.detach().clone()
        point.update_scale(x * 5)
        point.update_scale(x * 5, ema=True)
        point.set_averages(point.statistics.averages * 3)
        assert torch.equal(point.scale, before)
        point.change_dtype("int8")  # asked for: derived again
        assert (point.scale < before).all()
        assert point.scale.requires_grad


def test_a_users_fixed_scale_is_never_learned() -> None:
    """B6."""
    point = FakeQuantize("int16", fixed_scale=100 / 32768)
    point.learn_scale()
    assert not point.learned
    assert not list(point.parameters())


@pytest.mark.parametrize("options", [{}, {"axis": 0, "channels": 3}, {"axis": 0, "channels": 3, "split_sizes": (1, 2)}])
def test_state_copies_and_pickles_of_a_learned_point(options: dict[str, Any]) -> None:
    x = torch.randn(3, 40)
    point = learned_point(x, **options)
    restored = FakeQuantize("int8", observer="minmax", **options)
    restored.load_statistics_state(point.get_statistics_state())
    assert restored.learned
    restored.load_state_dict(point.state_dict())
    for twin in (copy.deepcopy(point), pickle.loads(pickle.dumps(point)), restored):
        assert twin.learned
        assert twin.scale is not point.scale
        assert torch.equal(twin(x), point(x))
        twin(x).sum().backward()
        assert twin.scale.grad is not None
        assert point.scale.grad is None
    point.learn_scale(False)
    restored.load_statistics_state(point.get_statistics_state())
    assert not restored.learned


@pytest.mark.parametrize("convert", ["bfloat16", "half", "double"])
def test_converting_the_model_keeps_the_learned_scale_and_the_parameter(convert: str) -> None:
    point = learned_point(torch.randn(3, 40), axis=0, channels=3)
    point(torch.randn(3, 40)).sum().backward()
    parameter, scale = point.scale, point.scale.detach().clone()
    getattr(torch.nn.Sequential(point), convert)()
    assert point.scale is parameter
    assert point.scale.dtype == point.scale.grad.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(point.scale, scale)
    y = point(torch.randn(3, 40, dtype={"double": torch.float64, "half": torch.half}.get(convert, torch.bfloat16)))
    y.float().sum().backward()


def test_frozen_or_without_gradient_it_is_an_ordinary_scale() -> None:
    x = torch.randn(40)
    point = learned_point(x)
    point.scale.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    point(leaf).sum().backward()
    assert leaf.grad is not None
    assert point.scale.grad is None
    point.scale.requires_grad_()
    with torch.inference_mode():
        point(x)
    point(x).sum().backward()
    assert point.scale.grad is not None


def test_optimizer_step_between_forward_and_backward_does_not_change_the_gradient() -> None:
    x = torch.randn(40)
    point = learned_point(x)
    point(x).sum().backward()
    expected = point.scale.grad.clone()  # type: ignore[union-attr]
    point.scale.grad = None
    y = point(x)
    with torch.no_grad():
        point.scale.mul_(3)
    y.sum().backward()
    assert torch.equal(point.scale.grad, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"scheme": "affine", "axis": 0, "channels": 3, "split_sizes": (1, 2)}])
def test_exported_it_gives_the_same_output(options: dict[str, Any]) -> None:
    x = torch.randn(3, 50)
    point = learned_point(x, **options)
    assert torch.equal(torch.export.export(torch.nn.Sequential(point), (x,)).module()(x), point(x))


def test_parameter_groups_keep_scales_from_weight_decay() -> None:
    """LSQ: every parameter once; without learned scales, one group as self.parameters() would give."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 2), FakeQuantize("int8"), FakeQuantize("int8", fixed_scale=0.1))
    plain = parameter_groups(module, lr=0.1)
    assert [p is q for p, q in zip(plain[0]["params"], module.parameters(), strict=True)] == [True, True]
    assert len(plain) == 1
    for point in module[1:]:
        point.learn_scale()
    weights, scales = parameter_groups(module, lr=0.1, scale_lr_factor=0.5)
    assert weights["params"] == [module[0].weight, module[0].bias]
    assert (scales["params"], scales["lr"], scales["weight_decay"]) == ([module[1].scale], 0.05, 0.0)
    with pytest.raises(ConfigurationError, match="scale_lr_factor must be 0 or more"):
        parameter_groups(module, lr=0.1, scale_lr_factor=-1.0)


def test_a_region_learns_the_roles_it_is_told_and_keeps_its_state_dict_keys() -> None:
    """The kinds are restored with the plan, into copies too; a wrong role is an error."""
    module, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)), torch.randn(16, 4)
    rule = {"match": "0.input0", "activation": {"threshold": 4}}
    region = calibrated(module, x, overrides=[rule])
    keys, before = list(module.state_dict()), module(x).detach()
    region.learn_scales()
    assert list(module.state_dict()) == keys
    assert set(region.learned_scales) == set(region.points) - {"0.input0"}  # that one is the user's
    assert torch.equal(module(x), before)
    fresh = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    restored = insert(fresh, (x,))
    fresh.load_state_dict(module.state_dict())
    assert set(restored.learned_scales) == set(region.learned_scales)
    twin = copy.deepcopy(module)
    for other, theirs in ((fresh, restored), (twin, find_regions(twin)[""])):
        theirs.set_state("quantize")
        other(x).sum().backward()
        assert all(scale.grad is not None for scale in theirs.learned_scales.values())
    assert all(scale.grad is None for scale in region.learned_scales.values())
    region.learn_scales({"weight"})
    assert set(region.learned_scales) == {"0.weight", "2.weight"}
    with pytest.raises(ConfigurationError, match="unknown role 'weights': did you mean 'weight'"):
        region.learn_scales({"weights"})


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients_of_the_scales(reentrant: bool) -> None:
    class Net(torch.nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.checkpointed = checkpointed

        def block(self, x: Tensor) -> Tensor:
            return torch.tanh(self.b(torch.tanh(x)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return checkpoint(self.block, x, use_reentrant=reentrant) if self.checkpointed else self.block(x)

    gradients = []
    x = torch.randn(8, 4)
    for checkpointed in (False, True):
        torch.manual_seed(0)
        module = Net(checkpointed)
        region = calibrated(module, x)
        region.learn_scales()
        module.train()(x).square().sum().backward()
        gradients.append({name: scale.grad for name, scale in region.learned_scales.items()})
    assert len(gradients[0]) == len(gradients[1]) > 4
    for one, other in zip(gradients[0].values(), gradients[1].values(), strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
def test_compiled_it_gives_the_same_output_and_gradients() -> None:
    x = torch.randn(3, 50)
    for options in ({}, {"axis": 0, "channels": 3, "split_sizes": (1, 2)}):
        point = learned_point(x, **options)
        y = point(x)
        y.square().sum().backward()
        expected, point.scale.grad = point.scale.grad, None
        compiled = torch.compile(point, backend="aot_eager", fullgraph=True)(x)
        compiled.square().sum().backward()
        assert torch.equal(compiled, y)
        torch.testing.assert_close(point.scale.grad, expected)
