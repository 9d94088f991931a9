"""The verdict on every point, and the list of what to do."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from typing_extensions import override

from lightning_qat.analysis.comparison.loop_rounds import worst_rounds
from lightning_qat.analysis.model_check.long_loops import ANNOTATION
from lightning_qat.analysis.open_question import OpenQuestion, with_question
from lightning_qat.analysis.results import Result
from lightning_qat.quantization.planning.target_paths import with_target_path

Verdict = Literal[
    "fine",
    "rounding",
    "clipping",
    "non-uniform",
    "bad scale",
    "config not applied",
    "calibration data",
    "inherited",
]
_SHOWN = 10
_MANY_CLIPPED = 0.25
"""From this share of all points on, clipping has one cause that lies before all of them."""
_LOOP = (
    "as in {rounds} rounds of {line}: if that loop is post-processing, keep it out of the target; else put its body "
    f"into `{ANNOTATION}`, and one override is for all rounds."
)
_OTHER_DATA = (
    "the data, or the weights, are no longer those of calibration. Ask PipelineCheck() before you paste overrides; if "
    "the pipeline is healthy, activation_scales: ema or learned lets the scales follow."
)
_NOTHING_STANDS_OUT = (
    "No point stands out. If the target is missed nevertheless, the types are too coarse as a whole: give the first "
    "points of SensitivityAnalysis() a wider type, or let training find the scales (activation_scales: learned)."
)


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on one point.

    Args:
        point: name of the point.
        verdict: ``fine``; ``rounding``: the step is too coarse; ``clipping``: values outside the range;
            ``non-uniform``: in range, but one step cannot serve large and small values; ``bad scale``: the scale does
            not fit the values or the declared range; ``config not applied``: an override is not in effect;
            ``calibration data``: calibration saw other data than the model is for;
            ``inherited``: the point itself is fine, its tensor is off because of what comes before.
        evidence: why, in numbers.
        action: what to do.
        yaml: override to paste; empty if there is nothing to paste.
        factor: what the error falls by, at least, if that is done; None if that cannot be told. Where ``evidence`` is
            about a part of the values, the error of that part.
        relative: the factor is about the error relative to every single value.
        severity: root mean square error relative to the values; for a divisor, that of its small values; for a part of
            the tensor that is lost, that of the part, relative to its spread.
        score: sensitivity, None if not known.
        region: path of the target in the model, ``""`` for the model itself.
        loop: the line whose round it is, ``<torch function> in <file.py:line>``, if it is in a long loop; else empty.
        after: the error after what ``action`` says, in the measure of ``factor``, relative to the values; None if that
            cannot be told.
    """

    point: str
    verdict: Verdict
    evidence: str
    action: str = ""
    yaml: str = ""
    factor: float | None = None
    relative: bool = False
    severity: float = 0.0
    score: float | None = None
    region: str = ""
    loop: str = ""
    after: float | None = None


