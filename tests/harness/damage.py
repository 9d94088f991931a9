"""Damage for files and for the values in them: what a reader may meet, one fault at a time.

``damaged_values`` changes plain data, ``damaged_bytes`` the bytes of a file. Both are complete and in a fixed order:
no case depends on chance.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.quantization.errors import ConfigurationError

DEEP = 10_000
REPLACEMENTS: dict[str, Any] = {
    "none": None,
    "nan": math.nan,
    "inf": math.inf,
    "zero": 0,
    "minus one": -1,
    "fraction": -0.5,
    "large": 1e200,
    "huge": 10**5000,
    "true": True,
    "text": "x",
    "list": [],
    "mapping": {},
    "wrapped": [{"x": [1]}],
    "escape": "\x1b[31m\r\n\x00",
}
"""Values that stand in the place of another one."""


def leaves(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value in plain data, also of lists and mappings.

    Of a list, and of a mapping whose values are all alike, only the first two.
    """
    if place:
        yield place
    items = list(data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ())
    for key, value in items[:2] if isinstance(data, list) or _is_uniform(data) else items:
        yield from leaves(value, (*place, key))


def _is_uniform(data: Any) -> bool:
    return (
        isinstance(data, dict) and len({str(sorted(v)) if isinstance(v, dict) else id(v) for v in data.values()}) == 1
    )


def nested(levels: int = DEEP) -> list[Any]:
    """Return a list in a list in a list ..."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def damaged_values(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield a name and a damaged copy: every value replaced by others, every key dropped, a key added.

    Args:
        data: plain data, as JSON or a checkpoint holds it.
    """
    for place in leaves(data):
        for name, value in REPLACEMENTS.items():
            yield f"{place} {name}", _changed(data, place, lambda holder, key, v=value: holder.__setitem__(key, v))
        yield f"{place} dropped", _changed(data, place, lambda holder, key: holder.__delitem__(key))
        if isinstance(_at(data, place), dict):
            yield f"{place} added", _changed(data, place, lambda holder, key: holder[key].update(unknown=1))
    yield "nested", _nested_leaf(data)
    for name, value in REPLACEMENTS.items():
        yield f"whole {name}", value


def damaged_bytes(content: bytes, places: int = 12) -> Iterator[tuple[str, bytes]]:
    """Yield a name and damaged content: cut off, overwritten, in another encoding, and no such file at all.

    Args:
        content: of the file.
        places: how many places are cut and overwritten, evenly over the file.
    """
    for number in range(places):
        place = len(content) * number // places
        yield f"cut at {place}", content[:place]
        yield f"overwritten at {place}", content[:place] + b"\xff\x00\xfe" + content[place + 3 :]
        yield f"flipped at {place}", content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
    yield "space", b" \n"
    yield "zeros", bytes(len(content))
    yield "binary", bytes(range(256)) * 4
    yield "zip", b"PK\x03\x04" + content
    yield "nested list", b"[" * DEEP + b"]" * DEEP
    yield "nested mapping", b'{"a":' * DEEP + b"1" + b"}" * DEEP
    yield "long number", b'{"version": ' + b"9" * 5000 + b"}"
    for encoding in ("utf-16", "utf-32", "cp037"):
        yield encoding, content.decode("utf-8", "replace").encode(encoding, "replace")


def read_or_refused(read: Callable[[], Any], what: str) -> Any:
    """Call a reader. It returns, or raises an error of the package whose message is one sentence.

    Args:
        read: the call.
        what: the case, for the message of a failure.

    Returns:
        What it returned, or the error.
    """
    try:
        return read()
    except (ConfigurationError, MisconfigurationException) as error:
        refusal = error
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__}: {str(error)[:300]}")
    assert is_one_sentence(str(refusal)), (what, str(refusal))
    return refusal


def is_one_sentence(message: str) -> bool:
    """Whether a message is one printable line of reasonable length with an end, and does not advise to use pickle."""
    ends = message.endswith((".", "?"))
    return message.isprintable() and ends and len(message) < 800 and "weights_only=False" not in message


def _at(data: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        data = data[key]
    return data


def _changed(data: Any, place: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    changed = copy.deepcopy(data)
    change(_at(changed, place[:-1]), place[-1])
    return changed


def _nested_leaf(data: Any) -> Any:
    """The first value that is no list or mapping, replaced by a list in a list in a list ..."""
    place = next(p for p in leaves(data) if not isinstance(_at(data, p), (dict, list)))
    return _changed(data, place, lambda holder, key: holder.__setitem__(key, nested()))
