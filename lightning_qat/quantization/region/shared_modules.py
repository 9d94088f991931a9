"""Splitting modules that are registered at several places, before fake-quant is inserted.

Inserted fake-quant never shares an activation's scale between two calls: ops are identified by where they are called,
not by the module they run in. What a shared module does share is its *name*. The second place of a module registered as
``block1.act`` and ``block2.act`` shows as ``block1.act@1`` in plans and reports, and no override can call it
``block2.act``. Splitting gives every place a module of its own, which shares the tensors.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType

import torch
from torch import nn

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.module_walk import has_lazy_tensors
from lightning_qat.quantization.region.region import find_regions

_TIED = frozenset({"_parameters", "_buffers", "_non_persistent_buffers_set"})
_HOOKS = frozenset(nn.Module().__dict__) - _TIED  # one more hook on a copy is not one on all


@dataclass(frozen=True)
class SharedModule:
    """A module that was registered at several places.

    Args:
        path: the first place; the module itself stays there.
        copies: the other places.
        module_type: its class name.
        reason: why it is still shared; empty where it was split.
    """

    path: str
    copies: tuple[str, ...]
    module_type: str
    reason: str = ""


@dataclass(frozen=True)
class SplitReport:
    """The result of :func:`split_shared_modules`.

    Args:
        split: modules whose every place has a module of its own now.
        kept: modules that are still shared, with the reason.
    """

    split: tuple[SharedModule, ...]
    kept: tuple[SharedModule, ...]


def split_shared_modules(module: nn.Module) -> SplitReport:
    """Give every place where a submodule is registered a module of its own, in place. Nothing changes numerically.

    Parameters and buffers stay tied: the copies share them (and everything that replaces them, such as after
    ``.to()``), so that gradients, batch norm statistics, optimizers and ``state_dict`` are as before. Each copy has its
    own train/eval mode. Call it on the float model, after its weights are initialised and before ``insert`` or the
    Trainer; pruning and parametrizing come before it too.

    A module that is registered once and called several times, as an activation ``self.act`` used twice or a position
    embedding called in a loop, is left as it is: each of its calls has activation scales of its own anyway. A weight
    has one scale, however often it is used, because it is one tensor when deployed.

    Args:
        module: the float model, or a part of it.

    Returns:
        The modules that were split, and those that could not be, each with the reason.

    Raises:
        ConfigurationError: fake-quant was inserted already.

    Example:
        >>> act = nn.ReLU()
        >>> model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
        >>> split_shared_modules(model).split
        (SharedModule(path='1', copies=('3',), module_type='ReLU', reason=''),)
        >>> model[1] is model[3]
        False
    """
    if find_regions(module):
        raise ConfigurationError("split_shared_modules: fake-quant is inserted already; split before inserting it.")
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for parent, name, path in _registrations(module, "", set()):
        child = parent._modules[name]
        places.setdefault(id(child), []).append((parent, name, path))
    split, kept = [], []
    for first, *others in places.values():
        original = first[0]._modules[first[1]]
        if original is None or not (others or original is module):
            continue
        found = [path for _, _, path in (first, *others)]
        reason = _obstacle(original)
        if reason:
            kept.append(SharedModule(found[0], tuple(found[1:]), type(original).__name__, reason))
            continue
        split.append(SharedModule(found[0], tuple(found[1:]), type(original).__name__))
        for parent, name, _ in others:
            parent._modules[name] = _twin(original)
    return SplitReport(tuple(split), tuple(kept))


def _registrations(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[nn.Module, str, str]]:
    """Every place where a submodule is registered; the inside of a module at its first place only.

    Inner ones come first, so that what is shared inside a shared module is split before that module is copied.
    """
    seen.add(id(module))
    for name, child in module._modules.items():
        if child is None:
            continue
        path = f"{prefix}.{name}" if prefix else name
        if id(child) not in seen:
            yield from _registrations(child, path, seen)
        yield module, name, path


def _twin(module: nn.Module) -> nn.Module:
    """A module of the same class with the same tensors, attributes and hooks, and twins of its children."""
    twin = module.__class__.__new__(module.__class__)
    for name, value in module.__dict__.items():
        twin.__dict__[name] = value.copy() if name in _HOOKS and isinstance(value, dict) else value
    twin.__dict__["_modules"] = {
        name: None if child is None else _twin(child) for name, child in module._modules.items()
    }
    return twin


def _obstacle(module: nn.Module) -> str:
    """Why a copy might not do what the module does."""
    if _contains_itself(module, frozenset()):
        return "it contains itself"
    for path, part in module.named_modules():
        where = f"{path} ({type(part).__name__})" if path else type(part).__name__
        if isinstance(part, torch.jit.ScriptModule):
            return f"{where} is a script module, which cannot be copied without its tensors"
        if has_lazy_tensors(part):
            return f"{where} has no parameters before its first batch: run one first"
        written = _written_attributes(part)
        if written:
            return f"{where} assigns {written[0]} in its forward, and all its places share that value"
    return ""


def _contains_itself(module: nn.Module, above: frozenset[int]) -> bool:
    above |= {id(module)}
    return any(id(child) in above or _contains_itself(child, above) for child in module.children())


def _written_attributes(module: nn.Module) -> list[str]:
    """Attributes, other than parameters and buffers, that the forward of a class outside torch assigns."""
    if type(module).__module__.partition(".")[0] == "torch":
        return []
    tensors = {*module._parameters, *module._buffers}
    pending, seen, written = ["forward"], set(), []
    while pending:
        name = pending.pop()
        function = inspect.getattr_static(type(module), name, None)
        if name in seen or not isinstance(function, FunctionType) or function is vars(nn.Module).get(name):
            continue
        seen.add(name)
        for code in _codes(inspect.unwrap(function).__code__):
            written += [f"attribute {n}" for n in _stored(code) if n not in tensors]
            written += ["attributes with setattr()"] if "setattr" in code.co_names else []
            pending += code.co_names
    return written


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _stored(code: CodeType) -> list[str]:
    return [str(i.argval) for i in dis.get_instructions(code) if i.opname in ("STORE_ATTR", "DELETE_ATTR")]
