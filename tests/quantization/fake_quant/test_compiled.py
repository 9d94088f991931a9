"""Compiled to C++ by inductor, a point has the bits of eager mode: no product with the inverse, no fused arithmetic."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from tests.quantization.fake_quant.reference import assert_same_bits, formula

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler"
)


def around_ties(scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """A row for each scale: every tie, its two neighbours, and random values."""
    ties = (torch.arange(quant_min - 3, quant_max + 4) + 0.5) * scale.reshape(-1, 1)
    inf = torch.tensor(torch.inf)
    random = torch.randn(len(ties), 10_001) * scale.reshape(-1, 1) * quant_max
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -0.0, 1e-45]).repeat(len(ties), 1)
    return torch.cat([ties, torch.nextafter(ties, inf), torch.nextafter(ties, -inf), random, special], 1)


def run(point: Any, x: Tensor, grad: Tensor | None = None) -> list[Tensor]:
    """Output and gradient."""
    leaf = x.clone().requires_grad_()
    y = point(leaf)
    y.backward(torch.linspace(1, 2, x.numel()).reshape(x.shape) if grad is None else grad)
    assert leaf.grad is not None
    return [y.detach(), leaf.grad]


def calibrated_point(learned: bool) -> FakeQuantize:
    """An int8 point with one scale."""
    point = FakeQuantize("int8", observer="minmax")
    point.observe(torch.tensor([-2.0, 3.0]))
    point.compute_scale()
    point.learn_scale(learned)
    return point


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
@pytest.mark.parametrize("learned", [False, True])
def test_gradients_that_are_not_finite_pass_as_in_eager(learned: bool) -> None:
    """A loss that overflowed must be seen by a GradScaler; beyond the range there is no gradient at all."""
    torch._dynamo.reset()
    point = calibrated_point(learned)
    values, grads = (
        torch.tensor([0.5, 7.0, torch.inf, torch.nan]),
        torch.tensor([1.0, torch.inf, -torch.inf, torch.nan]),
    )
    x, grad = (t.flatten() for t in torch.meshgrid(values, grads, indexing="ij"))
    expected = run(point, x, grad)
    assert torch.equal(expected[1][:4].nan_to_num(7.0), grad[:4].nan_to_num(7.0))
    assert not expected[1][4:].any()
    for actual, eager in zip(
        run(torch.compile(point, fullgraph=True, backend="eager"), x, grad), expected, strict=True
    ):
        assert torch.equal(actual.nan_to_num(7.0), eager.nan_to_num(7.0))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
@pytest.mark.parametrize("learned", [False, True])
def test_the_forward_saves_no_mask(learned: bool) -> None:
    """Inductor writes bools one by one on the CPU. A matrix product is not computed again, so something is saved."""
    torch._dynamo.reset()
    point = calibrated_point(learned)
    saved: list[torch.dtype] = []

    def forward_compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
        saved.extend(node.meta["val"].dtype for node in outputs if isinstance(node, torch.fx.Node))
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=forward_compiler,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    torch.compile(lambda: point(a @ b), backend=backend, fullgraph=True)().sum().backward()
    assert torch.float32 in saved
    assert torch.bool not in saved


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # by inductor itself
@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("options", [{}, {"axis": 0, "channels": 3, "scheme": "affine"}])
def test_output_and_gradient_are_the_same_bits_as_in_eager(dtype: str, learned: bool, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    point = FakeQuantize(dtype, observer="minmax", **options)
    point.observe(torch.randn(3, 50))
    point.compute_scale()
    point.learn_scale(learned)
    x = around_ties(point.scale.detach().expand(3), point.quant_min, point.quant_max)
    expected = run(point, x)
    for actual, eager in zip(run(torch.compile(point, fullgraph=True), x), expected, strict=True):
        assert_same_bits(actual.nan_to_num(7.0), eager.nan_to_num(7.0))
    finite = x[:, :-6]
    value, _ = formula(finite, point.scale, point.channel_zero_point, point.quant_min, point.quant_max, point.axis)
    assert_same_bits(expected[0][:, :-6].contiguous(), value)
