"""Walking the tensors inside nested arguments and outputs, in one fixed order."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})
"""Types of most arguments of an op; looked up first, as this runs for every op of a quantized forward."""


def named_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield ``(path, tensor)`` of every tensor in nested tuples, lists, mappings, dataclasses and slices.

    Example:
        >>> import torch
        >>> [path for path, _ in named_leaves({"map": [torch.ones(1), torch.ones(1)], "n": 3})]
        ['map.0', 'map.1']
    """
    if type(value) in _PLAIN:
        return
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_leaves(item, _join(path, str(key)))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from named_leaves(item, _join(path, str(index)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from named_leaves(getattr(value, field.name, None), _join(path, field.name))
    elif isinstance(value, slice):
        for name in ("start", "stop", "step"):
            yield from named_leaves(getattr(value, name), _join(path, name))


def leaves(value: Any) -> list[Tensor]:
    """Return every tensor in a nested structure, in the order of :func:`named_leaves`."""
    if isinstance(value, Tensor):
        return [value]
    if _is_plain(value):
        return []
    return [tensor for _, tensor in named_leaves(value)]


def call_leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensor leaves of a call: positional arguments first, then keyword arguments by name."""
    found: list[Tensor] = []
    for argument in args:
        if isinstance(argument, Tensor):
            found.append(argument)
        else:
            found.extend(leaves(argument))
    for name in sorted(kwargs):
        found.extend(leaves(kwargs[name]))
    return found


def map_call_leaves(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    replace: Callable[[int, Tensor], Tensor],
    last: int | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Rebuild the arguments of a call with ``replace(index, tensor)`` for each leaf, numbered as in call_leaves.

    An argument without a replaced tensor stays the same object. Mappings and dataclasses are copied without calling
    their constructor.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        replace: returns the tensor to put into the place of another.
        last: the last index that is replaced, if that is known: arguments behind it need not be looked at.

    Example:
        >>> import torch
        >>> x = torch.ones(1)
        >>> map_call_leaves((x, [x]), {"out": x}, lambda index, tensor: tensor + index)
        ((tensor([1.]), [tensor([2.])]), {'out': tensor([3.])})
    """
    if not kwargs:  # most ops: tensors and numbers only, in loops without a generator
        positions: list[int] = []
        for position, argument in enumerate(args):
            if isinstance(argument, Tensor):
                positions.append(position)
                if len(positions) - 1 == last:
                    break
            elif not _is_plain(argument):
                break
        else:
            last = len(positions) - 1
        if len(positions) - 1 == last:
            operands = list(args)
            for index, position in enumerate(positions):
                operands[position] = replace(index, args[position])
            return tuple(operands), {}
    counter = itertools.count()

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return replace(next(counter), value)
        if _is_plain(value):
            return value
        if isinstance(value, (tuple, list)):
            items = [visit(item) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            if isinstance(value, list):
                return items
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, Mapping):
            return _with_items(value, {key: visit(item) for key, item in value.items()})
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
            return _with_items(value, {name: visit(getattr(value, name)) for name in names})
        if isinstance(value, slice):
            before = (value.start, value.stop, value.step)
            return value if (after := visit(before)) is before else slice(*after)
        return value

    new_args = tuple(visit(argument) for argument in args)
    new_kwargs = dict(kwargs)
    for name in sorted(kwargs):
        new_kwargs[name] = visit(kwargs[name])
    return new_args, new_kwargs


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor holds real floating-point values (complex, integer and bool tensors do not)."""
    return tensor.dtype.is_floating_point


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def is_float_name(name: str) -> bool:
    """Whether a name from :func:`dtype_name` is that of a real floating-point type."""
    return name.startswith(("float", "bfloat"))


def _with_items(value: Any, items: dict[Any, Any]) -> Any:
    """A mapping or dataclass with other values; itself if none is another object."""
    is_mapping = isinstance(value, Mapping)
    changed = {k: new for k, new in items.items() if new is not (value[k] if is_mapping else getattr(value, k))}
    if not changed:
        return value
    if is_mapping and not isinstance(value, MutableMapping):
        return items
    new = copy.copy(value)
    for key, item in changed.items():
        if is_mapping:
            new[key] = item
        else:
            object.__setattr__(new, key, item)  # frozen dataclasses too
    return new


def _is_plain(value: Any) -> bool:
    """Whether a value is a number and the like, or a tuple of them such as a stride: quickly, most arguments are."""
    kind = type(value)
    return kind in _PLAIN or (kind is tuple and _PLAIN.issuperset(map(type, value)))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
