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
        memo.clear()  # of half a copy
        shared = _not_copyable(module, values)
        if not shared:
            raise
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
    # holds what was copied so far, so that nothing is copied again along with what it is a part of
    memo = values | {id(part): part for part in module.modules()}  # each is looked into once, by itself
    found: dict[int, Any] = {}
    for part in modules_outside_regions(module):  # a region holds its target, and nothing that cannot be copied
        for name, value in _copied_state(part).items():
            if (name not in _OF_MODULES or name.endswith("_hooks")) and not _is_copyable(value, memo):
                for piece in _pieces(value, memo):
                    if not _is_copyable(piece, memo):
                        found[id(piece)] = memo[id(piece)] = piece
    return found


def _pieces(value: Any, memo: dict[int, Any]) -> list[Any]:
    """All that a value is made of and that was not copied, parts before wholes; first what has no parts.

    Of objects that refer to each other, each is a part of the other: neither may count as not copyable for a lock that
    the other holds.
    """
    pieces: dict[int, Any] = {}  # also keeps them alive, so that no number is used twice
    wholes: list[Any] = []

    def look_into(piece: Any) -> None:
        if id(piece) in pieces or id(piece) in memo:
            return
        pieces[id(piece)] = piece
        if parts := _parts(piece):
            for part in parts:
                look_into(part)
            wholes.append(piece)

    look_into(value)
    is_whole = {id(whole) for whole in wholes}
    return [piece for number, piece in pieces.items() if number not in is_whole] + wholes


def _is_copyable(value: Any, memo: dict[int, Any]) -> bool:
    """Whether a value can be copied; if so, its copy is in the memo."""
    before = len(memo)
    try:
        copy.deepcopy(value, memo)
    except Exception:
        while len(memo) > before:  # half copies
            memo.popitem()
        return False
    return True


def _copied_state(part: nn.Module) -> dict[str, Any]:
    """The attributes that a copy of a module takes over: a LightningModule leaves the Trainer out."""
    state = part.__getstate__() if hasattr(part, "__getstate__") else vars(part)
    return state if isinstance(state, dict) else vars(part)


def _parts(value: Any) -> list[Any]:
    """What a container, an object (also one with slots), a bound method or a ``functools.partial`` is made of."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, (type, ModuleType)):
        return []
    return [*getattr(value, "__dict__", {}).values(), *_in_slots(value)]


def _in_slots(value: Any) -> list[Any]:
    declared = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for slots in declared for name in ([slots] if isinstance(slots, str) else slots)]
    return [getattr(value, name) for name in names if hasattr(value, name)]
