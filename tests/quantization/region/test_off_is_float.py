"""Inserted but off is the float module, bit for bit; and the float module comes back (foundation 1)."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.quantization.modules.module_walk import REGION_NAME
from lightning_qat.quantization.modules.tensor_leaves import leaves
from lightning_qat.quantization.region.insertion import insert
from tests.quantization.models import ZOO, Example, ResNet, calibrated

EXAMPLES = pytest.mark.parametrize("example", ZOO.values(), ids=ZOO.keys())


def run(module: nn.Module, args: tuple[Any, ...], train: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Outputs, loss and gradients of one step, with the same random numbers each time."""
    module.train(train)
    module.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    outputs = leaves(module(*args))
    loss = sum((o.square().mean() for o in outputs), torch.zeros(()))
    loss.backward()
    return outputs, loss, [p.grad for p in module.parameters() if p.grad is not None]


def assert_identical(a: Any, b: Any) -> None:
    for one, other in zip(leaves(a), leaves(b), strict=True):
        assert torch.equal(one, other)


@EXAMPLES
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_outputs_loss_and_gradients_are_bit_identical(example: Example, train: bool) -> None:
    """foundation 1."""
    module, args = example.make()
    reference = copy.deepcopy(module)
    insert(module, args)
    assert_identical(run(module, args, train), run(reference, args, train))
    assert_identical(
        [module.state_dict()[name] for name in reference.state_dict()], list(reference.state_dict().values())
    )


@EXAMPLES
def test_eval_without_gradients_is_bit_identical(example: Example) -> None:
    """foundation 1: TransformerEncoder's fast path stays on."""
    module, args = example.make()
    module.eval()
    with torch.no_grad():
        before = module(*args)
        region = insert(module, args)
        assert_identical(module(*args), before)
    assert region.remove() is module


@EXAMPLES
def test_off_again_after_quantizing_is_bit_identical(example: Example) -> None:
    """foundation 1."""
    module, args = example.make()
    reference = copy.deepcopy(module)
    region = calibrated(module, *args)
    with torch.no_grad():
        module.eval()(*args)
    region.set_state("off")
    assert_identical(run(module, args, train=False), run(reference, args, train=False))


@EXAMPLES
def test_float_state_dict_keys_are_unchanged(example: Example) -> None:
    """foundation 1: the only new keys are below the region's name."""
    module, args = example.make()
    before = list(module.state_dict())
    insert(module, args)
    after = list(module.state_dict())
    assert [key for key in after if not key.startswith(REGION_NAME)] == before


@EXAMPLES
def test_remove_gives_the_float_module_back(example: Example) -> None:
    """foundation 1."""
    module, args = example.make()
    reference = copy.deepcopy(module)
    region = calibrated(module, *args)
    assert region.remove() is module
    assert module.__dict__.keys() == reference.__dict__.keys()
    assert list(module.state_dict()) == list(reference.state_dict())
    assert_identical(run(module, args, train=False), run(reference, args, train=False))


@EXAMPLES
def test_observing_changes_nothing_but_the_decomposition(example: Example) -> None:
    """foundation 1: attention runs as separate ops, everything else is the same."""
    module, args = example.make()
    module.eval()
    region = insert(module, args)
    with torch.no_grad():
        before = leaves(module(*args))
        with region.state("observe"):
            after = leaves(module(*args))
    for one, other in zip(after, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@EXAMPLES
def test_quantizing_changes_the_outputs_and_is_repeatable(example: Example) -> None:
    module, args = example.make()
    module.eval()
    with torch.no_grad():
        before = leaves(module(*args))
        region = calibrated(module, *args)
        once, again = leaves(module(*args)), leaves(module(*args))
    assert region.unplanned == {}
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)
    assert any(not torch.equal(one, other) for one, other in zip(once, before, strict=True))
    for one, other in zip(once, before, strict=True):
        assert (one - other).norm() < 0.3 * other.norm()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@EXAMPLES
