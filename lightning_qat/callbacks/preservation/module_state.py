"""What the steps of a module can change beside its weights, and putting it back: attributes, metrics, parameters.

``validation_step`` of real modules appends to lists, keeps the last output, updates metrics and momentum encoders. A
pass over data in between must leave all of that as it was.
"""

from __future__ import annotations

import collections
import itertools
import random
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric, MetricCollection

from lightning_qat.callbacks.trainer.messages import rank_zero_warn
from lightning_qat.quantization.modules.module_walk import has_lazy_tensors, modules_outside_regions

_OF_MODULES = frozenset(nn.Module().__dict__)
_CONTAINERS = (list, dict, set, collections.deque)
_FIXED = frozenset({bool, int, float, str, bytes, complex, range, type(None), types.FunctionType, types.MethodType})
"""Types of most attributes."""
_RANDOM = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
_SCANNED = 10_000
"""The members of larger containers are not looked into: datasets have long lists of files."""
_LARGE = 2**28
"""Bytes. An attribute that holds more is taken for data, of which there need not be room for a copy."""
Restore = Callable[[], None]


@contextmanager
def preserved_attributes(module: nn.Module) -> Iterator[None]:
    """Put back the plain attributes of every submodule on exit, with the contents of lists, dicts and tensors.

    This covers the state of torchmetrics. Parameters, buffers and hooks are not attributes in this sense, and regions
    are left out: an analysis restores them itself.

    Not copied are tensors and arrays in attributes that hold more than 256 MiB of them: they are taken for data, which
    no step writes to. If one does write to such a tensor, a warning says so; writing to such an array goes unnoticed.
    Of lists and dicts with more than 10000 members, only the members are put back, not what is inside of these.
    Lazy layers that have not seen an input yet keep what they learn from it.
    """
    owners = [m for m in modules_outside_regions(module) if not has_lazy_tensors(m)]
    with _restored(_attributes_of(m, _OF_MODULES, contents=True) for m in owners):
        yield


@contextmanager
def preserved_loader_state(loaders: Iterable[Any]) -> Iterator[None]:
    """Put back attributes and random generators of loaders, their samplers and their datasets on exit.

    The attributes of a datamodule are put back too. Contents of large lists and of tensors are not: they are the data.
    """
    found: dict[int, Any] = {}
    pending = list(loaders)
    while pending:
        owner = pending.pop()
        if owner is None or id(owner) in found or not hasattr(owner, "__dict__"):
            continue
        found[id(owner)] = owner
        pending += [owner.__dict__.get(name) for name in ("sampler", "batch_sampler", "dataset", "collate_fn")]
    with _restored(_attributes_of(owner, frozenset({"_iterator"}), contents=False) for owner in found.values()):
        yield


def shared_data(module: nn.Module) -> dict[int, Tensor | np.ndarray[Any, Any]]:
    """Return, by ``id``, the values in a module's attributes that copies share with it.

    These are arrays that cannot be written to, and all tensors and arrays in attributes that hold more than 256 MiB;
    but no parameter or buffer, which may stand in an attribute too (``self.weights = list(self.parameters())``).
    """
    own = {id(tensor) for tensor in itertools.chain(module.parameters(), module.buffers())}
    found: dict[int, Tensor | np.ndarray[Any, Any]] = {}
    for owner in modules_outside_regions(module):
        for name, value in vars(owner).items() if not isinstance(owner, Metric) else ():
            held = [] if name in _OF_MODULES else [one for one in _held(value) if id(one) not in own]
            changing = [one for one in held if _can_change(one)]
            found |= {id(one): one for one in changing if _bytes(changing) > _LARGE}
            found |= {id(one): one for one in held if isinstance(one, np.ndarray) and not _can_change(one)}
    return found


@contextmanager
def _restored(restores: Iterable[Restore]) -> Iterator[None]:
    """Collect what to put back, and put it back on exit."""
    collected = list(restores)
    try:
        yield
    finally:
        _run(collected)


def _attributes_of(owner: Any, skip: frozenset[str], contents: bool) -> Restore:
    before = {name: value for name, value in owner.__dict__.items() if name not in skip}
    inner: list[Restore] = []
    for name, value in before.items():
        if _is_fixed(value):
            continue
        held = [one for one in _held(value) if _can_change(one)] if contents and not isinstance(owner, Metric) else []
        is_data = _bytes(held) > _LARGE  # the state of a metric is never
        if is_data:
            inner.append(_watched(f"{type(owner).__name__}.{name}", held))
        if (restore_inside := _state_of(value, contents and not is_data)) is not None:
            inner.append(restore_inside)

    def restore() -> None:
        for name in [name for name in owner.__dict__ if name not in skip and name not in before]:
            del owner.__dict__[name]
        owner.__dict__.update(before)
        _run(inner)

    return restore


