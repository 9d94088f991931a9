"""Copying any module, also one whose steps have run: they keep results with a gradient history, locks, connections."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from lightning_qat.callbacks.preservation.module_state import shared_data
from lightning_qat.callbacks.preservation.rebinding import rebind
from lightning_qat.quantization.modules.tensor_leaves import leaves

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_OF_MODULES = frozenset(nn.Module().__dict__)


def copied_module(module: ModuleT, memo: dict[int, Any] | None = None) -> ModuleT:
    """Return a deep copy; of results that a module keeps (``self.last_logits``), only the values are copied.

    Pruning and the older ``weight_norm`` keep such a result as well: the weight that the next forward computes anew.
    Attributes that cannot be copied (locks, connections, generators) are shared with the copy, and so are data: arrays
    that cannot be written to, and what attributes hold that have more than 256 MiB. Functions in attributes that
    keep the module, such as a lambda, are bound to the copy.

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
    """The attributes that cannot be copied, by their number."""
    found: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if name not in _OF_MODULES and not isinstance(value, nn.Module):  # a region knows its target
                try:
                    copy.deepcopy(value, dict(values))
                except Exception:
                    found[id(value)] = value
    return found
