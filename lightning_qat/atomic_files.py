"""Files that no reader ever sees half of, and values as JSON can hold them. ``reporting`` and ``export`` write so."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file (text as UTF-8) and move it into place: a reader sees the old or the new one, never half of it.

    Args:
        path: where; its folder is made if missing.
        content: what the file holds afterwards.
    """
    path = Path(path)
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def json_value(value: Any) -> Any:
    """Turn a value into what JSON can hold; numbers that are not finite become the words ``inf``, ``-inf``, ``nan``.

    Example:
        >>> json_value({"a": (1.5, float("inf"))})
        {'a': [1.5, 'inf']}
    """
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: json_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): json_value(v) for k, v in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [json_value(v) for v in value]
    return value
