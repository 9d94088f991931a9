"""A copied module is one: functions that its attributes keep call the copy, or the check says that they do not (C4)."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.callbacks.pipeline_check import PipelineCheck
from lightning_qat.callbacks.preservation.module_copy import copied_module
from lightning_qat.callbacks.preservation.rebinding import references_to
from lightning_qat.callbacks.zero_lr_finetune import ZeroLRFinetune
from tests.harness.small_digits import Digits, pretrained
from tests.harness.trainers import qat_trainer

Net = Any


class Holder:
    """An object that keeps a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


def _default(net: Net) -> Callable[[Tensor], Tensor]:
    return lambda x, *, head=net.head: head(x)


def _nested(net: Net) -> Callable[[Tensor], Tensor]:
    inner = lambda x: net.head(x)  # noqa: E731
    return lambda x: inner(x)


def _hooked(net: Net) -> Callable[[Tensor], Tensor]:
    net.body.register_forward_hook(lambda module, args, result: net.head(args[0]))
    return net.body  # type: ignore[no-any-return]


def _weak(net: Net) -> Callable[[Tensor], Tensor]:
    net.reference = weakref.ref(net.head)
    return types.MethodType(lambda self, x: self.reference()(x), net)


def _compiled(net: Net) -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda x: net.head(x), backend="eager")


KINDS: dict[str, Callable[[Net], Any]] = {
    "lambda": lambda net: lambda x: net.head(x),
    "weight in a lambda": lambda net: (lambda weight: lambda x: x @ weight.T)(net.head.weight),
    "default value": _default,
    "nested": _nested,
    "dict": lambda net: {"head": lambda x: net.head(x)},
    "list in a dict": lambda net: {"heads": [lambda x: net.head(x)]},
    "partial": lambda net: functools.partial(lambda scale, x: scale * net.head(x), 1.0),
    "partial of a module": lambda net: functools.partial(net.head),
    "bound method": lambda net: net.head.forward,
    "method of a function": lambda net: types.MethodType(lambda self, x: net.head(x), net),
    "object": lambda net: Holder(lambda x: net.head(x)),
    "list of modules": lambda net: [net.head],
    "weak reference": _weak,
    "weak method": lambda net: weakref.WeakMethod(net.head.forward),
    "proxy": lambda net: weakref.proxy(net.head),
    "forward hook": _hooked,
    "compiled function": _compiled,
    "compiled module": lambda net: torch.compile(net.head, backend="eager"),
}


class Keeping(nn.Module):
    """Calls whatever it keeps."""

    def __init__(self, kind: Callable[[Net], Any]) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(3, 2, bias=False), nn.Identity()
        self.kept = kind(self)

    def forward(self, x: Tensor) -> Tensor:
        kept: Any = self.kept
        while not callable(kept) or isinstance(kept, (Holder, weakref.WeakMethod)):
            if isinstance(kept, dict):
                kept = next(iter(kept.values()))
            elif isinstance(kept, list):
                kept = kept[0]
            else:
                kept = kept.function if isinstance(kept, Holder) else kept()
        result: Tensor = kept(x)
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_attribute_keeps_belongs_to_the_copy(kind: str) -> None:
    """And the original keeps what it had, bit for bit and object for object."""
    model, x = Keeping(KINDS[kind]), torch.ones(1, 3)
    kept, before, weight = model.kept, model(x).detach(), model.head.weight.detach().clone()
    copy = copied_module(model)
    with torch.no_grad():
        copy.head.weight.add_(1.0)
    copied = copy(x)
    assert torch.allclose(copied, before + 3.0)
    copied.sum().backward()
    assert copy.head.weight.grad is not None
    assert model.head.weight.grad is None
    assert model.kept is kept
    assert torch.equal(model(x), before)
    assert torch.equal(model.head.weight, weight)
    assert references_to(model, copy) == []
    again = copied_module(copy)
    assert torch.equal(again(x), copied)


def test_functions_that_keep_nothing_are_shared() -> None:
    """Nothing is made anew that has not to be."""
    counted: list[int] = []
    function = lambda x: counted.append(1) or x  # noqa: E731
    model = Keeping(lambda net: function)
    assert copied_module(model).kept is function


class Unnormalized(Digits):
    """Training lacks the normalization, as in the source's story; its layers stand in a dict of functions."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(normalized_in_training=False, **kwargs)
        self.blocks = {"first": lambda x: self.bn1(self.conv1(x)), "second": lambda x: self.bn2(self.conv2(x))}

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks["second"](self.blocks["first"](x).relu()).relu()
        logits: Tensor = self.head(h.flatten(1))
        return logits


HIDDEN: dict[str, Digits] = {}


class Elsewhere(Digits):
    """Its function finds the module outside of it, where no copy can be put in its place."""

    def forward(self, x: Tensor) -> Tensor:
        module = HIDDEN["module"]
        h = module.bn1(module.conv1(x)).relu()
        logits: Tensor = self.head(self.bn2(self.conv2(h)).relu().flatten(1))
        return logits


@pytest.mark.parametrize("check", [ZeroLRFinetune(batches=20), PipelineCheck(batches=20)], ids=["zero_lr", "ladder"])
def test_pipeline_in_closures_is_convicted_like_the_plain_one(check: Any, tmp_path: Path) -> None:
    model = Unnormalized()
    model.load_state_dict(pretrained().state_dict())
    with pytest.warns(UserWarning, match="pipeline misaligned"):
        qat_trainer(tmp_path, check, max_steps=1, limit_val_batches=1.0).fit(model)


def test_copy_that_calls_the_original_is_no_verdict(tmp_path: Path) -> None:
    """The weights of the original stay as they are meanwhile."""
    model = HIDDEN["module"] = Elsewhere(lr=0.0)
    model.load_state_dict(pretrained().state_dict())
    check = ZeroLRFinetune(batches=4)
    with pytest.warns(UserWarning, match="cannot tell: the check trains a deep copy.*calls the original module"):
        qat_trainer(tmp_path, check, max_steps=1, limit_val_batches=1.0).fit(model)
    HIDDEN.clear()
