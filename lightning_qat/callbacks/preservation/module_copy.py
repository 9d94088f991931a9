"""Copying any module, also one whose steps have run: they keep results with a gradient history, locks, connections."""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType, ModuleType
from typing import Any, TypeVar

from torch import nn

from lightning_qat.callbacks.preservation.module_state import shared_data
from lightning_qat.callbacks.preservation.rebinding import rebind
from lightning_qat.quantization.modules.module_walk import modules_outside_regions
from lightning_qat.quantization.modules.tensor_leaves import leaves

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_OF_MODULES = frozenset(nn.Module().__dict__)


def copied_module(module: ModuleT, memo: dict[int, Any] | None = None) -> ModuleT:
    """Return a deep copy of a module. Results that it keeps (``self.last_logits``) are copied without gradient history.

    Pruning and the older ``weight_norm`` keep such a result as well: the weight that the next forward computes anew.
    What cannot be copied in attributes and hooks (locks, files, generators) is shared with the copy. So are data:
    read-only arrays, and attributes that hold more than 256 MiB. A function in an attribute that refers to the module,
    such as a lambda, is bound to the copy.

    Args:
        module: what to copy.
        memo: as of :func:`copy.deepcopy`, to copy other objects along with the module; empty so far.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> layer.last = layer(torch.ones(1, 2))
        >>> torch.equal(copied_module(layer).last, layer.last)
        True
    """
    memo = {} if memo is None else memo
    values = shared_data(module) | _values_only(module)
    memo.update(values)
    try:
        copied = copy.deepcopy(module, memo)
    except Exception:
        shared = _not_copyable(module, values)
        if not shared:
            raise
        memo.clear()  # of half a copy
        memo.update(values | shared)
        copied = copy.deepcopy(module, memo)
        memo_of_copies = {key: value for key, value in memo.items() if key not in shared}
    else:
        memo_of_copies = memo
    rebind(copied, module, memo_of_copies)
    return copied


def _values_only(module: nn.Module) -> dict[int, Any]:
    """Copies of the tensors with a gradient history, by the number of the original."""
    kept = (tensor for part in module.modules() for tensor in leaves(vars(part)))
    return {id(tensor): tensor.detach().clone() for tensor in kept if not tensor.is_leaf}


def _not_copyable(module: nn.Module, values: dict[int, Any]) -> dict[int, Any]:
    """The parts of attributes and of hooks that cannot be copied (locks, files, records of a profiler), by number."""
    known = values | {id(part): part for part in module.modules()}  # each is looked into once, by itself
    found: dict[int, Any] = {}
    for part in modules_outside_regions(module):  # a region holds its target, and nothing that cannot be copied
        for name, value in _copied_state(part).items():
            if name not in _OF_MODULES or name.endswith("_hooks"):
                _look_into(value, known, found, set())
    return found


def _look_into(value: Any, known: dict[int, Any], found: dict[int, Any], seen: set[int]) -> None:
    """Add the smallest parts of a value that cannot be copied."""
    if id(value) in seen or id(value) in known or _is_copyable(value, known | found):
        return
    seen.add(id(value))
    for part in _parts(value):
        _look_into(part, known, found, seen)
    if not _is_copyable(value, known | found):
        found[id(value)] = value


def _is_copyable(value: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, memo)
    except Exception:
        return False
    return True


def _copied_state(part: nn.Module) -> dict[str, Any]:
    """The attributes that a copy of a module takes over: a LightningModule leaves the Trainer out."""
    state = part.__getstate__() if hasattr(part, "__getstate__") else vars(part)
    return state if isinstance(state, dict) else vars(part)


def _parts(value: Any) -> list[Any]:
    """What a container, an object, a bound method or a ``functools.partial`` is made of."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__]
    is_object = hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType))
    return list(vars(value).values()) if is_object else []
