"""What the steps of a module can change beside its weights, and putting it back: attributes, metrics, parameters.

``validation_step`` of real modules appends to lists, keeps the last output, updates metrics and momentum encoders. A
pass in between must leave all of that as it was.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_qat.quantization.region import Region

_OF_MODULES = frozenset(nn.Module().__dict__)
_CONTAINERS = (list, dict, set, collections.deque)
Restore = Callable[[], None]


@contextmanager
def preserved_attributes(module: nn.Module) -> Iterator[None]:
    """Put back the plain attributes of every submodule on exit, with the contents of lists, dicts and tensors.

    This covers the state of torchmetrics. Parameters, buffers and hooks are not attributes in this sense, and regions
    are left out: what an analysis changes there is its own business.
    """
    inside = {id(m) for r in module.modules() if isinstance(r, Region) for m in r.modules()}
    modules = [m for m in module.modules() if id(m) not in inside]
    with _restored(_attributes_of(m, _OF_MODULES, contents=True) for m in modules):
        yield


@contextmanager
def preserved_loader_state(loaders: Iterable[Any]) -> Iterator[None]:
    """Put back counters and random generators of loaders, their samplers and their datasets on exit."""
    found: dict[int, Any] = {}
    pending = list(loaders)
    while pending:
        owner = pending.pop()
        if owner is None or id(owner) in found or not hasattr(owner, "__dict__"):
            continue
        found[id(owner)] = owner
        pending += [owner.__dict__.get(name) for name in ("sampler", "batch_sampler", "dataset")]
    with _restored(_attributes_of(owner, frozenset({"_iterator"}), contents=False) for owner in found.values()):
        yield


@contextmanager
def preserved_parameters(module: nn.Module) -> Iterator[None]:
    """Put back the values of all parameters on exit: training steps may update a momentum encoder, for example."""
    saved = [(p, p.data, p.detach().clone()) for p in module.parameters()]
    try:
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():  # in this order: the former turns gradients on
            for parameter, data, content in saved:
                if parameter.data_ptr() != data.data_ptr():
                    parameter.data = data
                if not torch.equal(parameter, content):
                    parameter.copy_(content)


@contextmanager
def _restored(restores: Iterable[Restore]) -> Iterator[None]:
    """Collect what to put back, and put it back on exit."""
    collected = list(restores)
    try:
        yield
    finally:
        for restore in collected:
            restore()


def _attributes_of(owner: Any, skip: frozenset[str], contents: bool) -> Restore:
    before = {name: value for name, value in owner.__dict__.items() if name not in skip}
    inner = [r for r in (_state_of(value, contents) for value in before.values()) if r is not None]

    def restore() -> None:
        for name in [name for name in owner.__dict__ if name not in skip and name not in before]:
            del owner.__dict__[name]
        owner.__dict__.update(before)
        for restore_one in inner:
            restore_one()

    return restore


def _state_of(value: Any, contents: bool) -> Restore | None:
    """Return a function that puts the inside of a value back, for values that can be changed from inside."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: _ignore(value.set_state(state))
    if isinstance(value, random.Random):
        python_state = value.getstate()
        return lambda: value.setstate(python_state)
    if isinstance(value, np.random.RandomState):
        legacy_state = value.get_state()
        return lambda: value.set_state(legacy_state)
    if isinstance(value, np.random.Generator):
        numpy_state = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", numpy_state)
    if not contents:
        return None
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, _CONTAINERS):
        return _container(value)
    return None


def _tensor(value: Tensor) -> Restore | None:
    if value.requires_grad or value.is_meta:
        return None
    content = value.detach().clone()

    def restore() -> None:
        if not torch.equal(value, content):
            with torch.no_grad(), torch.inference_mode(value.is_inference()):
                value.copy_(content)

    return restore


def _container(value: Any) -> Restore:
    items = dict(value) if isinstance(value, dict) else list(value)
    members = items.values() if isinstance(items, dict) else items
    nested = [_state_of(m, True) for m in members if isinstance(m, (*_CONTAINERS, Tensor))]

    def restore() -> None:
        value.clear()
        (value.update if isinstance(value, (dict, set)) else value.extend)(items)
        for restore_one in nested:
            if restore_one is not None:
                restore_one()

    return restore


def _ignore(value: object) -> None:
    """Drop a result."""
