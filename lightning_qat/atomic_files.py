"""Files that no reader ever sees half of, and values as JSON can hold them. ``reporting`` and ``export`` write so."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import secrets
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

if sys.platform != "win32":
    import fcntl

_UNFINISHED = re.compile(r"\.lightning_qat-[0-9a-f]{12}\.unfinished")
"""Names of files that are being written."""
_LONGEST_WRITE = 3600.0
"""Seconds after which an unfinished file is left over, whatever its lock says: not every file system has locks."""


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
        _remove_left_over(path.parent)
        try:
            _write(path, encoded(content))
        except FileNotFoundError:  # a process without sight of our lock took it for left over
            _write(path, encoded(content))
    except OSError as error:
        raise NotWrittenError.of(path, error) from error
    return path


def encoded(content: str | bytes) -> bytes:
    """Return text as UTF-8; of a surrogate, which UTF-8 does not have, its escape."""
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".lightning_qat-{secrets.token_hex(6)}.unfinished")
    try:
        with open(temporary, "xb") as held:
            if not _lock(held):
                held.close()  # nothing to hold, and Windows moves no open file
            with open(temporary, "wb") as file:  # a full disk may be noticed only when it is closed
                file.write(content)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_left_over(folder: Path) -> None:
    """Remove the unfinished files of processes that do not run any more. A living one holds a lock on its file."""
    with os.scandir(folder) as entries:
        found = [Path(entry.path) for entry in entries if _UNFINISHED.fullmatch(entry.name)]
    for path in found:
        try:
            with open(path, "r+b") as file:
                if _lock(file) or time.time() - os.fstat(file.fileno()).st_mtime > _LONGEST_WRITE:
                    path.unlink()
        except OSError:  # it is finished by now, or somebody else's: none of our business
            continue


def _lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed, or until the process ends; False if that cannot be done."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
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
