"""The way through torch's own ``hardtanh``: the bits of the custom ``autograd.Function``, and its place in autograd.

``test_fake_quantize.py`` compares the values and gradients of ordinary tensors, which go that way, with the formula.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_qat.quantization.fake_quant import cpu_kernel
from lightning_qat.quantization.fake_quant.fake_quantize_function import fake_quantize
from tests.quantization.fake_quant.reference import assert_same_bits
from tests.quantization.fake_quant.test_fake_quantize import near_thresholds, run

KINDS: dict[str, tuple[Any, ...]] = {
    "per tensor": (torch.tensor(0.02), 0, -128, 127),
    "per tensor, affine": (torch.tensor(0.02), torch.tensor(37), 0, 255),
    "per channel": (torch.tensor([0.02, 0.1]), 0, -128, 127, 0),
    "per channel, affine": (torch.tensor([0.02, 0.1]), torch.tensor([37, 100]), 0, 255, 0),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_tensors_have_the_bits_of_the_small_ones_that_they_are_made_of(kind: str, dtype: torch.dtype) -> None:
    values = near_thresholds(0.02, -128, 127, 0)[:4000].to(dtype)
    rows = torch.stack([values, values.flip(0)])
    large = rows.repeat(1, cpu_kernel.LARGE // rows.numel() + 1)  # also split between threads
    assert rows.numel() < cpu_kernel.LARGE < large.numel()
    output, grad = run(fake_quantize, large, *KINDS[kind])
    expected, _ = run(fake_quantize, rows, *KINDS[kind])
    assert_same_bits(output, expected.repeat(1, large.numel() // rows.numel()))
    passes = run(fake_quantize, rows, *KINDS[kind])[1] != 0
    assert torch.equal(grad != 0, passes.repeat(1, large.numel() // rows.numel()))


@kinds
def test_an_ordinary_tensor_runs_no_python_in_the_backward_and_one_with_nan_does(kind: str) -> None:
    """The case is NaN, whose gradient torch's scalar code lets pass: such a tensor goes the other way."""
    x = torch.randn(2, 9, requires_grad=True)
    holding_nan = torch.full((2, 9), torch.nan, requires_grad=True)
    assert not _custom_functions(fake_quantize(x, *KINDS[kind]))
    assert _custom_functions(fake_quantize(holding_nan, *KINDS[kind]))


def _custom_functions(y: Tensor) -> int:
    node, found = y.grad_fn, 0
    while node is not None:
        found += hasattr(type(node), "_forward_cls")
        node = node.next_functions[0][0] if node.next_functions else None
    return found


@kinds
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, when it loads forward mode
def test_the_tangent_of_forward_mode_passes_where_the_gradient_does(kind: str) -> None:
    """What is written into the result of ``hardtanh`` must not reach its tangent."""
    x = 3 * torch.randn(2, 500)
    tangent = torch.randn(2, 500)
    _, grad = run(fake_quantize, x, *KINDS[kind])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), tangent)
        found = forward_ad.unpack_dual(fake_quantize(dual, *KINDS[kind])).tangent
    assert found is not None
    assert torch.equal(found, torch.where(grad != 0, tangent, 0.0))


@kinds
def test_writing_into_the_result_and_saving_elsewhere_change_no_gradient(kind: str) -> None:
    x = (3 * torch.randn(2, 500)).requires_grad_()
    expected = fake_quantize(x, *KINDS[kind])
    (grad,) = torch.autograd.grad(expected.relu().sum(), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        y = fake_quantize(x, *KINDS[kind]).relu_()
    assert torch.equal(y, expected.relu())
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], grad)


def test_writing_into_the_input_before_the_backward_is_still_an_error() -> None:
    """A region copies such inputs first."""
    x = torch.randn(2, 9, requires_grad=True) * 1
    y = fake_quantize(x, *KINDS["per tensor"])
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@kinds
def test_a_tensor_of_a_type_of_its_own_stays_of_that_type(kind: str) -> None:
    class Own(Tensor):
        pass

    x = torch.randn(2, 9).as_subclass(Own).requires_grad_()
    y = fake_quantize(x, *KINDS[kind])
    assert_same_bits(y.detach().as_subclass(Tensor), fake_quantize(x.detach().as_subclass(Tensor), *KINDS[kind]))
