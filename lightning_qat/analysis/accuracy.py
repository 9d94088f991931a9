"""The result table across stages and runs (D7): one row per metric, one column per stage, pass or fail."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.table import Table

from lightning_qat.analysis.pipeline import is_worse_when_larger
from lightning_qat.analysis.results import Result, plain, rich_table, write_atomically
from lightning_qat.quantization.errors import ConfigurationError

Target = str | float
RESULT_TABLE_VERSION = 1


@dataclass(frozen=True)
class AccuracyRow:
    """One metric.

    Args:
        metric: its name.
        float_value: of the float model; None if not known.
        target: the value to reach; None if there is no target for it.
        values: by column, ``<run> <stage>``.
        passed: whether the newest value reaches the target; None without target or value.
    """

    metric: str
    float_value: float | None
    target: float | None
    values: dict[str, float]
    passed: bool | None


@dataclass(frozen=True)
class AccuracyResult(Result[AccuracyRow]):
    """The table over runs.

    Args:
        stages: the columns, oldest first.
        run: the run that passes or fails.
        note: pass or fail as a sentence.
    """

    stages: tuple[str, ...] = ()
    run: str = ""
    note: str = ""
    title: ClassVar[str] = "Accuracy"

    def columns(self) -> tuple[str, ...]:
        """``metric``, ``float``, ``target``, one column per stage, ``passed``."""
        return ("metric", "float", "target", *self.stages, "passed")

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return one flat dictionary per metric."""
        return [
            {
                "metric": row.metric,
                "float": row.float_value,
                "target": row.target,
                **{stage: row.values.get(stage) for stage in self.stages},
                "passed": None if row.passed is None else ("pass" if row.passed else "FAIL"),
            }
            for row in self.rows
        ]

    def __rich__(self) -> Table:
        """The current run; the files hold all runs."""
        own = {stage: stage.removeprefix(f"{self.run} ") for stage in self.stages if stage.startswith(f"{self.run} ")}
        rows = [{own.get(key, key): value for key, value in row.items()} for row in self.to_dicts()]
        return rich_table(f"{self.title} of {self.run}", ("metric", "float", "target", *own.values(), "passed"), rows)


@dataclass
class ResultTable:
    """All runs under one root directory, as kept in ``result_table.json``.

    Args:
        runs: stage values by run, oldest first: ``{run: {stage: {metric: value}}}``. The stage ``float`` is the
        baseline.
    """

    runs: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ResultTable:
        """Read the table; a missing file is an empty one.

        Raises:
            ConfigurationError: the file is not a result table; it is left alone.
        """
        if not Path(path).exists():
            return cls()
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["version"] != RESULT_TABLE_VERSION:
                raise ValueError(f"version {data['version']}")
            return cls({run: {s: dict(v) for s, v in stages.items()} for run, stages in data["runs"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"{os.fspath(path)} is not a result table of this version ({error}): move it away to start a new one."
            ) from error

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the table at once."""
        return write_atomically(
            path, json.dumps(plain({"version": RESULT_TABLE_VERSION, "runs": self.runs}), indent=2) + "\n"
        )

    def record(self, run: str, stage: str, metrics: Mapping[str, float]) -> None:
        """Note the values of one stage of one run."""
        self.runs.setdefault(run, {})[stage] = {name: float(value) for name, value in metrics.items()}

    def float_values(self, run: str) -> dict[str, float] | None:
        """Return the float baseline: that of the run, else the newest there is."""
        if "float" in self.runs.get(run, {}):
            return self.runs[run]["float"]
        return next((stages["float"] for stages in reversed(self.runs.values()) if "float" in stages), None)

    def result(self, run: str, metrics: list[str], target: Target | Mapping[str, Target] | None) -> AccuracyResult:
        """Build the table as seen from ``run`` (whose newest stage passes or fails).

        Args:
            run: the current run.
            metrics: the rows.
            target: see :func:`target_value`; one for all metrics, or by metric.
        """
        baseline = self.float_values(run) or {}
        columns = {
            f"{name} {s}": values for name, stages in self.runs.items() for s, values in stages.items() if s != "float"
        }
        own = [f"{run} {stage}" for stage in self.runs.get(run, {}) if stage != "float"]
        rows = []
        for metric in metrics:
            wanted = target.get(metric) if isinstance(target, Mapping) else target
            if (
                wanted is not None
                and not isinstance(target, Mapping)
                and is_worse_when_larger(metric)
                and len(metrics) > 1
            ):
                wanted = None  # one target for all means the scores; a loss is shown, not judged
            value = None if wanted is None else target_value(metric, baseline.get(metric), wanted)
            latest = columns[own[-1]].get(metric) if own else None
            passed = None
            if value is not None and latest is not None:
                passed = latest <= value if is_worse_when_larger(metric) else latest >= value
            values = {name: values[metric] for name, values in columns.items() if metric in values}
            rows.append(AccuracyRow(metric, baseline.get(metric), value, values, passed))
        return AccuracyResult(tuple(rows), tuple(columns), run, _sentence(rows, own[-1] if own else run))


def target_value(metric: str, float_value: float | None, target: Target) -> float | None:
    """Return the value to reach.

    Args:
        metric: its name; costs (losses, errors) may rise, scores may fall.
        float_value: of the float model.
        target: ``"1%"``: within one percent of the float value, relatively. A number: that value itself.

    Raises:
        ConfigurationError: the target is neither.

    Example:
        >>> round(target_value("dynamic", 73.6, "1%"), 3), target_value("val_acc", None, 0.97)
        (72.864, 0.97)
    """
    if isinstance(target, str) and target.strip().endswith("%"):
        try:
            share = float(target.strip()[:-1]) / 100
        except ValueError:
            share = math.nan
        if not 0 <= share < 1:
            raise ConfigurationError(f"target {target!r}: write the loss that is allowed, such as 1% or 0.5%.")
        if float_value is None:
            return None
        return float_value + abs(float_value) * share * (1 if is_worse_when_larger(metric) else -1)
    try:
        return float(target)
    except ValueError:
        raise ConfigurationError(
            f"target {target!r}: write 1% (relative to float) or the value itself, 0.97."
        ) from None


def _sentence(rows: list[AccuracyRow], stage: str) -> str:
    judged = [row for row in rows if row.passed is not None]
    if not judged:
        return f"{stage}: no target to judge by; give target: 1% and a float value."
    failed = [row.metric for row in judged if not row.passed]
    if failed:
        return f"{stage}: target missed for {', '.join(failed)}."
    return f"{stage}: target reached for {', '.join(row.metric for row in judged)}."
