"""The result table across stages and runs: one row per metric, one column per stage, pass or fail."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from lightning_qat.analysis.metric_direction import higher_is_better, is_quality
from lightning_qat.analysis.open_question import RAISE_POINTS, OpenQuestion, with_question
from lightning_qat.analysis.results import Block, Result
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.reading.checks import one_of
from lightning_qat.quantization.reading.files import Document

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
        passed: whether the newest value of the run reaches the target; None without target or value.
    """

    metric: str
    float_value: float | None
    target: float | None
    values: dict[str, float]
    passed: bool | None


@dataclass(frozen=True)
class StageTable(Result[AccuracyRow]):
    """Metrics over stages.

    Args:
        stages: the columns, oldest first.
    """

    stages: tuple[str, ...] = ()

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


@dataclass(frozen=True)
class AccuracyResult(StageTable):
    """The table over runs.

    Args:
        run: the run that passes or fails.
        own: its stages.
        note: pass or fail as a sentence, with the next step.
        finding: what the note says was found.
        next_step: what the note says to do.
        left_open: what another report can tell; part of what to do.
        samples: samples that every value is about; None if that is not known.
    """

    run: str = ""
    own: tuple[str, ...] = ()
    note: str = ""
    finding: str = ""
    next_step: str = ""
    left_open: OpenQuestion = ""
    samples: int | None = None
    title: ClassVar[str] = "Accuracy"

    def blocks(self) -> tuple[Block, ...]:
        """The current run; the files hold all runs."""
        rows = [{**row, **{s: row[_column(self.run, s)] for s in self.own}} for row in self.to_dicts()]
        columns = ("metric", "float", "target", *self.own, "passed")
        number = "" if self.samples is None else f" on {self.samples} samples"
        return (Block.of(f"{self.title} of run {self.run}{number}", columns, rows, self.note),)


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
            DamagedFileError: the file is not a result table; it is left alone.
        """
        if not Path(path).exists():
            return cls()
        remedy = "it was left as it is: move it away, and a new one is started"
        return cls(Document(path, "a result table of this version", remedy).as_json(_Stored).runs)

    def entry(self, name: str, stage: str, metrics: Iterable[str]) -> str:
        """Return the run under which a new run called ``name`` may note a stage without overwriting a value.

        This is the newest of ``name``, ``name (2)``, ``name (3)`` ... if it has no such values yet (a test after its
        fit), else the next one. A run without any values has just begun elsewhere, and is another one.
        """
        number = 1
        while _numbered(name, number + 1) in self.runs:
            number += 1
        newest = self.runs.get(_numbered(name, number))
        taken = newest is not None and (not newest or any(metric in newest.get(stage, {}) for metric in metrics))
        return _numbered(name, number + taken)

    def record(self, run: str, stage: str, metrics: Mapping[str, float]) -> None:
        """Note values of one stage of one run; its other values stay."""
        values = self.runs.setdefault(run, {}).setdefault(stage, {})
        values.update({name: float(value) for name, value in metrics.items()})

    def float_value(self, run: str, metric: str) -> float | None:
        """Return the float baseline: that of the run, else the newest there is."""
        candidates = [self.runs.get(run, {}), *reversed(self.runs.values())]
        return next((c["float"][metric] for c in candidates if metric in c.get("float", {})), None)

    def metrics(self) -> list[str]:
        """Names of all metrics of all runs, in the order they were first noted."""
        names = (name for stages in self.runs.values() for values in stages.values() for name in values)
        return list(dict.fromkeys(names))

    def result(self, run: str, metrics: list[str], target: Target | Mapping[str, Target] | None) -> AccuracyResult:
        """Build the table as seen from ``run`` (whose newest stage passes or fails).

        Args:
            run: the current run.
            metrics: the rows.
            target: see :func:`target_value`; or by metric. One for all means the scores: costs are shown, and judged
                only if there are no scores. What does not measure quality, such as seconds, is shown.
        """
        columns = {
            _column(name, s): values
            for name, stages in self.runs.items()
            for s, values in stages.items()
            if s != "float"
        }
        own = tuple(stage for stage in self.runs.get(run, {}) if stage != "float")
        quality = [metric for metric in metrics if is_quality(metric)]
        scores = [metric for metric in quality if higher_is_better(metric)] or quality
        rows = []
        for metric in metrics:
            baseline = self.float_value(run, metric)
            wanted = target.get(metric) if isinstance(target, Mapping) else target if metric in scores else None
            value = None if wanted is None else target_value(metric, baseline, wanted)
            reached = [columns[_column(run, s)][metric] for s in own if metric in columns[_column(run, s)]]
            values = {name: stage[metric] for name, stage in columns.items() if metric in stage}
            passed = _reaches(metric, reached[-1], value) if value is not None and reached else None
            rows.append(AccuracyRow(metric, baseline, value, values, passed))
        calibrated = self.runs.get(run, {}).get("calibrated", {}) if own and own[-1] != "calibrated" else {}
        finding, next_step, left_open = _said(rows, target, calibrated)
        if own:
            finding = f"{own[-1]}: {finding}"
        note = f"{run}{' ' if own else ': '}{finding} {with_question(left_open, next_step)}".rstrip()
        return AccuracyResult(tuple(rows), tuple(columns), run, own, note, finding, next_step, left_open)


@dataclass(frozen=True)
class _Stored:
    """What the file holds."""

    version: Annotated[int, one_of([RESULT_TABLE_VERSION])]
    runs: dict[str, dict[str, dict[str, float]]]


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
        return float_value + abs(float_value) * share * (-1 if higher_is_better(metric) else 1)
    try:
        value = float(target)
    except (ValueError, TypeError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigurationError(f"target {target!r}: write 1% (relative to float) or the value itself, 0.97.")
    return value


def _column(run: str, stage: str) -> str:
    return f"{run} {stage}"


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"


def _said(
    rows: list[AccuracyRow],
    target: Target | Mapping[str, Target] | None,
    calibrated: Mapping[str, float],
) -> tuple[str, str, OpenQuestion]:
    """What is found, what to do next, and what is left open."""
    judged = [row for row in rows if row.passed is not None]
    failed = [row for row in judged if not row.passed]
    unknown = [row.metric for row in rows if row.float_value is None]
    if failed:
        missed = ", ".join(f"{row.metric} (needs {row.target:.5g})" for row in failed)
        text = f"target missed for {missed}."
        if _all_reach(failed, calibrated):
            text += " Calibration alone reaches it, so training has lost it and not quantization."
            return text, "Change neither learning rate nor dtypes before you know.", "training"
        return text, f"If it is, {RAISE_POINTS}.", "quantization"
    if judged:
        text = f"target reached for {', '.join(row.metric for row in judged)}."
        is_enough = _all_reach(judged, calibrated)
        return text + (f" {_CALIBRATION_IS_ENOUGH}" if is_enough else ""), "", ""
    if target is None:
        return "no target to judge by; write target: 1%.", "", ""
    if unknown:
        text = f"the float value of {', '.join(unknown)} is not known, so a relative target cannot be judged."
        return text, _WRITE_THE_VALUE, ""
    return "none of these metrics has a target.", "", ""


_CALIBRATION_IS_ENOUGH = "Calibration alone reaches it too: for this target no training is needed."
_WRITE_THE_VALUE = "Write the value to reach (target: 0.97), or evaluate the calibrated model before it is trained."


def _all_reach(rows: list[AccuracyRow], values: Mapping[str, float]) -> bool:
    """Whether the values of a stage reach the targets of all rows."""
    return all(
        row.target is not None and row.metric in values and _reaches(row.metric, values[row.metric], row.target)
        for row in rows
    )


def _reaches(metric: str, value: float, target: float) -> bool:
    return value >= target if higher_is_better(metric) else value <= target
