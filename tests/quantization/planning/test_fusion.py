"""Which ops are computed as one, and why others are not (A2; design section 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.quantization.planning.fusion import find_fusions
from lightning_qat.quantization.tracing.tracer import trace
from tests.quantization.models import Wired

X = torch.randn(2, 4, 6, 6)


def wired(function: Callable[[Any, Tensor], Any]) -> Wired:
    return Wired(
        function,
        conv=nn.Conv2d(4, 4, 1),
        conv2=nn.Conv2d(4, 4, 1),
        up=nn.ConvTranspose2d(4, 4, 1),
        linear=nn.Linear(6, 6),
        bn=nn.BatchNorm2d(4),
        bn2=nn.BatchNorm2d(4),
        relu=nn.ReLU(),
        inplace=nn.ReLU(inplace=True),
    )


def fusions(function: Callable[[Any, Tensor], Any], *batches: Any) -> tuple[list[str], list[tuple[str, str]]]:
    groups, misses = find_fusions(trace(wired(function), batches or [X]))
    return ["+".join(g.kinds) for g in groups], [("+".join(m.kinds), m.cause) for m in misses]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: m.relu(m.bn(m.conv(x))), ["conv2d+batch_norm+relu"]),
        (lambda m, x: m.relu(m.bn(m.conv(x)) + x), ["conv2d+batch_norm+add+relu"]),
        (lambda m, x: m.relu(x + m.bn(m.conv(x))), ["conv2d+batch_norm+add+relu"]),
        (lambda m, x: m.conv(x) + x, ["conv2d+add"]),
        (lambda m, x: F.relu6(m.conv(x)), ["conv2d+relu6"]),
        (lambda m, x: F.hardtanh(m.up(x)), ["conv_transpose2d+hardtanh"]),
        (lambda m, x: torch.relu_(m.linear(x)), ["linear+relu"]),
        (lambda m, x: m.inplace(m.bn(m.conv(x))), ["conv2d+batch_norm+relu"]),
        (lambda m, x: m.relu(m.bn(x)), ["batch_norm+relu"]),
        (lambda m, x: m.relu(x + torch.tanh(x)), ["add+relu"]),
        (lambda m, x: m.relu(m.conv(x).add_(x)), ["conv2d+add+relu"]),
        (lambda m, x: m.bn(m.relu(m.conv(x))), ["conv2d+relu"]),
        (lambda m, x: m.conv2(m.conv(x)), []),
        (lambda m, x: F.gelu(m.conv(x)), []),
        (lambda m, x: m.relu(m.conv(x).flatten(2)), []),
        (lambda m, x: m.relu(m.conv(x)) + m.relu(m.conv2(x)), ["conv2d+relu", "conv2d+relu"]),
        # of two layers that could take the add, the later one does; the other is its residual
        (lambda m, x: m.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x))), ["conv2d+batch_norm", "conv2d+batch_norm+add+relu"]),
        # the same module twice: two groups, as each call has its own place
        (lambda m, x: m.relu(m.conv(m.relu(m.conv(x)))), ["conv2d+relu", "conv2d+relu"]),
    ],
)
def test_patterns_longest_first(function: Callable[[Any, Tensor], Any], expected: list[str]) -> None:
    """A2."""
    assert fusions(function) == (expected, [])


@pytest.mark.parametrize(
    ("function", "kinds", "cause"),
    [
        (lambda m, x: [y := m.conv(x), m.relu(y)], "conv2d+relu", "also leaves the region"),
        (lambda m, x: m.relu(y := m.conv(x)) * torch.tanh(y), "conv2d+relu", "of conv has another consumer: tanh_0"),
        (
            lambda m, x: m.relu(y := m.bn(m.conv(x))) * torch.tanh(y),
            "conv2d+batch_norm+relu",
            "another consumer: tanh_0",
        ),
    ],
)
def test_near_misses_name_the_cause(function: Callable[[Any, Tensor], Any], kinds: str, cause: str) -> None:
    """A2."""
    _, misses = fusions(function)
    assert [kind for kind, _ in misses] == [kinds]
    assert cause in misses[0][1]


def test_op_whose_operand_comes_from_another_op_in_other_forwards_is_a_dynamic_miss() -> None:
    """A2, A3."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x) if x.sum() > 0 else torch.tanh(x)
        return torch.sigmoid(m.relu(y))

    _, misses = fusions(forward, X.abs(), -X.abs())
    assert misses[0][0] == "conv2d+relu"
    assert misses[0][1].startswith("dynamic code: relu reads another tensor in other forwards")


def test_branches_that_both_end_in_a_layer_fuse_with_what_follows() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x) if x.sum() > 0 else m.conv2(x)
        return torch.sigmoid(m.relu(y))

    groups, misses = find_fusions(trace(wired(forward), [X.abs(), -X.abs()]))
    assert [(set(g.ops[:-1]), g.ops[-1]) for g in groups] == [({"conv", "conv2"}, "relu")]
    assert misses == ()


def test_misses_say_where_to_look() -> None:
    _, misses = find_fusions(trace(wired(lambda m, x: m.relu(y := m.conv(x)) * torch.tanh(y)), [X]))
    assert "test_fusion.py:" in misses[0].location


def test_constants_are_not_fused() -> None:
    groups, _ = fusions(lambda m, x: torch.tanh(x) * m.relu(m.conv(torch.ones(1, 4, 1, 1))))
    assert groups == []
