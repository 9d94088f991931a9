"""Copies of modules that hold what cannot be copied: it is shared, wherever it stands, and the rest is copied.

The kind is a lock, an open file, a generator, or a profiler's record: in an attribute of the module, of a target of
fake-quants or of an object that it holds, in a list or a dict, in a hook, or beside a reference to the module itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from lightning_qat.callbacks.preservation.module_copy import copied_module
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from tests.harness.classifier import Net

X = torch.randn(4, 1, 8, 8)


class Holder:
    def __init__(self, **members: Any) -> None:
        self.__dict__.update(members)

    def hook(self, *args: Any) -> None:
        """A hook that is a bound method."""


def a_record() -> Any:
    record = record_function("forward")
    record.__enter__()
    record.__exit__(None, None, None)
    return record


ODD: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "file": Path(__file__).open,
    "generator": lambda: (i for i in range(3)),
    "record": a_record,
}
PLACES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "target": lambda net, odd: setattr(net, "odd", odd),
    "submodule": lambda net, odd: setattr(net.head, "odd", odd),
    "containers": lambda net, odd: setattr(net, "odd", {"a": [odd, (odd, 1)]}),
    "object": lambda net, odd: setattr(net, "odd", Holder(odd=odd, model=net)),
    "hook": lambda net, odd: net.conv1.register_forward_hook(partial(lambda odd, *_: None, odd)),
    "bound hook": lambda net, odd: net.conv1.register_forward_pre_hook(Holder(odd=[odd], model=net).hook),
}


@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize("kind", sorted(ODD))
def test_the_rest_is_copied(kind: str, place: str) -> None:
    torch.manual_seed(0)
    net, odd = Net().eval(), ODD[kind]()
    region = insert(net, (X,))
    calibrate(region, [X])
    before = net(X)
    PLACES[place](net, odd)
    try:
        copied = copied_module(net)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert torch.equal(net(X), before)
        assert not torch.equal(copied(X), before)
        if place == "object":
            assert copied.odd is not net.odd
            assert copied.odd.odd is odd or kind == "record"  # of which only the handle is shared
            assert copied.odd.model is copied
        assert not {id(p) for p in net.parameters()} & {id(p) for p in copied.parameters()}
    finally:
        if kind == "file":
            odd.close()


def test_a_module_is_looked_into_once_for_many_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler gives every module hooks that refer to the whole model: trying them must not copy it each time."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    holder = Holder(model=model, lock=threading.Lock())
    for layer in model:
        layer.register_forward_pre_hook(partial(holder.hook, 1))
    copies: list[int] = []
    original = nn.Linear.__reduce_ex__

    def counted(self: nn.Linear, protocol: Any) -> Any:
        copies.append(id(self))
        return original(self, protocol)

    monkeypatch.setattr(nn.Linear, "__reduce_ex__", counted)
    copied = copied_module(model)
    assert len(copied) == 30
    assert len(copies) <= 3 * 30
