"""Activation checkpointing repeats the same quantized function, and moves no observer twice (foundation 4)."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lightning_qat.quantization.region.region import Region
from tests.quantization.models import calibrated

KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
WAYS = pytest.mark.parametrize("way", ["blocks", "nested", "modules", "sequential"])


class Net(nn.Module):
    """Blocks with a helper and a reused activation, run under checkpointing in one of several ways."""

    def __init__(self, way: str, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.last = nn.Linear(8, 2)
        self.way = way
        self.reentrant = reentrant
        self.checkpointing = True

    def scaled(self, x: Tensor) -> Tensor:
        return x * 1.5

    def block(self, x: Tensor, k: int) -> Tensor:
        return x + self.scaled(torch.tanh(self.blocks[k](self.scaled(x))))

    def pair(self, x: Tensor) -> Tensor:
        return self.run(self.block, self.run(self.block, x, 0), 1)

    def run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.checkpointing:
            return checkpoint(function, *args, use_reentrant=self.reentrant)  # type: ignore[no-any-return]
        return function(*args)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        if self.way == "nested":
            x = self.run(self.pair, x)
        elif self.way == "modules":
            x = self.run(self.blocks[1], self.run(self.blocks[0], x))
        elif self.way == "sequential":
            layers = nn.Sequential(*self.blocks)
            x = checkpoint_sequential(layers, 2, x, use_reentrant=self.reentrant) if self.checkpointing else layers(x)
        else:
            for k in range(3):
                x = self.run(self.block, x, k)
        return self.last(F.gelu(x))


def pair_of_models(way: str, reentrant: bool, x: Tensor) -> list[tuple[Net, Region]]:
    """The same calibrated model with and without checkpointing."""
    torch.manual_seed(0)
    module = Net(way, reentrant)
    plain = copy.deepcopy(module)
    plain.checkpointing = False
    return [(m, calibrated(m, x)) for m in (module, plain)]


def step(module: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    module.zero_grad(set_to_none=True)
    out = module(x)
    out.square().sum().backward()
    return out.detach(), [p.grad for p in module.parameters() if p.grad is not None]


def assert_same_scales(one: Region, other: Region) -> None:
    for a, b in zip(one.points.values(), other.points.values(), strict=True):
        assert torch.equal(a.scale, b.scale)


@KINDS
@WAYS
@pytest.mark.parametrize("updates", [(), ("weight", "activation")], ids=["fixed", "updated"])
def test_outputs_gradients_and_scales_equal_those_without_checkpointing(
    way: str, reentrant: bool, updates: tuple[str, ...]
) -> None:
    """foundation 4: bit for bit, in several steps."""
    x = torch.randn(6, 4)
    (module, region), (plain, plain_region) = pair_of_models(way, reentrant, x)
    assert len(region.points) == len(plain_region.points) > 8
    for r in (region, plain_region):
        r.set_state("quantize", updates=updates)  # type: ignore[arg-type]
    for factor in (1.0, 1.3):
        out, gradients = step(module, x * factor)
        expected, expected_gradients = step(plain, x * factor)
        assert torch.equal(out, expected)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert torch.equal(gradient, expected_gradient)
        assert_same_scales(region, plain_region)
    assert region.unplanned == {}


@KINDS
@WAYS
def test_observers_are_not_moved_by_the_repetition(way: str, reentrant: bool) -> None:
    """foundation 4."""
    x = torch.randn(6, 4)
    (module, region), _ = pair_of_models(way, reentrant, x)
    region.scales.reset_statistics()
    with region.state("observe"):
        step(module, x)
    assert {f.statistics.batches for f in region.points.values()} == {1}
    taps: list[str] = []
    with region.tap(lambda name, *_: taps.append(name)):
        step(module, x)
    assert sorted(taps) == sorted(region.points)


@KINDS
def test_backward_repeats_the_forward_even_if_the_state_changed_in_between(reentrant: bool) -> None:
    """foundation 4: the loss was computed quantized, so its gradient must be, too."""
    x = torch.randn(6, 4)
    (module, region), _ = pair_of_models("blocks", reentrant, x)
    _, expected = step(module, x)
    module.zero_grad(set_to_none=True)
    with region.state("quantize"):
        loss = module(x).square().sum()
    with region.state("off"):
        loss.backward()
    for p, gradient in zip((p for p in module.parameters() if p.grad is not None), expected, strict=True):
        assert torch.equal(p.grad, gradient)  # type: ignore[arg-type]


@KINDS
def test_region_that_is_off_leaves_checkpointing_alone(reentrant: bool) -> None:
    """foundation 1."""
    x = torch.randn(6, 4)
    (module, region), _ = pair_of_models("blocks", reentrant, x)
    float_module = copy.deepcopy(module)
    float_module._quantization.remove()  # type: ignore[operator, union-attr]
    region.set_state("off")
    for one, other in zip(step(module, x)[1], step(float_module, x)[1], strict=True):
        assert torch.equal(one, other)


def test_torch_is_put_back_as_it_was() -> None:
    before = torch_checkpoint.CheckpointFunction, torch_checkpoint._checkpoint_without_reentrant_generator
    x = torch.randn(6, 4)
    (module, _), _ = pair_of_models("blocks", True, x)
    step(module, x)
    with pytest.raises(RuntimeError):
        module(x[:, :3])
    assert (torch_checkpoint.CheckpointFunction, torch_checkpoint._checkpoint_without_reentrant_generator) == before


def test_checkpointing_in_other_threads_is_left_alone() -> None:
    x = torch.randn(6, 4)
    (module, _), _ = pair_of_models("blocks", False, x)
    weight = torch.randn(4, 4, requires_grad=True)
    entered, done = threading.Event(), threading.Event()
    gradients: list[Tensor] = []

    def elsewhere() -> None:
        entered.wait(10)
        checkpoint(lambda w: torch.tanh(w).sum(), weight, use_reentrant=False).backward()
        gradients.append(weight.grad)  # type: ignore[arg-type]
        done.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()

    def wait(*_: object) -> None:
        entered.set()
        done.wait(10)

    handle = module.first.register_forward_hook(wait)
    step(module, x)
    handle.remove()
    thread.join()
    torch.testing.assert_close(gradients[0], 1 - torch.tanh(weight.detach()) ** 2)


class TrainingOnly(nn.Module):
    """Checkpoints in train mode only, through two branches of the code or through a decorated forward."""

    def __init__(self, reentrant: bool, way: str) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.block = {"branch": Branch, "decorator": Decorated}[way](reentrant)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(torch.tanh(self.first(x))))  # type: ignore[no-any-return]


class Branch(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.reentrant = reentrant
        self.checkpointing = True

    def inner(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.gelu(layer(x) * 0.5)
        return x

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.checkpointing:
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]
        return self.inner(x)


def checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(self: Branch, *args: Tensor) -> Tensor:
        if self.training and self.checkpointing:
            function = functools.partial(forward, self)
            return checkpoint(function, *args, use_reentrant=self.reentrant)  # type: ignore[no-any-return]
        return forward(self, *args)

    return wrapper


class Decorated(Branch):
    @checkpointed
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@KINDS
@pytest.mark.parametrize("way", ["branch", "decorator"])
def test_checkpointing_in_training_only_shares_the_quantizers_of_evaluation(way: str, reentrant: bool) -> None:
    """foundation 4: calibrated in eval mode, where nothing is checkpointed."""
    x = torch.randn(6, 4)
    module = TrainingOnly(reentrant, way)
    plain = copy.deepcopy(module)
    plain.block.checkpointing = False
    regions = [calibrated(m, x) for m in (module, plain)]
    assert list(regions[0].points) == list(regions[1].points)
    for m in (module, plain):
        m.train()
    out, gradients = step(module, x)
    expected, expected_gradients = step(plain, x)
    assert torch.equal(out, expected)
    assert len(gradients) == len(expected_gradients) == 8
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient, expected_gradient)
    assert regions[0].unplanned == {}


@KINDS
def test_checkpointing_that_a_decorator_starts_after_insertion_changes_nothing(reentrant: bool) -> None:
    """foundation 4: ``model.gradient_checkpointing_enable()`` long after the insertion."""
    x = torch.randn(6, 4)
    module = TrainingOnly(reentrant, "decorator")
    module.block.checkpointing = False
    region = calibrated(module, x)
    module.train()
    expected = step(module, x)
    module.block.checkpointing = True
    out, gradients = step(module, x)
    assert torch.equal(out, expected[0])
    for gradient, expected_gradient in zip(gradients, expected[1], strict=True):
        assert torch.equal(gradient, expected_gradient)
    assert region.unplanned == {}
