"""Reading single values, and data of unknown shape but limited depth and size."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

from lightning_qat.quantization.errors import ConfigurationError, shown

_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""Numbers that are not finite are words in JSON."""
_LARGEST = 2**64
_MOST_LEVELS = 64
_MOST_VALUES = 10_000_000


class UnreadableValueError(ConfigurationError):
    """A value that does not fit its schema.

    Args:
        problem: what is wrong, such as ``must be a number, not 'x'``.
        place: where, from the outside to the inside: ``.name``, ``[3]``, ``['key']``.
    """

    def __init__(self, problem: str, place: str = "") -> None:
        super().__init__(f"{place.lstrip('.') or 'it'} {problem}")
        self.problem = problem
        self.place = place

    def inside(self, place: str) -> UnreadableValueError:
        """Return the same error as seen from the value around."""
        return UnreadableValueError(self.problem, place + self.place)


def must(wanted: str, value: Any, place: str = "") -> UnreadableValueError:
    """Return the error for a value that must be another one."""
    return UnreadableValueError(f"must be {wanted}, not {shown(value)}", place)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise must("a text", value)
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not -_LARGEST <= value <= _LARGEST:
        raise must("a whole number", value)
    return value


def _number(value: Any) -> float:
    if type(value) is float:
        return value
    if type(value) is int and -_LARGEST <= value <= _LARGEST:
        return float(value)
    if type(value) is str and value in _WORDS:
        return _WORDS[value]
    raise must("a number", value)


def _truth(value: Any) -> bool:
    if type(value) is not bool:
        raise must("true or false", value)
    return value


def _nothing(value: Any) -> None:
    if value is not None:
        raise must("empty", value)


def plain(value: Any) -> Any:
    """Any plain data; those that nobody wrote on purpose are refused: endless ones, and a thousand levels."""
    stack, seen = [(value, 0)], 0
    while stack:
        item, level = stack.pop()
        seen += 1
        if isinstance(item, (dict, list, tuple)):
            if level >= _MOST_LEVELS or seen > _MOST_VALUES:
                raise UnreadableValueError(f"is nested more than {_MOST_LEVELS} levels deep, or holds far too much")
            stack += [(inner, level + 1) for inner in (item.values() if isinstance(item, dict) else item)]
        elif type(item) is int and not -_LARGEST <= item <= _LARGEST:
            raise UnreadableValueError(f"holds {shown(item)}")
    return value


SIMPLE: dict[Any, Callable[[Any], Any]] = {
    str: _text,
    int: _whole,
    float: _number,
    bool: _truth,
    None: _nothing,
    types.NoneType: _nothing,
    Any: plain,
}
"""What reads each kind of value that holds no others that are checked."""
