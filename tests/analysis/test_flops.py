"""FLOPs of single ops against torch's own counter, and by hand where it knows none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_qat.analysis.flops import einsum_flops, op_flops
from lightning_qat.analysis.model_check.model_check import check
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.tracing.tracer import trace


class Function(nn.Module):
    """A function of the input and some parameters."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.operands = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.operands)


def _flops(module: nn.Module, x: Tensor, kind: str | None = None) -> int:
    graph = trace(module, [x])
    return sum(op_flops(op) for op in graph.ops if kind is None or op.kind == kind)


COUNTED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, 2, 1), (2, 4, 9)),
    "conv2d grouped, dilated": (nn.Conv2d(4, 8, 3, groups=2, dilation=2), (2, 4, 9, 9)),
    "conv2d depthwise": (nn.Conv2d(6, 6, 3, groups=6), (1, 6, 7, 5)),
    "conv3d": (nn.Conv3d(2, 4, 2), (1, 2, 4, 4, 4)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, 2), (2, 4, 5)),
    "conv_transpose2d grouped": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2, output_padding=1), (2, 4, 5, 5)),
    "linear": (nn.Linear(5, 7), (3, 2, 5)),
    "linear of a vector": (nn.Linear(5, 7), (5,)),
    "bmm": (Function(torch.bmm, (2, 5, 4)), (2, 3, 5)),
    "matmul, broadcast": (Function(torch.matmul, (5, 4)), (2, 3, 5)),
    "addmm": (Function(lambda x, b, y: torch.addmm(b, x, y), (4,), (5, 4)), (3, 5)),
    "baddbmm": (Function(lambda x, b, y: torch.baddbmm(b, x, y), (2, 3, 4), (2, 5, 4)), (2, 3, 5)),
    "attention": (Function(F.scaled_dot_product_attention, (2, 4, 6, 8), (2, 4, 6, 10)), (2, 4, 5, 8)),
    "einsum, batched": (Function(lambda x, y: torch.einsum("bhid,bhjd->bhij", x, y), (2, 3, 6, 4)), (2, 3, 5, 4)),
    "einsum": (Function(lambda x, y: torch.einsum("nchw,cd->ndhw", x, y), (3, 4)), (2, 3, 5, 4)),
    "tensordot": (Function(lambda x, y: torch.tensordot(x, y, dims=2), (4, 5, 6)), (3, 4, 5)),
    "inner": (Function(torch.inner, (4, 5)), (3, 5)),
    "gru": (nn.GRU(4, 6), (5, 2, 4)),
    "gru_cell": (nn.GRUCell(4, 6), (2, 4)),
    "lstm_cell": (nn.LSTMCell(4, 6), (2, 4)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_those_of_torch(name: str) -> None:
    module, shape = COUNTED[name]
    x = torch.randn(shape)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert _flops(module, x) == counter.get_total_flops() > 0


BY_HAND: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "mv": (Function(torch.mv, (5,)), (3, 5), 2 * 3 * 5),
    "dot": (Function(torch.dot, (5,)), (5,), 2 * 5),
    "outer": (Function(torch.outer, (5,)), (3,), 2 * 3 * 5),
    "addbmm": (Function(lambda x, b, y: torch.addbmm(b, x, y), (3, 4), (2, 5, 4)), (2, 3, 5), 2 * 2 * 3 * 4 * 5),
    # 4 gates, 2 directions, 2 layers (the second reads both directions), 10 steps
    "lstm": (nn.LSTM(4, 6, 2, bidirectional=True), (5, 2, 4), 2 * 10 * 2 * 4 * 6 * ((4 + 6) + (12 + 6))),
    "sigmoid": (nn.Sigmoid(), (3, 5), 15),
    "reshape": (nn.Flatten(), (3, 5, 2), 0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_flops_that_torch_does_not_count(name: str) -> None:
    module, shape, expected = BY_HAND[name]
    assert _flops(module, torch.randn(shape)) == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_einsum_of_two_operands_is_that_of_torch(data: Any) -> None:
    """Any equation of two operands that share an index, with an index of batches or without."""
    labels = data.draw(st.permutations("abcd"))
    sizes = dict(zip("abcd", data.draw(st.tuples(*[st.integers(2, 5)] * 4)), strict=True))
    batch, left, shared, right = labels
    batched = batch if data.draw(st.booleans()) else ""
    first, second = batched + left + shared, batched + shared + right
    equation = f"{first},{second}->{batched}{left}{right}"
    operands = [torch.randn([sizes[label] for label in term]) for term in (first, second)]
    with FlopCounterMode(display=False) as counter:
        torch.einsum(equation, *operands)
    assert einsum_flops(equation, [o.shape for o in operands]) == counter.get_total_flops()


def test_einsum_with_dots_and_without_a_result() -> None:
    assert einsum_flops("...ij,jk->...ik", [(7, 2, 3), (3, 4)]) == 2 * 7 * 2 * 3 * 4
    assert einsum_flops("ij,jk", [(2, 3), (3, 4)]) == 2 * 2 * 3 * 4
    assert einsum_flops("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)]) == 2 * (2 * 3 * 4 + 2 * 4 * 5)


def test_table_adds_up_ops_and_flops_by_the_type_they_are_computed_in() -> None:
    """An int8 linear, an int16 tanh that reads it, a linear that reads int16."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    region = insert(model, (torch.randn(2, 4),), overrides=[{"match": "1.output", "activation": {"dtype": "int16"}}])
    section = next(s for s in check(region).sections if s.title == "Ops and FLOPs by dtype:")
    first, tanh, last = 2 * 2 * 4 * 8, 2 * 8, 2 * 2 * 8 * 3
    total = first + tanh + last
    assert section.rows == (
        ("int8", 2, "66.7 %", first + tanh, f"{100 * (first + tanh) / total:.1f} %"),
        ("int16", 1, "33.3 %", last, f"{100 * last / total:.1f} %"),
        ("total", 3, "100.0 %", total, "100.0 %"),
    )
