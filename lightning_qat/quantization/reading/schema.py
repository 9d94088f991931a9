"""Reading plain values into typed ones: the annotations of a dataclass are the schema of its file.

What is read may be damaged, or be made to do harm. So every value is checked before it is used, the first one that does
not fit is named with its place, and no value can make the reader recurse without end.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from lightning_qat.quantization.errors import ConfigurationError, near_names, shown
from lightning_qat.quantization.reading.checks import Check, one_of
from lightning_qat.quantization.reading.plain_values import SIMPLE, UnreadableValueError, must, plain

T = TypeVar("T")
_Reader = Callable[[Any], Any]


def read_as(kind: type[T], value: Any, ignore_unknown: bool = False) -> T:
    """Read plain data as a typed value.

    Dataclasses are read from mappings of their fields, tuples from lists. A number may be one of the words ``nan``,
    ``inf`` and ``-inf``. ``Any`` stands for plain data of limited depth and size.

    Args:
        kind: a dataclass or another annotation.
        value: what a file or checkpoint holds.
        ignore_unknown: leave out keys that the dataclass (not those inside it) does not have.

    Raises:
        UnreadableValueError: a value does not fit; the message says which, and what it must be.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Point:
        ...     name: str
        ...     scale: Annotated[float, Check(lambda value: value > 0, "a positive number")]
        >>> read_as(tuple[Point, ...], [{"name": "a", "scale": 1}])
        (Point(name='a', scale=1.0),)
        >>> try:
        ...     read_as(tuple[Point, ...], [{"name": "a", "scale": -1}])
        ... except UnreadableValueError as error:
        ...     print(error)
        [0].scale must be a positive number, not -1
    """
    of: Any = kind
    reader = _fields_reader(of, True) if ignore_unknown else _reader(of)
    return cast(T, reader(value))


@cache  # checkpoints hold thousands of values of the same few kinds
def _reader(kind: Any) -> _Reader:
    """Return the function that reads a value of a kind."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in SIMPLE:
        return SIMPLE[kind]
    if origin is Annotated:
        return _checked(_reader(arguments[0]), [a for a in arguments[1:] if isinstance(a, Check)])
    if origin is Literal:
        return _checked(plain, [one_of(kind)])
    if origin in (Union, types.UnionType):
        return _either(arguments)
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return _items(_reader(arguments[0]), origin)
    if origin is tuple:
        return _exactly(tuple(map(_reader, arguments)))
    if origin in (dict, Mapping):
        return _values(_reader(arguments[1]))
    if dataclasses.is_dataclass(kind):
        return _fields_reader(cast(Any, kind), False)
    if isinstance(kind, type):
        return _instance(kind)
    raise TypeError(f"no reader for {kind}")  # a mistake in a dataclass, not in a file


def _checked(read: _Reader, checks: list[Check]) -> _Reader:
    def reader(value: Any) -> Any:
        found = read(value)
        for check in checks:
            if not check.holds(found):
                raise must(check.wanted, value)
        return found

    return reader


def _either(kinds: tuple[Any, ...]) -> _Reader:
    """None first: it is what a field with a default mostly holds. The error is that of the last kind."""
    others = [kind for kind in kinds if kind is not types.NoneType]
    readers, is_optional = [_reader(kind) for kind in others], len(others) < len(kinds)

    def reader(value: Any) -> Any:
        if value is None and is_optional:
            return None
        for read in readers[:-1]:
            try:
                return read(value)
            except UnreadableValueError:
                continue
        return readers[-1](value)

    return reader


def _items(read: _Reader, make: Any) -> _Reader:
    def reader(value: Any) -> Any:
        if type(value) not in (list, tuple):
            raise must("a list", value)
        index = 0
        found = []
        try:
            for index, item in enumerate(value):  # noqa: B007
                found.append(read(item))
        except UnreadableValueError as error:
            raise error.inside(f"[{index}]") from None
        return found if make is list else tuple(found)

    return reader


def _exactly(readers: tuple[_Reader, ...]) -> _Reader:
    def reader(value: Any) -> tuple[Any, ...]:
        if type(value) not in (list, tuple) or len(value) != len(readers):
            raise must(f"a list of {len(readers)}", value)
        index = 0
        found = []
        try:
            for index, read in enumerate(readers):
                found.append(read(value[index]))
        except UnreadableValueError as error:
            raise error.inside(f"[{index}]") from None
        return tuple(found)

    return reader


def _values(read: _Reader) -> _Reader:
    def reader(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise must("a mapping", value)
        key: Any = None
        found = {}
        try:
            for key, item in value.items():
                if type(key) is not str:
                    raise must("a text", key)
                found[key] = read(item)
        except UnreadableValueError as error:
            raise error.inside(f"[{shown(key)}]") from None
        return found

    return reader


@cache
def _fields_reader(cls: Any, ignore_unknown: bool) -> _Reader:
    hints = get_type_hints(cls, include_extras=True)
    fields = [f for f in dataclasses.fields(cls) if f.init]
    readers = {f.name: _reader(hints[f.name]) for f in fields}
    has_default = (dataclasses.MISSING, dataclasses.MISSING)
    required = [f.name for f in fields if (f.default, f.default_factory) == has_default]

    def reader(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise must(f"a mapping with the keys {', '.join(required)}", value)
        given = {}
        name: Any = ""
        try:
            for name, item in value.items():
                read = readers.get(name)
                if read is not None:
                    given[name] = read(item)
                elif not ignore_unknown:
                    raise UnreadableValueError(_unknown(name, readers))
        except UnreadableValueError as error:
            raise error.inside(f".{name}" if name in readers else "") from None
        for name in required:
            if name not in given:
                raise UnreadableValueError("is missing", f".{name}")
        try:
            return cls(**given)
        except UnreadableValueError:
            raise
        except ConfigurationError as error:  # by the dataclass itself
            raise UnreadableValueError(f"does not hold together ({str(error).rstrip('.')})") from error

    return reader


def _unknown(name: Any, known: Mapping[str, Any]) -> str:
    near = near_names(name, known) if isinstance(name, str) and len(name) < 100 else []
    return f"has a key that is not known, {shown(name)}" + (f" (is {near[0]} meant?)" if near else "")


def _instance(kind: type) -> _Reader:
    def reader(value: Any) -> Any:
        if not isinstance(value, kind):
            raise must(f"a {kind.__name__}", value)
        return value

    return reader
