"""Compare two runs: did the changed points become less sensitive, and how did the accuracy change?

A fix often does not move the accuracy yet: something else still breaks it. But the sensitivity of the changed points
    falls, which shows that the fix was right.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning_qat.analysis.metric_direction import higher_is_better, is_quality
from lightning_qat.analysis.results import Block, Result
from lightning_qat.analysis.runs.run_files import PointKey, RunFiles
from lightning_qat.quantization.errors import ConfigurationError

Outcome = Literal["fell", "same", "rose", "new", "gone"]

LEAST_CHANGE = 0.05
"""Other batches change a score by a few percent: a smaller change counts as the same."""


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
        warnings: reasons why the scores are only roughly comparable.
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
        """Say in a sentence whether the changed points became less sensitive."""
        both = [row for row in self.changed if row.outcome in ("fell", "same", "rose")]
        fell = sum(row.outcome == "fell" for row in both)
        if not self.changed:
            text = "No point was changed."
        else:
            count = "1 point was" if len(self.changed) == 1 else f"{len(self.changed)} points were"
            text = f"{count} changed; of {len(both)} measured in both runs, {fell} fell."
            others = [row.point for row in both if row.outcome != "fell"]
            if others:
                text += f" Did not fall: {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}."
        return " ".join([text, *self.warnings])

    def blocks(self) -> tuple[Block, ...]:
        """The accuracy, then the points."""
        return (*self._accuracy_blocks(), *super().blocks())

    def full_blocks(self) -> tuple[Block, ...]:
        """The accuracy, then the points."""
        return (*self._accuracy_blocks(), *super().full_blocks())

    def _accuracy_blocks(self) -> tuple[Block, ...]:
        return AccuracyComparison(self.accuracy).blocks() if self.accuracy else ()


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
        >>> from pathlib import Path
        >>> place = Path(tempfile.mkdtemp())
        >>> for name, dtype, score in (("a", "int8", 2.0), ("b", "int16", 0.01)):
        ...     _ = (place / f"{name}.csv").write_text(f"point,quant_dtype,score\\nfc.weight,{dtype},{score}\\n")
        >>> result = compare_runs(place / "a.csv", place / "b.csv")
        >>> result.rows[0].change, result.rows[0].outcome, result.rows[0].ratio
        ('dtype int8 -> int16', 'fell', 0.005)
    """
    runs = RunFiles(before), RunFiles(after)
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


def _change(key: PointKey, first: RunFiles, second: RunFiles) -> RunChange:
    region, point = key
    before, after = first.score(key), second.score(key)
    noise = 2 * math.hypot(*(run.score(key, "standard_error") or 0.0 for run in (first, second)))
    by_error = not (first.sensitivity and second.sensitivity)
    own = first.own_sqnr(key), second.own_sqnr(key)
    if by_error:  # the noise of the point itself, if there is no sensitivity
        before, after = map(_noise, own)
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


def _noise(sqnr: float | None) -> float | None:
    """The noise of a point relative to its signal."""
    if sqnr is None or sqnr < -6000:  # beyond what a float holds
        return None if sqnr is None else math.inf
    return float(10 ** (-sqnr / 20))


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
    moved = abs(math.log(row.ratio)) if row.ratio and 0 < row.ratio < math.inf else math.inf
    return not row.change, -moved


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = [name for name in before if name in after and before[name] != after[name]]
    return ", ".join(f"{name} {_word(before[name])} -> {_word(after[name])}" for name in names)


def _word(value: Any) -> str:
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _warnings(first: RunFiles, second: RunFiles) -> list[str]:
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
            if values[0] is not None and values[1] is not None and values[0] != values[1] and is_quality(metric):
                better = (values[1] > values[0]) == higher_is_better(metric)
            found.append(AccuracyChange(metric, stage, *values, better))
    return found
