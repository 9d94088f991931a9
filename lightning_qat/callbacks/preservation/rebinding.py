"""Functions in the attributes of a copied module that still call the original: they are bound to the copy.

A deep copy shares functions with the original. A lambda that stands in an attribute, or in a dict of them, a hook and
the result of ``torch.compile`` keep the module that they were written in, and a weak reference keeps its target.
"""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_qat.quantization.modules.module_walk import modules_outside_regions

_SCANNED = 10_000
"""The members of larger containers are not looked into."""
_DEPTH = 6
_NOT_LOOKED_INTO = ("torch", "lightning", "lightning_qat", "numpy", "builtins")
_SKIPPED = frozenset({"_trainer", "_fabric", "_parameters", "_buffers", "_modules"})


class NotACopyError(Exception):
    """A copy of a module calls the original, so nothing can be told from it."""


def rebind(module: nn.Module, original: nn.Module, memo: dict[int, Any]) -> None:
    """Bind what the attributes of a deep copy share with the original to the copy, where that is possible.

    Args:
        module: the deep copy.
        original: what was copied.
        memo: that of :func:`copy.deepcopy`.
    """
    rebinding = _Rebinding(original, memo)
    for part in modules_outside_regions(module):
        for name, value in list(vars(part).items()):
            if name not in _SKIPPED and (new := rebinding.of(value)) is not value:
                part.__dict__[name] = new


def references_to(original: nn.Module, module: nn.Module) -> list[str]:
    """Return the attributes of a copy that still lead to the original, as ``path.attribute``."""
    search = _Rebinding(original, {})
    names = {id(part): name for name, part in module.named_modules()}
    return [
        f"{names[id(part)]}.{name}".lstrip(".")
        for part in modules_outside_regions(module)
        for name, value in vars(part).items()
        if name not in _SKIPPED and search.leads_to_original(value)
    ]


@contextmanager
def only_the_copy(module: nn.Module, original: nn.Module) -> Iterator[None]:
    """Run a block of steps of a copy, with backward, in which no part of the original may be called.

    Raises:
        NotACopyError: one was; names the attributes that lead there.
    """
    used: dict[str, None] = {}

    def note(name: str, *_: Any) -> None:
        used[name] = None

    names = {id(part): name for name, part in original.named_modules()}
    handles: list[Any] = [
        part.register_forward_pre_hook(functools.partial(note, names[id(part)] or type(part).__name__))
        for part in modules_outside_regions(original)
    ]
    weights = ((name, p) for name, p in original.named_parameters() if p.requires_grad)
    handles += [p.register_hook(functools.partial(note, name)) for name, p in weights]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if used:
        found = references_to(original, module)
        where = f"through {', '.join(found[:3])}" if found else "through something outside of the module"
        raise NotACopyError(
            f"the check trains a deep copy, and the training step of the copy calls the original module "
            f"({', '.join(list(used)[:3])}), {where}. Nothing that happens to the copy can be seen so. Write it as a "
            "method, or as a submodule, instead of a function that keeps the module."
        )


