"""Capturing what a region is called with, and running it again and again."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_qat.analysis.captured_calls import RepeatableForward, analysis_mode, capture_calls
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.region.insertion import insert


class Awkward(nn.Module):
    """Draws random numbers everywhere, counts, writes into its input and replaces a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        self.count += 1
        self.replaced = self.replaced + 1
        noise = torch.rand(4) + random.random() + float(np.random.rand())
        return self.linear(x) * self.count + noise + self.replaced


def test_repeated_forwards_are_equal_and_leave_inputs_and_buffers() -> None:
    """B2: forwards differ only in what is quantized."""
    model, x = Awkward(), torch.randn(2, 4)
    before, count, replaced = x.clone(), model.count, model.replaced
    with RepeatableForward(model, Call.of(x)) as forward:
        first = forward().clone()
        assert torch.equal(forward(), first)
    assert torch.equal(x, before)
    assert model.count is count
    assert model.replaced is replaced
    assert count == replaced == 0


def test_repeated_forward_restores_after_an_exception() -> None:
    model, x = Awkward(), torch.randn(2, 5)
    before = x.clone()
    with pytest.raises(RuntimeError, match="shapes"), RepeatableForward(model, Call.of(x)) as forward:
        forward()
    assert torch.equal(x, before)
    assert model.count == 0


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.core(self.core(x) + 1).sum()


def test_calls_of_an_inner_target_are_captured_in_order() -> None:
    model, x = Wrapper(), torch.randn(2, 4)
    region = insert(model.core, (x,))
    forward = model.core.__dict__["forward"]
    calls = capture_calls({"": region}, lambda: model(x))[""]
    assert len(calls) == 2
    assert calls[0].args[0] is x
    assert torch.equal(calls[1].args[0], model.core(x) + 1)
    assert model.core.__dict__["forward"] is forward


def test_direct_calls_of_forward_are_captured_and_recursion_counts_once() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, *, depth: int = 2) -> Tensor:
            return self.linear(x) if depth == 0 else self(x, depth=depth - 1)

    model, x = Recursive(), torch.randn(2, 4)
    region = insert(model, (x,))
    calls = capture_calls({"": region}, lambda: model.forward(x, depth=1))[""]
    assert [call.kwargs for call in calls] == [{"depth": 1}]


def test_capturing_restores_forward_after_an_exception() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    region = insert(model, (x,))
    forward = model.__dict__["forward"]

    def fails() -> Any:
        model(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_calls({"": region}, fails)
    assert model.__dict__["forward"] is forward


def test_input_that_the_step_overwrites_is_put_back() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    region, before = insert(model, (x,)), x.clone()

    def step() -> None:
        model(x)
        x.zero_()

    assert torch.equal(capture_calls({"": region}, step)[""][0].args[0], before)


def test_tensor_shared_by_regions_is_as_the_first_call_saw_it() -> None:
    first, second, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(2, 4)
    regions = {"second": insert(second, (x,)), "first": insert(first, (x,))}
    before = x.clone()

    def step() -> None:
        first(x)
        x.mul_(2)
        second(x)
        x.zero_()

    calls = capture_calls(regions, step)
    assert calls["first"][0].args[0] is calls["second"][0].args[0] is x
    assert torch.equal(x, before)


def test_analysis_mode_restores_state_modes_and_random_numbers() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout()), torch.randn(2, 4)
    region = insert(model, (x,))
    region.set_state("off", updates=("weight", "activation"))
    model.train()
    model[1].eval()
    state = torch.get_rng_state()
    with analysis_mode(region):
        torch.rand(3)
        assert region.current_state == "quantize"
        assert region.updates == frozenset()
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert (region.current_state, region.updates) == ("off", {"weight", "activation"})
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
