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


def full_name(key: PointKey) -> str:
    """Return the name of a point with the path of its region.

    Args:
        key: of the point.

    Example:
        >>> full_name(("backbone", "fc.weight")), full_name(("", "fc.weight"))
        ('backbone.fc.weight', 'fc.weight')
    """
    region, point = key
    return f"{region}.{point}" if region else point


def _as_in_csv(name: object) -> str:
    """A name as a csv file holds it, which has neither NUL nor halves of characters."""
    text = str(name)
    return text if text.isprintable() else text.replace("\0", r"\x00").encode("utf-8", "backslashreplace").decode()


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
    latest: dict[PointKey, list[str]] = {}
    kept: list[tuple[int, dict[PointKey, list[Cell]]]] = []
    stride = 1
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            reader = csv.reader((line for line in file if line.endswith("\n")), strict=True)  # a half line is cut off
            heading = next(reader, [])
            wanted = [(column, heading.index(column) if column in heading else -1) for column in columns]
            for number, (epoch, rows) in enumerate(_by_epoch(reader, heading)):
                latest.update(rows)
                if kept and (number - 1) % stride:
                    kept.pop()  # it was there as the last one only
                numbers = {k: [_cell(c, r[at]) if at >= 0 else None for c, at in wanted] for k, r in rows.items()}
                kept.append((epoch, numbers))
                if len(kept) > 2 * most:
                    kept, stride = kept[::2], 2 * stride
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise document.error(f"it cannot be read ({error})") from error
    series: dict[str, dict[PointKey, list[Cell]]] = {}
    for place, column in enumerate(columns):
        series[column] = {key: [rows[key][place] if key in rows else None for _, rows in kept] for key in latest}
    typed = {key: {c: _cell(c, text) for c, text in zip(heading, row, strict=True)} for key, row in latest.items()}
    return PointHistory(typed, tuple(epoch for epoch, _ in kept), series)


def _by_epoch(reader: Iterable[list[str]], heading: list[str]) -> Iterator[tuple[int, dict[PointKey, list[str]]]]:
    """The rows of one epoch after the other."""
    at = {name: heading.index(name) for name in ("epoch", "region", "point") if name in heading}
    epoch: int | None = None
    rows: dict[PointKey, list[str]] = {}
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(heading) or "point" not in at:
            raise ValueError(f"{len(cells)} cells in a row of {len(heading)} columns, which must have a point")
        present = int(cells[at["epoch"]] or 0) if "epoch" in at else 0
        if epoch is not None and present != epoch:
            yield epoch, rows
            rows = {}
        epoch = present
        rows[point_key(cells[at["region"]] if "region" in at else "", cells[at["point"]])] = cells
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
