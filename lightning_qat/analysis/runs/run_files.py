"""Read the files of one run: its sensitivities, errors, configuration and accuracy.

Two layouts are read: one csv with an ``epoch`` column, whose last epoch counts; and that of earlier versions, one file
without this column for the end of training (``sensitivity.csv``), and one per epoch (``sensitivity_epoch3.csv``).
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_qat.analysis.runs.accuracy import ResultTable
from lightning_qat.analysis.runs.stored_rows import NUMBERS, StoredPlan, StoredPoint, StoredRow
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.reading.files import Document
from lightning_qat.quantization.reading.plain_values import UnreadableValueError
from lightning_qat.quantization.reading.schema import read_as

PointKey = tuple[str, str]
"""Path of the target, and name of the point."""
_Rows = dict[PointKey, dict[str, Any]]
_CONFIGURATION = ("dtype", "scheme", "axis", "split_sizes", "observer", "percentile", "fixed_scale")
FOLDER = "lightning_qat"
"""The folder in a log directory that holds the files."""


def files_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder that holds the files of a run.

    Args:
        path: log directory of the run, or the folder ``lightning_qat`` in it.
    """
    inner = Path(path) / FOLDER
    return inner if inner.is_dir() else Path(path)


def log_directory(folder: Path) -> Path:
    """Return the log directory of a run.

    Args:
        folder: the folder that holds its files; files that lie in the log directory itself are found as well.
    """
    return folder.parent if folder.name == FOLDER else folder


class RunFiles:
    """The contents of the files of one run.

    Args:
        path: directory of the run, or one file of it.

    Attributes:
        sensitivity: rows of its sensitivity table.
        errors: rows of its layer comparison.
        plan: points of its plan.
        accuracy: metrics by stage.
        about: what the sensitivity file says beside its rows.

    Raises:
        ConfigurationError: there is no such file or directory, or one of the files is something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.sensitivity: _Rows = {}
        self.errors: _Rows = {}
        self.plan: dict[PointKey, StoredPoint] = {}
        self.accuracy: dict[str, dict[str, float]] = {}
        self.about: dict[str, Any] = {}
        if self.path.is_file():
            rows, self.about = _table(self.path)
            if any("own_SQNR" in row for row in rows.values()):
                self.errors = rows
            else:
                self.sensitivity = rows
            directory = self.path.parent
        elif self.path.is_dir():
            directory = files_folder(self.path)
            self.sensitivity, self.about = _first_table(directory, "sensitivity")
            self.errors, _ = _first_table(directory, "layer_comparison")
        else:
            raise ConfigurationError(f"there is no file or directory {self.path}.")
        self.plan = _plan(directory / "quant_plan.json")
        self.accuracy = _stages(directory)

    @property
    def points(self) -> list[PointKey]:
        """All points with a row."""
        return list(self.sensitivity or self.errors)

    def score(self, key: PointKey, name: str = "score") -> float | None:
        """A number of the sensitivity table."""
        value: float | None = self.sensitivity.get(key, {}).get(name)
        return value

    def own_sqnr(self, key: PointKey) -> float | None:
        """The signal to noise ratio of a point's own error."""
        value: float | None = self.errors.get(key, {}).get("own_SQNR")
        return value

    def configuration(self, key: PointKey) -> dict[str, Any]:
        """How a point is quantized, as far as the files say."""
        if key in self.plan:
            return {name: getattr(self.plan[key], name) for name in _CONFIGURATION}
        row = self.sensitivity.get(key) or self.errors.get(key) or {}
        return {"dtype": row["quant_dtype"]} if row.get("quant_dtype") is not None else {}


def _first_table(directory: Path, stem: str) -> tuple[_Rows, dict[str, Any]]:
    for ending in ("json", "csv"):
        path = directory / f"{stem}.{ending}"
        if path.is_file():
            return _table(path)
    by_epoch = {int(match[1]): path for path in directory.iterdir() if (match := _of_epoch(path, stem))}
    return _table(by_epoch[max(by_epoch)]) if by_epoch else ({}, {})


def _of_epoch(path: Path, stem: str) -> re.Match[str] | None:
    """Earlier versions: a run that was stopped has left tables of epochs only."""
    return re.fullmatch(rf"{stem}_epoch(\d+)\.json", path.name)


def _table(path: Path) -> tuple[_Rows, dict[str, Any]]:
    """The rows of a table by region and point, and what the file says beside them."""
    remedy = "give the log directory of a run, or its sensitivity or layer_comparison file"
    table = Document(path, "a table of points", remedy)
    about: dict[str, Any] = {}
    rows: Any
    if path.suffix == ".csv":
        rows = [_with_numbers(row) for row in table.last_epoch()]
    else:
        about = table.json()
        rows = about.pop("rows", []) if isinstance(about, dict) else None
    with table.checked():
        about = read_as(dict[str, Any], about)
        found = [_row(row, index) for index, row in enumerate(read_as(list[Any], rows))]
    return {(row.get("region") or "", row["point"]): row for row in found if row["point"]}, about


def _row(row: Any, index: int) -> dict[str, Any]:
    try:
        read = read_as(StoredRow, row, ignore_unknown=True)
    except UnreadableValueError as error:
        raise error.inside(f"rows[{index}]") from None
    return {**row, **{name: value for name, value in asdict(read).items() if name in row}}


def _with_numbers(row: dict[str, str]) -> dict[str, Any]:
    """A row of a csv file with its numbers as numbers. Words that are none are refused where the row is checked."""
    return {name: _number(text) if name in NUMBERS else text for name, text in row.items()}


def _number(text: str) -> float | str | None:
    try:
        return float(text) if text else None
    except ValueError:
        return text


def _plan(path: Path) -> dict[PointKey, StoredPoint]:
    if not path.is_file():
        return {}
    plan = Document(path, "a quantization plan", "write it again with lightning_qat.write_plan(model, directory)")
    found = {}
    with plan.checked():
        for region, held in read_as(StoredPlan, plan.json()).regions.items():
            for index, item in enumerate(read_as(list[Any], held.get("points"))):
                try:
                    point = read_as(StoredPoint, item, ignore_unknown=True)
                except UnreadableValueError as error:
                    raise error.inside(f"regions[{region!r}].points[{index}]") from None
                found[region, point.name] = point
    return found


def _stages(directory: Path) -> dict[str, dict[str, float]]:
    """The accuracy of a run, from the result table of its root directory: the run is called like its log directory."""
    run = log_directory(directory)
    for root in (run, *list(run.resolve().parents)[:4]):
        path = root / FOLDER / "result_table.json"
        if path.is_file():
            runs = ResultTable.read(path).runs
            name = os.path.relpath(run.resolve(), root.resolve()).replace(os.sep, "/")
            names = [n for n in runs if n == ("run" if name == "." else name) or n.startswith(f"{name} (")]
            return runs[names[-1]] if names else {}
    return {}
