"""Read the files of one run: its sensitivities, errors, configuration and accuracy.

Two layouts are read: one csv with an ``epoch`` column, whose last epoch counts; and that of earlier versions, one file
without this column for the end of training (``sensitivity.csv``), and one per epoch (``sensitivity_epoch3.csv``).
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from pathlib import Path
from typing import Any

from lightning_qat.quantization.errors import ConfigurationError

PointKey = tuple[str, str]
"""Path of the target, and name of the point."""
_Rows = dict[PointKey, dict[str, Any]]
_CONFIGURATION = ("dtype", "scheme", "axis", "split_sizes", "observer", "percentile", "fixed_scale")
_DIRECTORY = "lightning_qat"


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
        ConfigurationError: there is no such file or directory, or it is something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.sensitivity: _Rows = {}
        self.errors: _Rows = {}
        self.plan: _Rows = {}
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
            inner = self.path / _DIRECTORY
            directory = inner if inner.is_dir() else self.path
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
        return _number(self.sensitivity.get(key, {}).get(name))

    def own_sqnr(self, key: PointKey) -> float | None:
        """The signal to noise ratio of a point's own error."""
        return _number(self.errors.get(key, {}).get("own_SQNR"))

    def configuration(self, key: PointKey) -> dict[str, Any]:
        """How a point is quantized, as far as the files say."""
        if key in self.plan:
            return {name: self.plan[key].get(name) for name in _CONFIGURATION}
        row = self.sensitivity.get(key) or self.errors.get(key) or {}
        return {"dtype": row["quant_dtype"]} if "quant_dtype" in row else {}


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
    about: dict[str, Any] = {}
    rows: Any
    if path.suffix == ".csv":
        rows = _last_epoch(path)
    else:
        about = _json(path)
        rows = about.pop("rows", [])
    if not isinstance(rows, list) or any(not isinstance(row, dict) or "point" not in row for row in rows):
        raise ConfigurationError(f"{path} is not a table of points: give a sensitivity or layer_comparison file.")
    return {(row.get("region") or "", row["point"]): row for row in rows if row["point"]}, about


def _last_epoch(path: Path) -> list[dict[str, Any]]:
    """The rows of a csv file; of one that holds several epochs, those of the last."""
    content = path.read_bytes()
    if content.startswith(b"epoch,"):
        content = content[: content.rfind(b"\n") + 1]  # a run that failed while it wrote leaves half a line
    text = io.StringIO(content.decode("utf-8"), newline="")
    rows: list[dict[str, Any]] = list(csv.DictReader(text))
    return [row for row in rows if row.get("epoch") == rows[-1].get("epoch")]


def _plan(path: Path) -> _Rows:
    if not path.is_file():
        return {}
    regions = _json(path).get("regions", {})
    return {(region, point["name"]): point for region, plan in regions.items() for point in plan["points"]}


def _stages(directory: Path) -> dict[str, dict[str, float]]:
    """The accuracy of a run, from the result table of its root directory: the run is called like its log directory."""
    run = directory.parent if directory.name == _DIRECTORY else directory
    for root in (run, *list(run.resolve().parents)[:4]):
        path = root / _DIRECTORY / "result_table.json"
        if path.is_file():
            runs = _json(path).get("runs", {})
            name = os.path.relpath(run.resolve(), root.resolve()).replace(os.sep, "/")
            names = [n for n in runs if n == ("run" if name == "." else name) or n.startswith(f"{name} (")]
            stages: dict[str, dict[str, float]] = runs[names[-1]] if names else {}
            return stages
    return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(
            f"{path} is not JSON: give the log directory of a run, or its sensitivity or layer_comparison file."
        ) from error
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path} is not a result of lightning_qat.")
    return data


def _number(value: Any) -> float | None:
    """A number of a csv or json file; there, numbers that are not finite are words."""
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{value!r} is not a number.") from error
