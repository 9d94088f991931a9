"""Reading files of text, JSON, YAML, csv and tensors. Whatever is wrong with one, the error is one sentence.

Nothing is read with pickle unless the user asks for it.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from lightning_qat.quantization.errors import DamagedFileError
from lightning_qat.quantization.reading.plain_values import UnreadableValueError
from lightning_qat.quantization.reading.schema import read_as

T = TypeVar("T")
_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_UNSAFE_CLASS = re.compile(r"GLOBAL (\S+) was not an allowed global")


class OtherObjectsError(DamagedFileError):
    """A file of tensors that holds objects of other classes, which only pickle could read.

    Args:
        message: the whole sentence.
        class_name: the first of these classes.
    """

    def __init__(self, message: str, class_name: str) -> None:
        super().__init__(message)
        self.class_name = class_name


@dataclass(frozen=True)
class Document:
    """A file to read: where it is, what it should be, and what to do if it is not.

    Args:
        path: the file.
        kind: what it should be, such as ``a fingerprint``.
        remedy: what to do otherwise, such as ``make it again with ...``.
    """

    path: str | os.PathLike[str]
    kind: str
    remedy: str

    def error(self, problem: str) -> DamagedFileError:
        """Return the error for a problem: file, problem and remedy in one sentence."""
        return DamagedFileError(self._sentence(problem))

    def _sentence(self, problem: str) -> str:
        name = os.fspath(self.path)
        return f"{name if name.isprintable() else repr(name)} is not {self.kind}: {problem}; {self.remedy}."

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Turn a value that does not fit, met in a ``with`` block, into the error of this file."""
        try:
            yield
        except UnreadableValueError as error:
            raise self.error(str(error)) from error

    def text(self) -> str:
        """Read the whole file as UTF-8, with or without a byte order mark.

        Raises:
            DamagedFileError: it cannot be read, or is something else.
        """
        return self._decoded(self._bytes())

    def _decoded(self, content: bytes) -> str:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            name = _ENCODINGS.get(content[:2])
            found = f"it is a text in {name}: save it in UTF-8" if name else f"byte {error.start} is no text in UTF-8"
            raise self.error(found) from error

    def _bytes(self) -> bytes:
        try:
            return Path(self.path).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a path that holds a zero byte
            raise self.error(_about_opening(error)) from error

    def json(self) -> Any:
        """Read a file of JSON.

        Raises:
            DamagedFileError: it cannot be read, or is something else.
        """
        text = self.text()
        try:
            return json.loads(text)
        except RecursionError as error:
            raise self.error("it is nested too deeply") from error
        except ValueError as error:
            where = f" (line {error.lineno}, {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
            raise self.error(f"{'it is empty' if not text.strip() else f'it is not JSON{where}'}") from error

    def yaml(self) -> Any:
        """Read a file of YAML: plain data only.

        Raises:
            DamagedFileError: it cannot be read, or is something else.
        """
        text = self.text()
        try:
            return yaml.safe_load(text)
        except RecursionError as error:
            raise self.error("it is nested too deeply") from error
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that does not exist
            raise self.error(f"it is not YAML ({' '.join(str(error).split())[:300]})") from error

    def csv(self, growing: str = "") -> list[dict[str, str]]:
        """Read a csv file with a heading; each row has all columns of the heading.

        Args:
            growing: the first column of a table that grows. If the file has it, a last line without an end is left out:
                a run that fails while it writes leaves one.

        Raises:
            DamagedFileError: it cannot be read, or is something else.
        """
        content = self._bytes()
        if growing and content.removeprefix(codecs.BOM_UTF8).startswith(f"{growing},".encode()):
            content = content[: content.rfind(b"\n") + 1]  # as bytes: the cut may be inside of a character
        text = self._decoded(content)
        try:
            reader = csv.reader(io.StringIO(text, newline=""), strict=True)
            heading = next(reader, [])
            rows = []
            for row in reader:
                if len(row) not in (0, len(heading)):
                    raise self.error(f"line {reader.line_num} has {len(row)} cells, the heading has {len(heading)}")
                rows.append(dict(zip(heading, row, strict=True)) if row else {})
        except csv.Error as error:
            raise self.error(f"it is not csv ({error})") from error
        return [row for row in rows if row]

    def last_epoch(self) -> list[dict[str, str]]:
        """Read a csv file, and of a table that grows by epochs the rows of the last one.

        Raises:
            DamagedFileError: it cannot be read, or is something else.
        """
        rows = self.csv(growing="epoch")
        return [row for row in rows if row.get("epoch") == rows[-1].get("epoch")]

    def tensors(self, weights_only: bool = True) -> Any:
        """Read a file of ``torch.save`` to the CPU.

        Args:
            weights_only: read tensors and primitives only. False uses pickle: only for files that the user trusts.

        Raises:
            OtherObjectsError: it holds objects of other classes.
            DamagedFileError: it cannot be read, or is something else.
        """
        try:
            open(self.path, "rb").close()  # what torch.load says of a damaged file may be an OSError too
        except (OSError, ValueError) as error:
            raise self.error(_about_opening(error)) from error
        try:
            return torch.load(self.path, map_location="cpu", weights_only=weights_only)
        except Exception as error:  # a damaged file may raise whatever its bytes mean
            found = _UNSAFE_CLASS.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if found and weights_only:
                problem = f"it holds an object of {found[1]}, and more than tensors and plain data is not read"
                raise OtherObjectsError(self._sentence(problem), found[1]) from error
            raise self.error(_about_tensors(self.path, error)) from error

    def as_json(self, kind: type[T], ignore_unknown: bool = False) -> T:
        """Read a file of JSON as a typed value, see :func:`~lightning_qat.quantization.reading.schema.read_as`.

        Raises:
            DamagedFileError: it cannot be read, or a value does not fit.
        """
        data = self.json()
        with self.checked():
            return read_as(kind, data, ignore_unknown)


def _about_opening(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a directory"
    return f"it cannot be read ({getattr(error, 'strerror', None) or error})"


def _about_tensors(path: str | os.PathLike[str], error: Exception) -> str:
    """Say why a file of tensors cannot be read. The messages of torch are left out: they advise to use pickle."""
    size = Path(path).stat().st_size
    if size == 0:
        return "it is empty"
    return f"its {size} bytes are damaged or of another kind of file ({type(error).__name__})"
