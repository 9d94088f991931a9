"""Two runs side by side (B9): did what was changed become less sensitive, and what became of the accuracy.

A fix often does not move the accuracy yet: something else still breaks it. But the sensitivity of what was changed
falls, and that is how to see that it was right.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning_qat.analysis.metric_direction import is_worse_when_larger
from lightning_qat.analysis.results import Result
from lightning_qat.quantization.errors import ConfigurationError

Outcome = Literal["fell", "same", "rose", "new", "gone"]

LEAST_CHANGE = 0.05
"""Other batches change a score by a few percent: less than this is the same."""
_CONFIGURATION = ("dtype", "scheme", "axis", "split_sizes", "observer", "percentile", "fixed_scale")
_DIRECTORY = "lightning_qat"
_Key = tuple[str, str]
_Rows = dict[_Key, dict[str, Any]]


@dataclass(frozen=True)
class RunChange:
    """One point in both runs.

    Args:
        point: its name.
        change: what was changed about it, such as ``dtype int8 -> int16``; empty if nothing.
        outcome: ``fell``, ``rose`` or ``same``: its sensitivity, beyond two standard errors and 5 %; NaN, where the
            point alone breaks the output, is above all. ``new`` and ``gone``: only one of the runs measured it.
        before_score, after_score: root mean square change of the output when this point alone is quantized.
        ratio: after divided by before; None if either is missing or NaN, or if before is zero.
        before_own_sqnr, after_own_sqnr: signal to noise of its own error in dB, where the runs have a layer comparison.
        region: path of the target in the model, ``""`` for the model itself.
    """

    point: str
    change: str
    outcome: Outcome
    before_score: float | None
    after_score: float | None
    ratio: float | None
    before_own_sqnr: float | None = None
    after_own_sqnr: float | None = None
    region: str = ""


@dataclass(frozen=True)
class AccuracyChange:
    """One metric of one stage in both runs.

    Args:
        metric: its name.
        stage: ``float``, ``calibrated``, ``QAT`` ...
        before, after: its values; None if a run has none.
        better: whether it improved; None if it is the same or unknown.
    """

    metric: str
    stage: str
    before: float | None
    after: float | None
    better: bool | None


@dataclass(frozen=True)
class AccuracyComparison(Result[AccuracyChange]):
    """The accuracy of two runs."""

    title: ClassVar[str] = "Accuracy"


@dataclass(frozen=True)
class RunComparison(Result[RunChange]):
    """Two runs: what was changed first, then what moved most.

    Args:
        before, after: the runs.
        accuracy: by metric and stage; empty if there is no result table.
        warnings: why scores cannot be compared without care.
    """

    title: ClassVar[str] = "Sensitivity of two runs"
    shown: ClassVar[tuple[str, ...]] = ("point", "change", "outcome", "before_score", "after_score", "ratio")

    before: str = ""
    after: str = ""
    accuracy: tuple[AccuracyChange, ...] = ()
    warnings: tuple[str, ...] = ()

    def columns(self) -> tuple[str, ...]:
        """Names of all columns, also without rows."""
        return tuple(RunChange.__dataclass_fields__)

    @property
    def changed(self) -> tuple[RunChange, ...]:
        """The points whose configuration is not the same."""
        return tuple(row for row in self.rows if row.change)

    @property
    def note(self) -> str:
        """Say in a sentence whether the changes did what they should."""
        both = [row for row in self.changed if row.outcome in ("fell", "same", "rose")]
        fell = sum(row.outcome == "fell" for row in both)
        if not self.changed:
            text = "No point was changed."
        else:
            text = f"{len(self.changed)} points were changed; of {len(both)} measured in both runs, {fell} fell."
            others = [row.point for row in both if row.outcome != "fell"]
            if others:
                text += f" Did not fall: {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}."
        return " ".join([text, *self.warnings])

    def parts(self) -> tuple[Result[Any], ...]:
        """The accuracy, then the points."""
        return (AccuracyComparison(self.accuracy), self) if self.accuracy else (self,)


def compare_runs(before: str | os.PathLike[str], after: str | os.PathLike[str]) -> RunComparison:
    """Compare the files that two runs have written.

    Args:
        before: directory of the earlier run (its log directory, or ``lightning_qat`` in it), or one file of it:
            ``sensitivity.json`` or ``.csv``, of the end or of an epoch; ``layer_comparison.json`` or ``.csv``.
        after: the same of the later run.

    Raises:
        ConfigurationError: there are no such files, or they are not what they should be.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp())
        >>> for name, dtype, score in (("a", "int8", 2.0), ("b", "int16", 0.01)):
        ...     _ = (place / f"{name}.csv").write_text(f"point,quant_dtype,score\\nfc.weight,{dtype},{score}\\n")
        >>> result = compare_runs(place / "a.csv", place / "b.csv")
        >>> result.rows[0].change, result.rows[0].outcome, result.rows[0].ratio
        ('dtype int8 -> int16', 'fell', 0.005)
    """
    runs = _Run(before), _Run(after)
    for run, other in (runs, runs[::-1]):
        if not run.sensitivity and not run.errors:
            raise ConfigurationError(
                f"{run.path} has neither sensitivity.json|csv nor layer_comparison.json|csv: give the log directory of "
                "a run with SensitivityAnalysis() or LayerComparison(), or one such file."
            )
        if not run.sensitivity and other.sensitivity:
            raise ConfigurationError(f"{other.path} has a sensitivity table and {run.path} has none.")
    first, second = runs
    keys = dict.fromkeys([*first.points, *second.points])
    rows = [_change(key, first, second) for key in keys]
    return RunComparison(
        rows=tuple(sorted(rows, key=_order)),
        before=str(before),
        after=str(after),
        accuracy=tuple(_accuracy(first.accuracy, second.accuracy)),
        warnings=tuple(_warnings(first, second)),
    )


class _Run:
    """What the files of one run say."""

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
    def points(self) -> list[_Key]:
        """All points with a row."""
        return list(self.sensitivity or self.errors)

    def score(self, key: _Key, name: str = "score") -> float | None:
        """A number of the sensitivity table."""
        return _number(self.sensitivity.get(key, {}).get(name))

    def own_sqnr(self, key: _Key) -> float | None:
        """The signal to noise ratio of a point's own error."""
        return _number(self.errors.get(key, {}).get("own_SQNR"))

    def configuration(self, key: _Key) -> dict[str, Any]:
        """How a point is quantized, as far as the files say."""
        if key in self.plan:
            return {name: self.plan[key].get(name) for name in _CONFIGURATION}
        row = self.sensitivity.get(key) or self.errors.get(key) or {}
        return {"dtype": row["quant_dtype"]} if "quant_dtype" in row else {}


