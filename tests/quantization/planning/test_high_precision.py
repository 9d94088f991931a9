"""What may leave a region as float32: the results of matrix products, and joins of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.quantization.planning.make_plan import make_plan
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.tracing.tracer import trace

SHIPPED = ["generic_int8_int16", "horizon_plugin_pytorch", "onnxruntime_qdq"]
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Heads(nn.Module):
    """Two linear layers whose results a function brings together."""

    def __init__(self, end: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("offset", torch.full((2, 1), 7.0))
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end(self, self.a(x), self.b(x))


def planned(end: Callable[..., Any], **settings: Any) -> QuantPlan:
    return make_plan(trace(Heads(end).eval(), [X]), **settings)


def nested(net: Heads, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([torch.cat([a, b], 1).flatten(1).T, torch.stack([b, a], 1).flatten(1).T], 1)


PRODUCTS_ONLY: dict[str, Callable[..., Any]] = {
    "cat": lambda net, a, b: torch.cat([a, b], 1),
    "stack": lambda net, a, b: torch.stack([a, b]),
    "moved before": lambda net, a, b: torch.cat([a.view(2, 2, 2).transpose(1, 2), b.view(2, 2, 2)], 1),
    "moved behind": lambda net, a, b: torch.cat([a, b], 1).view(2, 2, 4).permute(0, 2, 1),
    "split and joined": lambda net, a, b: torch.cat([a.split(2, 1)[0], b.split(2, 1)[1]], 1),
    "join of joins": nested,
    "where": lambda net, a, b: torch.where(torch.eye(2, 4) > 0, a, b),
    "with a constant": lambda net, a, b: torch.cat([a, net.offset, b], 1),
    "in containers": lambda net, a, b: {"out": (torch.cat([a, b], 1), a), "more": [torch.stack([b, b])]},
}


@pytest.mark.parametrize("profile", [None, "generic_int8_int16", "horizon_plugin_pytorch"])
@pytest.mark.parametrize("end", PRODUCTS_ONLY.values(), ids=PRODUCTS_ONLY.keys())
def test_joins_of_products_leave_as_float32(end: Callable[..., Any], profile: str | None) -> None:
    """Issue 12, number six: what only lies beside each other in memory costs nothing."""
    plan = planned(end, profile=profile)
    assert {p.name for p in plan.points if p.role == "output"} == set()
    assert {"a.output", "b.output"} <= plan.float_points.keys()


MIXED: dict[str, tuple[Callable[..., Any], str]] = {
    "one is a sigmoid": (lambda net, a, b: torch.cat([a, b.sigmoid()], 1), "sigmoid_0"),
    "none is a product": (lambda net, a, b: torch.stack([a.sigmoid(), b * 2.0]), "sigmoid_0, mul_0"),
    "moved before": (lambda net, a, b: torch.cat([a.view(-1, 2), b.sigmoid().T.reshape(-1, 2)]), "sigmoid_0"),
    "moved behind": (lambda net, a, b: torch.cat([a, b.sigmoid()], 1).view(2, 4, 2).transpose(1, 2), "sigmoid_0"),
    "split, then joined": (lambda net, a, b: torch.cat([*b.sigmoid().split(2, 1), a], 1), "sigmoid_0"),
    "where": (lambda net, a, b: torch.where(torch.eye(2, 4) > 0, a, b.sigmoid()), "sigmoid_0"),
    "a sum of products": (lambda net, a, b: torch.cat([a + b, a], 1), "add_0"),
    "an input": (lambda net, a, b: torch.cat([a, X.clone() * a, b], 1), "mul_0"),
    "in a dict": (lambda net, a, b: {"y": (torch.cat([a.relu(), b.sigmoid()], 1),)}, "a.relu_0"),
}


@pytest.mark.parametrize("profile", [None, *SHIPPED])
@pytest.mark.parametrize("end", [end for end, _ in MIXED.values()], ids=MIXED.keys())
def test_joins_of_anything_else_are_quantized(end: Callable[..., Any], profile: str | None) -> None:
    """Issue 12, number six: a converter gives the join one scale, so that the plan does too, under every profile.

    Siblings: stack, where, split before it, data movement on both sides, one product among others, containers.
    """
    plan = planned(end, profile=profile)
    joins = [op for op in plan.ops if op.name.partition("_")[0] in ("cat", "stack", "where")]
    for op in joins:
        runs_in_float = "not supported" in op.reason  # where the profile says so, and then the whole join does
        assert runs_in_float or f"{op.name}.output" in plan.by_name, op


@pytest.mark.parametrize(("end", "names"), [MIXED["one is a sigmoid"], MIXED["none is a product"], MIXED["where"]])
def test_the_plan_says_why_a_join_is_quantized(end: Callable[..., Any], names: str) -> None:
    (point,) = [p for p in planned(end).points if p.role == "output" and p.op.rpartition("_")[0] in _JOINS]
    assert f"leaves the region quantized, as {names} that it joins" in point.reason


_JOINS = ("cat", "stack", "where")


def test_a_join_of_joins_is_quantized_where_the_last_one_is() -> None:
    """The detector of issue 12, number six: boxes and scores of two scales of the image."""

    def detector(net: Heads, a: Tensor, b: Tensor) -> Tensor:
        levels = [torch.cat([y * 16, y.sigmoid()], 1).flatten(1) for y in (a, b)]
        return torch.cat(levels, 1).unsqueeze(0).transpose(1, 2)

    plan = planned(detector)
    assert {"cat_0.output", "cat_1.output", "cat_2.output"} <= plan.by_name.keys()


@pytest.mark.parametrize("end", [lambda net, a, b: a + b, lambda net, a, b: (a.tanh(), b), lambda net, a, b: a * 2.0])
def test_an_elementwise_op_at_the_end_is_quantized(end: Callable[..., Any]) -> None:
    plan = planned(end)
    (op,) = [op for op in plan.ops if op.name in ("add_0", "tanh_0", "mul_0")]
    assert f"{op.name}.output" in plan.by_name


def test_a_join_keeps_float32_where_the_user_wants_its_operands_so() -> None:
    """Then no operand has a scale, and the device joins nothing."""
    end = MIXED["one is a sigmoid"][0]
    rule = {"match": "sigmoid_0", "activation": {"dtype": "float32"}}
    plan = planned(end, overrides=[rule])
    assert set(plan.float_points) == {"a.output", "cat_0.output", "sigmoid_0.output"}


def test_a_join_in_float32_by_a_rule_takes_the_products_as_they_are() -> None:
    rule = {"match": "cat_0", "activation": {"dtype": "float32"}}
    plan = planned(lambda net, a, b: torch.cat([a, b.sigmoid()], 1), overrides=[rule])
    assert plan.float_points["a.output"].startswith("high-precision")
    assert plan.float_points["cat_0.output"] == "float32 by override 1 (match 'cat_0')"


def test_a_product_that_a_rule_quantizes_makes_its_join_quantized() -> None:
    rule = {"match": "a.output", "activation": {"dtype": "int16"}}
    plan = planned(lambda net, a, b: torch.cat([a, b], 1), overrides=[rule])
    assert plan.by_name["a.output"].dtype == "int16"
    assert "as a that it joins is no float32 result" in plan.by_name["cat_0.output"].reason


def test_a_join_is_quantized_where_products_have_no_float32_result() -> None:
    """Convolutions of onnxruntime_qdq always have a QuantizeLinear behind them, so that a Concat has one too."""

    class Convs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(x)], 1)

    graph = trace(Convs(), [torch.randn(1, 1, 4, 4)])
    assert "cat_0.output" in make_plan(graph, profile="onnxruntime_qdq").by_name
    assert "cat_0.output" in make_plan(graph, profile="generic_int8_int16").float_points


def test_data_movement_that_the_hardware_computes_on_integers_takes_no_float32() -> None:
    """A sibling of number six: the largest of four values is computed by the device, on what its table has."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(self.conv(x), 2)

    graph = trace(Pooled(), [torch.randn(1, 1, 4, 4)])
    assert "conv.output" in make_plan(graph, profile="generic_int8_int16").by_name
    assert "conv.output" in make_plan(graph).float_points


def test_a_join_that_is_computed_with_as_well_is_a_tensor_like_any_other() -> None:
    plan = planned(lambda net, a, b: (y := torch.cat([a, b], 1), y.tanh()))
    assert "cat_0.output" in plan.by_name


def test_the_scores_beside_boxes_vanish_as_they_do_on_the_device() -> None:
    """Issue 12, number six: a plan that keeps them is rosier than the device."""

    def head(net: Heads, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a * 640.0, b.sigmoid() * 0.1], 1)

    net = Heads(head).eval()
    region = insert(net, (X,))
    calibrate(region, [X])
    assert torch.count_nonzero(net(X)[:, 4:]) == 0
