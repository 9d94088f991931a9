"""Files that no reader ever sees half of, and values as JSON can hold them. ``reporting`` and ``export`` write so."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_UNFINISHED = re.compile(r"\.lightning_qat-(?P<place>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}\.unfinished")
"""Names of files, and of folders with such files, that are being written: where, by which process."""
_LONGEST_WRITE = 3600.0
"""Seconds after which an unfinished file of another machine is left over."""


class NotWrittenError(OSError):
    """A file that could not be written; the message names the file and the reason."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}."

    @classmethod
    def of(cls, path: str | os.PathLike[str], error: OSError) -> NotWrittenError:
        """Return the error about a file that something went wrong with."""
        return cls(error.errno, error.strerror or str(error), os.fspath(path))


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file (text as UTF-8) and move it into place: a reader sees the old or the new one, never half of it.

    What killed processes have left of such writes in the same folder is removed.

    Args:
        path: where; its folder is made if missing.
        content: what the file holds afterwards. A surrogate, which UTF-8 does not have, is written as ``\\udc80``.

    Raises:
        NotWrittenError: the folder cannot be made, or the file cannot be written.
    """
    path = Path(path)
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(path.parent)
        try:
            _write(path, encoded(content))
        except FileNotFoundError:  # a process elsewhere took it for left over
            _write(path, encoded(content))
    except OSError as error:
        raise NotWrittenError.of(path, error) from error
    return path


def encoded(content: str | bytes) -> bytes:
    """Return text as UTF-8; of a surrogate, which UTF-8 does not have, its escape."""
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content


def unfinished_path(folder: Path) -> Path:
    """Return a free name for a file, or a folder of files, that is moved away when it is complete.

    Args:
        folder: where; :func:`remove_left_over` removes there what a killed process has left.
    """
    return folder / f".lightning_qat-{_place()}-{os.getpid()}-{secrets.token_hex(4)}.unfinished"


def _write(path: Path, content: bytes) -> None:
    temporary = unfinished_path(path.parent)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_left_over(folder: Path) -> None:
    """Remove the unfinished files of processes that do not run any more; those that cannot be asked for, after an hour.

    A lock on the file would also tell, but asking a network file system for one may take forever.

    Args:
        folder: where they are.
    """
    with os.scandir(folder) as entries:
        found = [(Path(entry.path), match) for entry in entries if (match := _UNFINISHED.fullmatch(entry.name))]
    for path, match in found:
        try:
            ended = match["place"] == _place() and not _runs(int(match["process"]))
            if ended or time.time() - path.stat().st_mtime > _LONGEST_WRITE:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        except OSError:  # it is finished by now, or somebody else's: none of our business
            continue


def _place() -> str:
    """A digest of the machine since it was started, and of the container: in it, a number means one process."""
    known = [platform.node()]
    with suppress(OSError):
        known += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(known).encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _runs(process: int) -> bool:
    """Whether a process of this place is alive."""
    if sys.platform == "win32":  # where the question would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


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


def json_text(value: Any) -> str:
    """Return the JSON of :func:`json_value` of a value; it takes a tenth of the time if all numbers are finite.

    Example:
        >>> json_text({"a": (1.5, 2)}), json_text({"a": (1.5, float("inf"))})
        ('{"a": [1.5, 2]}', '{"a": [1.5, "inf"]}')
    """
    try:
        return json.dumps(value, default=_fields, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(json_value(value))


def _fields(value: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(value):
        raise TypeError(type(value).__name__)
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
