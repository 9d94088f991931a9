"""The growing tables of a run: the latest row of every point, and a few columns over the epochs."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_qat.quantization.reading.files import Document

PointKey = tuple[str, str]
"""Path of the region, and name of the point."""
Cell = str | int | float | bool | None
MOST_EPOCHS = 32
"""Epochs of a series that are kept, at least; of a longer run every second, fourth ... one, and the last."""
_TEXTS = frozenset(
    ("point", "op_type", "role", "dtype", "region", "error_source", "op_name", "sensitive_type", "quant_dtype")
)
_REMEDY = "the report is made without it"


@dataclass(frozen=True)
class PointHistory:
    """What a growing table says about the points.

    Args:
        latest: the last row of every point, in the order of the file.
        epochs: the epochs of the series.
        series: by column and point, one value per epoch; None where the epoch has no row for the point.
    """

    latest: dict[PointKey, dict[str, Cell]] = field(default_factory=dict)
    epochs: tuple[int, ...] = ()
    series: dict[str, dict[PointKey, list[Cell]]] = field(default_factory=dict)


def point_key(region: object, point: object) -> PointKey:
    """Return the key of a point, the same whether its name was read from csv or JSON.

    Args:
        region: path of the region; None for the model itself.
        point: name of the point.

    Example:
        >>> point_key(None, "a\\0.output") == point_key("", r"a\\x00.output")
        True
    """
    return _as_in_csv(region or ""), _as_in_csv(point)


def _as_in_csv(name: object) -> str:
    """A name as a csv file holds it, which has neither NUL nor halves of characters."""
    return str(name).replace("\0", r"\x00").encode("utf-8", "backslashreplace").decode()


def read_history(path: Path, columns: Sequence[str], most: int = MOST_EPOCHS) -> PointHistory:
    """Read a table that grows by epochs, such as ``layer_statistics.csv``. Memory does not grow with the epochs.

    Args:
        path: the file; a missing one is an empty history.
        columns: which columns to keep over the epochs.
        most: epochs of a series, at least; at most twice as many are kept.

    Raises:
        DamagedFileError: it is no such table.
    """
    if not path.is_file():
        return PointHistory()
    document = Document(path, "a table of points that grows by epochs", _REMEDY)
    latest: dict[PointKey, dict[str, Cell]] = {}
    kept: list[tuple[int, dict[PointKey, list[Cell]]]] = []
    stride = 1
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, (epoch, rows) in enumerate(_by_epoch(file)):
                latest.update(rows)
                if kept and (number - 1) % stride:
                    kept.pop()  # it was there as the last one only
                kept.append((epoch, {key: [row.get(column) for column in columns] for key, row in rows.items()}))
                if len(kept) > 2 * most:
                    kept, stride = kept[::2], 2 * stride
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise document.error(f"it cannot be read ({error})") from error
    series: dict[str, dict[PointKey, list[Cell]]] = {}
    for place, column in enumerate(columns):
        series[column] = {key: [rows[key][place] if key in rows else None for _, rows in kept] for key in latest}
    return PointHistory(latest, tuple(epoch for epoch, _ in kept), series)


def _by_epoch(lines: Iterable[str]) -> Iterator[tuple[int, dict[PointKey, dict[str, Cell]]]]:
    """The rows of one epoch after the other. A last line without an end is left out: its writer was killed."""
    reader = csv.reader((line for line in lines if line.endswith("\n")), strict=True)
    heading = next(reader, [])
    epoch: int | None = None
    rows: dict[PointKey, dict[str, Cell]] = {}
    for cells in reader:
        if not cells:
            continue
        row = {column: _cell(column, text) for column, text in zip(heading, cells, strict=True)}
        present = int(row.pop("epoch", 0) or 0)
        if epoch is not None and present != epoch:
            yield epoch, rows
            rows = {}
        epoch = present
        rows[point_key(row.get("region"), row["point"])] = row
    if epoch is not None:
        yield epoch, rows


def _cell(column: str, text: str) -> Cell:
    """A cell with its type; names are never numbers."""
    if column in _TEXTS:
        return text
    if text in ("", "True", "False"):
        return None if not text else text == "True"
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text