@dataclass(frozen=True)
class DiagnosisResult(Result[Diagnosis]):
    """The verdict on every point with a scale: points that need an action first, the worst of them first.

    Args:
        remark: which model it is about, if that is not what is expected; begins the note.
        calibration: why the calibration data are not those the model is for; empty if they are.
        left_open: what another report can tell about that model; the end of the remark.
    """

    remark: str = ""
    calibration: str = ""
    left_open: OpenQuestion = ""
    title: ClassVar[str] = "What to do"
    shown: ClassVar[tuple[str, ...]] = ("point", "verdict", "evidence", "action")

    def columns(self) -> tuple[str, ...]:
        """Names of all columns, also without rows."""
        return tuple(Diagnosis.__dataclass_fields__)

    @override
    def for_people(self) -> DiagnosisResult:
        """The worst of the rounds of a loop that have the same verdict; csv and json hold all."""
        rows = (
            replace(row, point=f"{row.point} (worst of {rounds} rounds)") if rounds > 1 else row
            for row, rounds in self.worst_rounds()
        )
        return replace(self, rows=tuple(rows))

    def worst_rounds(self) -> list[tuple[Diagnosis, int]]:
        """Return the worst of the rounds of a loop that have the same verdict, and their number; 1 outside of loops.

        The rows keep the names of their points. Use them where a point has to be found again.
        """
        return _worst_rounds(self.rows)

    @property
    def by_point(self) -> dict[str, Diagnosis]:
        """Rows by the name of the point."""
        return {row.point: row for row in self.rows}

    @property
    def culprits(self) -> tuple[Diagnosis, ...]:
        """Return the points that need an action, worst first."""
        return tuple(row for row in self.rows if row.verdict not in ("fine", "inherited"))

    @property
    def note(self) -> str:
        """Say what the table is about, and count the points by verdict."""
        return " ".join(part for part in (self._remark, self.calibration, self._counts) if part)

    @property
    def _remark(self) -> str:
        return f"{self.remark} {with_question(self.left_open)}".strip()

    @property
    def _counts(self) -> str:
        counts = {v: sum(row.verdict == v for row in self.rows) for v in ("fine", "inherited")}
        return f"{len(self.culprits)} points to look at, {counts['fine']} fine, {counts['inherited']} inherited"

    @classmethod
    def merged(cls, results: Mapping[str, DiagnosisResult]) -> DiagnosisResult:
        """Put the results of several regions together, by the paths of their targets; sorted anew.

        With more than one, the overrides to paste say which target they are about.
        """
        rows = [replace(row, region=name) for name, result in results.items() for row in result.rows]
        if len(results) > 1:
            rows = [replace(row, yaml=with_target_path(row.yaml, row.region)) for row in rows]
        return cls(tuple(sorted(rows, key=severest_first)))

    def with_foreign_data(
        self, text: str, action: str, regions: Mapping[str, Mapping[str, str]], calibrated: Collection[tuple[str, str]]
    ) -> DiagnosisResult:
        """Blame the calibration data for what is wrong with activations; no override is advised for them.

        Args:
            text: why the calibration data are not those the model is for, and what to do.
            action: what to do, in short.
            regions: by the path of the region and the name of the point: what it holds in both.
            calibrated: path of the region and name of every activation whose scale follows from the data.
        """
        rows = []
        for row in self.rows:
            is_off = row.verdict not in ("fine", "inherited", "config not applied")
            if is_off and (row.region, row.point) in calibrated:
                row = replace(
                    row,
                    verdict="calibration data",
                    evidence=regions.get(row.region, {}).get(row.point, row.evidence),
                    action=action,
                    yaml="",
                    factor=None,
                    relative=False,
                    after=None,
                )
            rows.append(row)
        rows.sort(key=lambda row: (row.verdict != "calibration data", *severest_first(row)))
        return replace(self, rows=tuple(rows), calibration=text)

    def lines(self, limit: int = _SHOWN) -> tuple[str, ...]:
        """Return the short list "what to do", worst first, with the YAML to paste."""
        found = self.culprits
        lines = [self._remark] if self._remark else []
        lines.append(f"What to do: {self._counts}.")
        if self.calibration:
            lines.append(self.calibration)
            found = tuple(row for row in found if row.verdict != "calibration data")
        clipped = sum(row.verdict == "clipping" for row in found)
        if not self.culprits and not self.calibration:
            lines.append(_NOTHING_STANDS_OUT)
        elif _MANY_CLIPPED * len(self.rows) <= clipped > 1:
            lines.append(f"{clipped} of {len(self.rows)} points clip: {_OTHER_DATA}")
        kept = _worst_rounds(found)
        for number, (row, rounds) in enumerate(kept[:limit], 1):
            also = f", {_LOOP.format(rounds=rounds, line=row.loop)}" if rounds > 1 else "."
            lines.append(f"{number}. {_name(row)}: {row.verdict}{also} {row.evidence} {row.action}".rstrip())
            lines += [f"     {line}" for line in row.yaml.split("\n") if line]
        if len(kept) > limit:
            lines.append(f"{len(kept) - limit} more are in diagnosis.json and .txt.")
        return tuple(lines)


def _worst_rounds(rows: Sequence[Diagnosis]) -> list[tuple[Diagnosis, int]]:
    """Of the rounds of a loop with the same verdict, the first, which is the worst."""

    def loop(row: Diagnosis) -> tuple[str, ...]:
        return (row.region, row.loop, row.point.rpartition(".")[2], row.verdict) if row.loop else ()

    return worst_rounds(rows, loop, lambda row: 0.0)


def severest_first(row: Diagnosis) -> tuple[bool, bool, float]:
    """Return a sort key: points that need an action first, by their sensitivity where it is known."""
    done = row.verdict in ("fine", "inherited")
    size = row.severity if row.score is None else row.score
    return done, row.score is None, -math.inf if math.isnan(size) else -size  # nan: it breaks the output


def _name(row: Diagnosis) -> str:
    return f"{row.region}.{row.point}" if row.region else row.point