class _Rebinding:
    """What stands for a value in the copy."""

    def __init__(self, original: nn.Module, memo: dict[int, Any]) -> None:
        tensors = itertools.chain(original.parameters(), original.buffers())
        self._own = {id(value) for value in itertools.chain(original.modules(), tensors)}
        self._memo = memo
        self._copies = {id(value) for value in memo.values()}
        self._done: dict[int, tuple[Any, Any]] = {}  # with the values themselves, so that no other takes their id
        self._cells: dict[int, types.CellType] = {}

    def leads_to_original(self, value: Any, depth: int = _DEPTH, seen: set[int] | None = None) -> bool:
        """Whether a value is a part of the original, or keeps one."""
        seen = set() if seen is None else seen
        if id(value) in self._own:
            return True
        if id(value) in seen or not depth:
            return False
        seen.add(id(value))
        return any(self.leads_to_original(inner, depth - 1, seen) for inner in _inside(value))

    def of(self, value: Any) -> Any:
        """Return the value for the copy: the same, changed from inside if it is a copy, or a new one."""
        if id(value) in self._own:
            return self._memo.get(id(value), value)
        if id(value) in self._done:
            return self._done[id(value)][1]
        self._done[id(value)] = value, value  # of a circle
        if (new := self._rebound(value)) is not value:
            self._done[id(value)] = value, new
        return new

    def _rebound(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            return self._function(value) if self.leads_to_original(value) else value
        if isinstance(value, types.MethodType):
            function, owner = self.of(value.__func__), self.of(value.__self__)
            is_same = function is value.__func__ and owner is value.__self__
            return value if is_same else types.MethodType(function, owner)
        if type(value) is functools.partial:
            function, args, keywords = self.of(value.func), self.of(value.args), self.of(dict(value.keywords))
            is_same = function is value.func and args is value.args and not _differ(keywords, value.keywords)
            return value if is_same else functools.partial(function, *args, **keywords)
        if type(value) in (weakref.ref, weakref.WeakMethod):
            target = value()
            new = self.of(target)
            return value if new is target else type(value)(new)
        if type(value) is tuple:
            members = tuple(map(self.of, value))
            return members if any(a is not b for a, b in zip(members, value, strict=True)) else value
        if id(value) in self._copies:  # what is shared with the original is not written to
            self._change(value)
        return value

    def _change(self, value: Any) -> None:
        inside = value if isinstance(value, dict) else vars(value) if _is_open(value) else None
        if isinstance(value, (list, collections.deque)) and len(value) <= _SCANNED:
            inside = value
        if inside is None or len(inside) > _SCANNED:
            return
        for key, member in list(inside.items() if isinstance(inside, dict) else enumerate(inside)):
            if (new := self.of(member)) is not member:
                inside[key] = new

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        cells = function.__closure__
        closure = tuple(map(self._cell, cells)) if cells is not None else None
        new = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, self.of(function.__defaults__), closure
        )
        self._done[id(function)] = function, new  # before looking inside: it may keep itself
        new.__kwdefaults__ = {name: self.of(default) for name, default in (function.__kwdefaults__ or {}).items()}
        new.__qualname__, new.__doc__, new.__module__ = function.__qualname__, function.__doc__, function.__module__
        for cell, copied in zip(cells or (), closure or (), strict=True):
            if cell is not copied:
                copied.cell_contents = self._content(cell.cell_contents)
        new.__dict__.update({name: self.of(inner) for name, inner in function.__dict__.items()})
        return new

    def _cell(self, cell: types.CellType) -> types.CellType:
        """A new cell where there is something to bind; all others are shared."""
        if not self.leads_to_original(_content_of(cell)):
            return cell
        return self._cells.setdefault(id(cell), types.CellType())

    def _content(self, content: Any) -> Any:
        if isinstance(content, (dict, list, set, collections.deque, nn.Module)) and id(content) not in self._own:
            try:
                return copy.deepcopy(content, self._memo)
            except Exception:  # it stays with the original, which is noticed when it is called
                return content
        return self.of(content)


def _inside(value: Any) -> Iterator[Any]:
    """What a value keeps."""
    if isinstance(value, types.FunctionType):
        yield from map(_content_of, value.__closure__ or ())
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from value.__dict__.values()
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, (dict, list, tuple, set, frozenset, collections.deque)):
        members = value.values() if isinstance(value, dict) else value
        yield from list(members) if len(value) <= _SCANNED else ()
    elif isinstance(value, nn.Module):
        yield from (inner for name, inner in vars(value).items() if name not in ("_trainer", "_fabric"))
    elif _is_open(value):
        yield from list(vars(value).values())


def _is_open(value: Any) -> bool:
    """Whether to look into the attributes of an object."""
    if isinstance(value, (type, types.ModuleType, nn.Module)) or not isinstance(getattr(value, "__dict__", None), dict):
        return False
    return type(value).__module__.partition(".")[0] not in _NOT_LOOKED_INTO


def _content_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return any(one[name] is not other[name] for name in other)
