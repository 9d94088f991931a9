"""Base of all results: frozen rows that write themselves as CSV and JSON and show as a table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

RowT = TypeVar("RowT")


@dataclasses.dataclass(frozen=True)
class Result(Generic[RowT]):
    """A table of frozen dataclass rows; the fields of the row class are the columns.

    Subclasses may set ``title`` and ``shown`` (the columns of the short terminal view; files always hold all).
    """

    rows: tuple[RowT, ...]
    title: ClassVar[str] = ""
    shown: ClassVar[tuple[str, ...]] = ()

    def columns(self) -> tuple[str, ...]:
        """Names of all columns; empty without rows."""
        return tuple(f.name for f in dataclasses.fields(self.rows[0])) if self.rows else ()  # type: ignore[arg-type]

    def parts(self) -> tuple[Result[Any], ...]:
        """The tables to show: this one, and those that belong to it."""
        return (self,)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries of primitives."""
        return [dataclasses.asdict(row) for row in self.rows]  # type: ignore[call-overload]

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write all rows and columns as CSV, at once (an interrupted write leaves the old file)."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        columns = self.columns()
        writer.writerow(columns)
        writer.writerows([row[column] for column in columns] for row in self.to_dicts())
        return write_atomically(path, buffer.getvalue())

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as JSON; non-finite numbers become strings, as JSON has none."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rows"}
        head = "".join(f"  {json.dumps(k)}: {json.dumps(plain(v))},\n" for k, v in fields.items())
        rows = ",\n".join(f"    {json.dumps(plain(row))}" for row in self.to_dicts())
        return write_atomically(path, f'{{\n{head}  "rows": [{rows and chr(10) + rows + chr(10) + "  "}]\n}}\n')

    def __rich__(self) -> Table:
        return rich_table(self.title, self.shown or self.columns(), self.to_dicts())


def rich_table(title: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> Table:
    """Render rows for the terminal: numbers are short, right-aligned and whole; names fold rather than being cut."""
    table = Table(title=title or None, title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        cells = [format_cell(row[column]) for row in rows]
        widest = max(map(len, [column, *cells]))
        if any(isinstance(row[column], (int, float)) and not isinstance(row[column], bool) for row in rows):
            table.add_column(column, justify="right", no_wrap=True, min_width=widest)
        else:
            table.add_column(column, overflow="fold", min_width=min(widest, 12))
    for row in rows:
        table.add_row(*(Text(format_cell(row[column])) for column in columns))
    return table


def format_cell(value: Any) -> str:
    """Spell a value for a person."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def plain(value: Any) -> Any:
    """Turn a value into what JSON can hold."""
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [plain(v) for v in value]
    return value


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file (text as UTF-8) and move it into place, so that no reader ever sees half of it."""
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
