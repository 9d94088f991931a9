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


class Row:
    """Counts how often its kind is copied."""

    copies = 0

    def __init__(self, number: int, **members: Any) -> None:
        self.values = [number, torch.full((2,), float(number))]
        self.__dict__.update(members)

    def __reduce_ex__(self, protocol: Any) -> Any:
        Row.copies += 1
        return super().__reduce_ex__(protocol)


class SlottedRow(Row):
    __slots__ = ("owner",)


def a_chain(count: int) -> Holder:
    """Each refers to the next, the last one to the first; there is a lock at the far end."""
    rows = [Row(i) for i in range(count)]
    for row, following in zip(rows, [*rows[1:], rows[0]], strict=True):
        row.following = [following]  # type: ignore[attr-defined]
    rows[-1].odd = threading.Lock()  # type: ignore[attr-defined]
    return Holder(rows=rows[:1], first=rows[0])


def a_dataset(count: int) -> Holder:
    return Holder(rows=[Row(i) for i in range(count)], odd=threading.Lock())


def with_owner(count: int) -> Holder:
    """Each row refers to its dataset, which has two locks: no row may count as not copyable for one of them."""
    owner = Holder(rows=[], first_odd=threading.Lock())
    owner.rows.extend(Row(i, owner=owner) for i in range(count))  # type: ignore[attr-defined]
    owner.odd = threading.Lock()  # type: ignore[attr-defined]
    return owner


def with_owner_in_slot(count: int) -> Holder:
    owner = Holder(rows=[SlottedRow(i) for i in range(count)], odd=threading.Lock())
    for row in owner.rows:  # type: ignore[attr-defined]
        row.owner = owner
    return owner


def with_locks(count: int) -> Holder:
    return Holder(rows=[Row(i, odd=threading.Lock()) for i in range(count)])


SHAPES: dict[str, Callable[[int], Holder]] = {
    "chain": a_chain,
    "dataset": a_dataset,
    "owner": with_owner,
    "owner in a slot": with_owner_in_slot,
    "a lock in each": with_locks,
}


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_copying_grows_linearly_with_the_number_of_objects(shape: str) -> None:
    """A datamodule with a lock and many rows (siblings: a chain, rows that refer to their dataset, many locks)."""
    count = 60
    module = nn.Linear(2, 2)
    module.data = SHAPES[shape](count)
    module.again = {"data": module.data}  # a second attribute that holds the same
    Row.copies = 0
    copied = copied_module(module)
    # the module, each of the two attributes as a whole, each row by itself, and the module at last
    assert Row.copies <= 5 * count
    assert copied.again["data"] is copied.data is not module.data
    pairs = [(copied.data.rows, module.data.rows)]
    if shape == "chain":
        assert copied.data.first is copied.data.rows[0]
        for _ in range(count - 1):
            pairs.append((pairs[-1][0][0].following, pairs[-1][1][0].following))
        assert pairs[-1][0][0].following[0] is copied.data.first
        assert pairs[-1][0][0].odd is pairs[-1][1][0].odd
    rows = [pair for copies, originals in pairs for pair in zip(copies, originals, strict=True)]
    assert len(rows) == count
    for copy, original in rows:
        assert copy is not original
        assert copy.values is not original.values
        assert copy.values[0] == original.values[0]
        assert torch.equal(copy.values[1], original.values[1])
        assert copy.values[1].data_ptr() != original.values[1].data_ptr()
        assert getattr(copy, "odd", None) is getattr(original, "odd", None)
        if hasattr(original, "owner"):
            assert copy.owner is copied.data
    assert getattr(copied.data, "odd", None) is getattr(module.data, "odd", None)


def test_an_object_that_fails_half_way_is_shared_and_not_half_copied() -> None:
    """Its ``__setstate__`` fails when its copy already exists; what it holds beside that is copied where it is used."""

    class Fails(Holder):
        def __setstate__(self, state: dict[str, Any]) -> None:
            raise RuntimeError("no copies of me")

    module, row = nn.Linear(2, 2), Row(1)
    module.data = Holder(fails=Fails(row=row), row=row, odd=threading.Lock())
    module.fails = [module.data.fails, module.data]
    copied = copied_module(module)
    assert copied.data.fails is copied.fails[0] is module.data.fails
    assert copied.fails[1] is copied.data is not module.data
    assert copied.data.row is not row
    assert torch.equal(copied.data.row.values[1], row.values[1])