def _change(key: _Key, first: _Run, second: _Run) -> RunChange:
    region, point = key
    before, after = first.score(key), second.score(key)
    noise = 2 * math.hypot(*(run.score(key, "standard_error") or 0.0 for run in (first, second)))
    by_error = not (first.sensitivity and second.sensitivity)
    own = first.own_sqnr(key), second.own_sqnr(key)
    if by_error:  # the noise of the point itself, if there is no sensitivity
        before, after = (None if value is None else 10 ** (-value / 20) for value in own)
    known = before is not None and after is not None and not math.isnan(before + after)
    return RunChange(
        point=point,
        change=_difference(first.configuration(key), second.configuration(key)),
        outcome=_outcome(before, after, noise),
        before_score=before,
        after_score=after,
        ratio=after / before if known and before and after is not None else None,
        before_own_sqnr=own[0],
        after_own_sqnr=own[1],
        region=region,
    )


def _outcome(before: float | None, after: float | None, noise: float) -> Outcome:
    if before is None or after is None:
        return "new" if before is None else "gone"
    if math.isnan(before) or math.isnan(after):  # this point alone broke the output
        return "same" if math.isnan(before) and math.isnan(after) else "fell" if math.isnan(before) else "rose"
    least = max(LEAST_CHANGE * before, noise)
    return "fell" if before - after > least else "rose" if after - before > least else "same"


def _order(row: RunChange) -> tuple[bool, float]:
    if row.outcome not in ("fell", "rose"):
        return not row.change, 0.0
    moved = abs(math.log(row.ratio)) if row.ratio and math.isfinite(row.ratio) else math.inf
    return not row.change, -moved


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = [name for name in before if name in after and before[name] != after[name]]
    return ", ".join(f"{name} {_word(before[name])} -> {_word(after[name])}" for name in names)


def _word(value: Any) -> str:
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _warnings(first: _Run, second: _Run) -> list[str]:
    found = []
    for name, why in (("output", "what was looked at"), ("method", "the method")):
        before, after = first.about.get(name), second.about.get(name)
        if before is not None and after is not None and before != after:
            found.append(f"Careful: {why} differs ({before}; {after}).")
    if not (first.sensitivity and second.sensitivity):
        found.append("There is no sensitivity: the scores are the points' own noise relative to their signal.")
    return found


def _accuracy(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
) -> list[AccuracyChange]:
    found = []
    for stage in dict.fromkeys([*before, *after]):
        first, second = before.get(stage, {}), after.get(stage, {})
        for metric in dict.fromkeys([*first, *second]):
            values = first.get(metric), second.get(metric)
            better = None
            if values[0] is not None and values[1] is not None and values[0] != values[1]:
                better = (values[1] > values[0]) != is_worse_when_larger(metric)
            found.append(AccuracyChange(metric, stage, *values, better))
    return found


def _first_table(directory: Path, stem: str) -> tuple[_Rows, dict[str, Any]]:
    for ending in ("json", "csv"):
        path = directory / f"{stem}.{ending}"
        if path.is_file():
            return _table(path)
    return {}, {}


def _table(path: Path) -> tuple[_Rows, dict[str, Any]]:
    """The rows of a table by region and point, and what the file says beside them."""
    about: dict[str, Any] = {}
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    else:
        about = _json(path)
        rows = about.pop("rows", [])
    if not isinstance(rows, list) or any(not isinstance(row, dict) or "point" not in row for row in rows):
        raise ConfigurationError(f"{path} is not a table of points: give a sensitivity or layer_comparison file.")
    return {(row.get("region") or "", row["point"]): row for row in rows if row["point"]}, about


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