def _state_of(value: Any, contents: bool) -> Restore | None:
    """Return a function that puts the inside of a value back, for values that can be changed from inside."""
    if _is_fixed(value) or isinstance(value, np.generic):
        return None
    if isinstance(value, _RANDOM):
        return _random(value)
    if isinstance(value, Tensor):
        return _tensor(value) if contents else None
    if isinstance(value, np.ndarray):
        return _array(value) if contents else None
    if isinstance(value, nn.Module):  # those that are not submodules may be the module itself, or hold it
        return _metric(value) if contents and isinstance(value, (Metric, MetricCollection)) else None
    if isinstance(value, (*_CONTAINERS, tuple)):
        return _container(value, contents)
    return _attributes_of(value, frozenset(), contents) if _is_data(value) else None


def _is_fixed(value: Any) -> bool:
    """Whether there is nothing in a value that could be changed from inside, as in most attributes."""
    return type(value) in _FIXED or (type(value) is tuple and all(type(member) in _FIXED for member in value))


def _held(value: Any, depth: int = 5) -> Iterator[Tensor | np.ndarray[Any, Any]]:
    """The tensors and arrays inside a value, but for parameters."""
    if _is_fixed(value) or isinstance(value, nn.Parameter):
        return
    if isinstance(value, (Tensor, np.ndarray)):
        yield value
    elif depth and isinstance(value, (*_CONTAINERS, tuple)):
        members = value.values() if isinstance(value, dict) else value
        for member in members if len(value) <= _SCANNED else ():
            yield from _held(member, depth - 1)
    elif depth and not isinstance(value, nn.Module) and (isinstance(value, Dataset) or _is_data(value)):
        for member in vars(value).values() if hasattr(value, "__dict__") else ():
            yield from _held(member, depth - 1)


def _bytes(values: Iterable[Tensor | np.ndarray[Any, Any]]) -> int:
    return sum(value.nbytes for value in values)


def _can_change(value: Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether a step may write to it; a file that is mapped into memory for reading may be larger than the memory."""
    return not (value.requires_grad or value.is_meta) if isinstance(value, Tensor) else bool(value.flags.writeable)


def _watched(name: str, held: list[Tensor | np.ndarray[Any, Any]]) -> Restore:
    """Warn if data that was not copied has been written to; torch counts the writes to a tensor."""
    versions = [(t, t._version) for t in held if isinstance(t, Tensor) and not t.is_inference()]
    size = _bytes(held) / 2**20

    def warn() -> None:
        if any(tensor._version != version for tensor, version in versions):
            rank_zero_warn(
                f"a step writes to {name}, which holds {size:.0f} MiB: too much to be copied and put back after "
                "batches that are run for an analysis, so their traces stay in it. Make it a buffer "
                "(register_buffer): buffers are put back whatever their size."
            )

    return warn


def _random(value: Any) -> Restore | None:
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
    return None


def _tensor(value: Tensor) -> Restore | None:
    if not _can_change(value):
        return None
    content = value.detach().clone()

    def restore() -> None:
        if not torch.equal(value, content):
            with torch.no_grad(), torch.inference_mode(value.is_inference()):
                value.copy_(content)

    return restore


def _array(value: np.ndarray[Any, Any]) -> Restore | None:
    if not _can_change(value):
        return None
    content = value.copy()

    def restore() -> None:
        if value.flags.writeable:
            value[...] = content

    return restore


def _metric(value: nn.Module) -> Restore:
    return partial(_run, [_attributes_of(m, _OF_MODULES, contents=True) for m in value.modules()])


def _container(value: Any, contents: bool) -> Restore | None:
    if not contents and len(value) > _SCANNED:
        return None
    items = dict(value) if isinstance(value, dict) else list(value)
    members = () if len(items) > _SCANNED else items.values() if isinstance(items, dict) else items
    nested = [r for member in members if (r := _state_of(member, contents)) is not None]
    can_change = not isinstance(value, tuple)
    if not nested and not can_change:
        return None

    def restore() -> None:
        if can_change:
            value.clear()
            (value.update if isinstance(value, (dict, set)) else value.extend)(items)
        _run(nested)

    return restore


def _is_data(value: Any, depth: int = 5) -> bool:
    """Whether an object holds only data: no lock, no connection, nothing that another thread may use."""
    if type(value) in _FIXED or isinstance(value, (Tensor, np.ndarray, np.generic, *_RANDOM)):
        return True
    if depth == 0 or isinstance(value, (type, types.ModuleType)):
        return False
    if isinstance(value, (*_CONTAINERS, tuple)):
        members = value.values() if isinstance(value, dict) else value
        return all(_is_data(member, depth - 1) for member in itertools.islice(members, _SCANNED))
    if not hasattr(value, "__dict__") or type(value).__module__.partition(".")[0] in ("torch", "lightning"):
        return False
    return all(_is_data(member, depth - 1) for member in vars(value).values())


def _run(restores: Iterable[Restore]) -> None:
    for restore in restores:
        restore()


def _ignore(value: object) -> None:
    """Drop a result."""
