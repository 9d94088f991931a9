"""Tensors inside nested arguments are counted and replaced in one order."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from types import MappingProxyType
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.quantization.modules.tensor_leaves import call_leaves, map_call_leaves

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Inner:
    scale: Any
    name: str = "x"


@dataclasses.dataclass
class Outer:
    """Cannot be rebuilt by its constructor."""

    inner: Any
    values: Any
    made: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        assert isinstance(self.inner, (Inner, Tensor))
        self.made = torch.tensor(-1.0)


def test_dataclasses_are_replaced_too() -> None:
    """Also frozen and nested ones, and fields that the constructor does not take; the originals stay."""
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    outer = Outer(Inner(a), [b, "text"])
    made = outer.made
    (new, last), _ = map_call_leaves((outer, c), {}, lambda index, tensor: tensor * 10 + index)
    assert type(new) is Outer
    assert type(new.inner) is Inner
    assert [t.flatten()[0].item() for t in (new.inner.scale, new.values[0], new.made, last)] == [10.0, 11.0, -8.0, 13.0]
    assert (new.inner.name, new.values[1]) == ("x", "text")
    assert (outer.inner.scale, outer.values[0], outer.made) == (a, b, made)
    assert outer.inner.scale is a


def test_what_holds_no_replaced_tensor_stays_the_same_object() -> None:
    a, b = torch.ones(1), torch.ones(1)
    untouched = [Inner(a), {"k": (a, slice(a, None))}, Pair(a, 1), OrderedDict(x=a), torch.Size([1, 2]), range(3)]
    args, kwargs = map_call_leaves((*untouched, b), {"out": a}, lambda index, tensor: b if tensor is b else tensor)
    assert all(new is old for new, old in zip(args, untouched, strict=False))
    assert kwargs["out"] is a


def test_types_of_containers_stay() -> None:
    value = (
        Pair(torch.ones(1), 2),
        OrderedDict(a=torch.ones(1)),
        MappingProxyType({"a": torch.ones(1)}),
        [torch.ones(1)],
    )
    (pair, ordered, proxy, items), _ = map_call_leaves(value, {}, lambda index, tensor: tensor + index)
    assert (type(pair), type(ordered), type(items)) == (Pair, OrderedDict, list)
    assert [float(t) for t in (pair.first, ordered["a"], proxy["a"], items[0])] == [1.0, 2.0, 3.0, 4.0]


LEAVES = st.builds(lambda n: torch.full((1,), float(n)), st.integers(0, 9)) | st.integers() | st.none()
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=2)
        | st.builds(Inner, inner)
        | st.builds(lambda a, b: slice(a, b), inner, inner)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=8,
)


@given(st.lists(NESTED, max_size=3), st.dictionaries(st.sampled_from(["z", "input", "out"]), NESTED))
def test_leaves_are_numbered_as_they_are_counted(args: list[Any], kwargs: dict[str, Any]) -> None:
    met: list[tuple[int, Tensor]] = []

    def replace(index: int, tensor: Tensor) -> Tensor:
        met.append((index, tensor))
        return tensor + 100

    new_args, new_kwargs = map_call_leaves(tuple(args), kwargs, replace)
    before = call_leaves(tuple(args), kwargs)
    assert [index for index, _ in met] == list(range(len(before)))
    assert all(tensor is old for (_, tensor), old in zip(met, before, strict=True))
    assert [float(t) for t in call_leaves(new_args, new_kwargs)] == [float(t) + 100 for t in before]