def test_copies_are_independent(example: Example, copier: Any) -> None:
    """foundation 1: train one of the two."""
    module, args = example.make()
    calibrated(module, *args)
    module.eval()
    with torch.no_grad():
        before = module(*args)
    other = copier(module)
    with torch.no_grad():
        assert_identical(other(*args), before)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    run(other, args, train=True)
    optimizer.step()
    with torch.no_grad():
        assert_identical(module.eval()(*args), before)
        assert any(not torch.equal(a, b) for a, b in zip(leaves(other.eval()(*args)), leaves(before), strict=True))
    shared = {t.data_ptr() for t in (*module.parameters(), *module.buffers()) if t.numel()}
    assert not shared & {t.data_ptr() for t in (*other.parameters(), *other.buffers()) if t.numel()}


@EXAMPLES
def test_state_dict_round_trip_restores_the_outputs(example: Example) -> None:
    """foundation 1: through torch.save and the restricted unpickler."""
    module, args = example.make()
    calibrated(module, *args)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh, _ = example.make(seed=1)
    region = insert(fresh, args)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert region.is_calibrated
    region.set_state("quantize")
    with torch.no_grad():
        assert_identical(fresh.eval()(*args), module.eval()(*args))


def test_insertion_leaves_modes_buffers_and_random_state_alone() -> None:
    """foundation 1."""
    module, args = ZOO["resnet"].make()
    module.layers[0].eval()  # type: ignore[index]
    reference = copy.deepcopy(module)
    random_state = torch.get_rng_state()
    versions = [b._version for b in module.buffers()]
    insert(module, args)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_identical(list(module.buffers())[: len(versions)], list(reference.buffers()))
    modes = [m.training for name, m in module.named_modules() if REGION_NAME not in name]
    assert modes == [m.training for m in reference.modules()]


def test_insertion_that_fails_leaves_the_module_alone() -> None:
    module = ResNet()
    before = dict(module.__dict__)
    with pytest.raises(Exception, match="ResNet on the example batch in eval mode failed"):
        insert(module, (torch.randn(1, 2, 3),))
    assert module.__dict__.keys() == before.keys()


def test_patched_forward_is_wrapped_and_given_back() -> None:
    """design 3: an already patched instance forward must not be bypassed."""
    module = nn.Linear(2, 2)
    original = module.forward
    module.forward = lambda x: original(x) + 1  # type: ignore[method-assign]
    patched = module.__dict__["forward"]
    x = torch.randn(3, 2)
    expected = original(x) + 1
    region = insert(module, (x,))
    assert torch.equal(module(x), expected)
    assert [op.kind for op in region.graph.ops] == ["linear", "add"]
    region.remove()
    assert module.__dict__["forward"] is patched


def test_forward_patched_after_insertion_is_not_lost_silently() -> None:
    module = nn.Linear(2, 2)
    region = insert(module, (torch.ones(1, 2),))
    inner = module.forward
    module.forward = lambda x: inner(x)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="patched again"):
        region.remove()


def test_shallow_copy_is_refused() -> None:
    """design 3: it would run the original's weights."""
    module = nn.Linear(2, 2)
    insert(module, (torch.ones(1, 2),))
    with pytest.raises(RuntimeError, match=r"copy\.deepcopy"):
        copy.copy(module)(torch.ones(1, 2))


def test_second_insertion_is_refused() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    insert(module, (torch.ones(1, 2),))
    with pytest.raises(ValueError, match="already has fake-quants"):
        insert(module, (torch.ones(1, 2),))
    with pytest.raises(ValueError, match="contains quantized regions"):
        insert(nn.Sequential(module), (torch.ones(1, 2),))


def test_region_inside_a_running_region_is_refused() -> None:
    inner = nn.Linear(2, 2)

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return inner(x) + 1

    outer, x = Outer(), torch.ones(1, 2)
    inner_region = calibrated(inner, x, state="off")
    calibrated(outer, x)
    inner_region.set_state("quantize")
    with pytest.raises(RuntimeError, match="called inside another one"):
        outer(x)


def test_looks_like_a_forward_to_inspection() -> None:
    """design 3: lightning compares code objects, torch.export matches argument names."""
    import inspect

    module = ResNet()
    insert(module, (torch.randn(2, 1, 8, 8),))
    assert module.forward.__code__ is ResNet.forward.__code__
    assert list(inspect.signature(module.forward).parameters) == ["x"]
