"""One csv file for all epochs of a run: a long table whose first column is ``epoch``, and which grows.

Each epoch is written in one call, without reading what is there. A reader may find the last line unfinished only if the
machine failed in the middle of that call; it is cut off by the next write.
"""

from __future__ import annotations

import csv
import errno
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_qat.analysis.results import Result
from lightning_qat.atomic_files import NotWrittenError, encoded, write_atomically
from lightning_qat.reporting.files import csv_lines, csv_rows

EPOCH = "epoch"
"""The first column."""
_MOST_WAITING = 100
"""Epochs whose rows are kept in memory while they cannot be written."""


class GrowingTable:
    """A csv file that holds the rows of every epoch, one epoch after the other.

    If an epoch is written again, its rows are replaced and the rows of later epochs are removed. The rows of a run that
    resumes from an earlier epoch, or of a second run in the same folder, thus never mix with older rows.

    Args:
        path: the file.

    Attributes:
        path: the file that is written. It differs from the requested one if another analysis writes that file too.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._left: tuple[int, int, int] | None = None
        self._size = 0
        self._last = -1
        self._waiting: dict[int, bytes] = {}
        self._moved = ""

    def write(self, result: Result[Any], epoch: int) -> str:
        """Write the rows of an epoch behind those of the epochs before.

        If that fails, the rows wait for the next call, which writes them too.

        Args:
            result: what was found in this epoch.
            epoch: its number.

        Returns:
            A sentence about a file with other columns that was moved aside; empty if there was none.

        Raises:
            NotWrittenError: the disk is full, or the folder cannot be written to.
        """
        header = (EPOCH, *result.columns())
        lines = encoded(csv_lines([epoch, *row] for row in csv_rows(result)))
        earlier = [(number, owed) for number, owed in self._waiting.items() if number < epoch]
        self._waiting = {**dict(earlier[-_MOST_WAITING:]), epoch: lines}
        try:
            self._write(header)
        except OSError as error:
            raise NotWrittenError.of(self.path, error) from error
        moved, self._moved = self._moved, ""
        return moved

    def _write(self, header: Sequence[str]) -> None:
        """Write the rows that wait."""
        if not self._is_as_left():
            self._moved = self._take_up(header) or self._moved
        first, lines = min(self._waiting), b"".join(self._waiting.values())
        if self._size and first > self._last:
            self._append(lines)
        else:
            kept = self._lines_before(first) if self._size else encoded(csv_lines([header]))
            write_atomically(self.path, kept + lines)
            self._size = len(kept) + len(lines)
        self._last, self._left = max(self._waiting), self._present()
        self._waiting = {}

    def _is_as_left(self) -> bool:
        """Whether the file exists and has not changed since it was last written here."""
        return self._left is not None and self._left == self._present()

    def _present(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _take_up(self, header: Sequence[str]) -> str:
        """Continue an existing file. A file with other columns is moved aside."""
        self._size, self._last = 0, -1
        if not self.path.exists():
            return ""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            if not whole.startswith(encoded(csv_lines([header]))):
                raise ValueError("it has other columns")
            last = max((epoch for epoch, _ in _records(whole)), default=-1)
        except (ValueError, IndexError, csv.Error):
            return self._make_room()
        if len(whole) < len(content):  # the machine failed while it was written
            write_atomically(self.path, whole)
        self._size, self._last = len(whole), last
        return ""

    def _make_room(self) -> str:
        """Move a file with other columns aside. If another analysis has written it, use a new name instead."""
        free, path = _free_path(self.path), self.path
        if self._left is not None:
            self.path = free
            return f"{path} is written by another analysis too. The rows of this one follow in {free.name}."
        path.rename(free)
        return (
            f"{path} has other columns, of another version or metric, so the rows of this run cannot follow. It is now "
            f"called {free.name}, and a new file was begun."
        )

    def _append(self, lines: bytes) -> None:
        with open(self.path, "ab", buffering=0) as file:
            try:
                if file.write(lines) != len(lines):
                    raise OSError(errno.ENOSPC, "the disk is full")
            except OSError:
                file.truncate(self._size)  # rather no rows of this epoch than half of them
                raise
        self._size += len(lines)

    def _lines_before(self, epoch: int) -> bytes:
        """The header, and the rows of earlier epochs."""
        content = self.path.read_bytes()
        later = [place for number, place in _records(content) if number >= epoch]
        return content[: min(later, default=len(content))]


def _records(content: bytes) -> list[tuple[int, int]]:
    """The epoch of every row, and at which byte the row begins."""
    lines = content.splitlines(keepends=True)
    ends = [0, *itertools.accumulate(map(len, lines))]
    reader = csv.reader(line.decode() for line in lines)
    next(reader)
    found, read = [], reader.line_num
    for record in reader:
        found.append((int(record[0]), ends[read]))
        read = reader.line_num
    return found


def _free_path(path: Path) -> Path:
    """A name beside a file that nothing has yet: ``sensitivity.1.csv``."""
    number = 1
    while (free := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return free
