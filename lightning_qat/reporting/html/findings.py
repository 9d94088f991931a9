"""The findings of a run, from all its reports, as advice: the most severe first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lightning_qat.analysis.convergence.convergence import ConvergenceResult
from lightning_qat.analysis.convergence.training_series import ConvergenceRow
from lightning_qat.analysis.diagnosis.diagnosis_result import Diagnosis, DiagnosisResult
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.model_check.finding import SEVERITIES
from lightning_qat.analysis.open_question import OpenQuestion
from lightning_qat.analysis.results import Advice
from lightning_qat.reporting.html.point_causes import rules_with_fixed_scale
from lightning_qat.reporting.html.point_history import full_name, point_key
from lightning_qat.reporting.html.run_folder import RunFolder

SOURCES = {
    "pipeline_check": "pipeline check",
    "zero_lr_finetune": "finetune with learning rate 0",
    "float_finetune": "finetune in float",
    "convergence": "convergence",
    "calibration": "calibration",
    "model_check": "model check",
    "calibrated_diagnosis": "diagnosis of the calibrated model",
    "diagnosis": "diagnosis of the latest model",
}
"""What found something, in the order in which its findings stand within a severity."""
_MOST_DIFFERENCES = 8


@dataclass(frozen=True)
class ReportFinding:
    """One finding.

    Args:
        source: a key of :data:`SOURCES`.
        advice: what was found, why, and what to do.
        points: names of the points concerned, as the table of points has them.
        left_open: what another report can tell; part of what to do.
        next_step: the rest of what to do, where something is left open.
    """

    source: str
    advice: Advice
    points: tuple[str, ...] = ()
    left_open: OpenQuestion = ""
    next_step: str = ""

    @property
    def do(self) -> str:
        """What to do about it; empty if it does not say."""
        return next((text for label, text in self.advice.facts if label == "do"), "")


def find_all(run: RunFolder, is_innocent: bool) -> tuple[ReportFinding, ...]:
    """Collect the findings of a run.

    Args:
        run: its files, from :func:`~lightning_qat.reporting.html.point_causes.with_causes`.
        is_innocent: quantization is not to blame: the target is reached, or the pipeline is at fault. Then what a point
            might gain is worth knowing, and no warning.
    """
    found = [*_of_ladders(run), *_of_convergence(run), *_of_diagnoses(run, is_innocent), *_of_model_check(run)]
    order = list(SOURCES)
    found.sort(key=lambda f: (SEVERITIES.index(f.advice.level), order.index(f.source)))
    return tuple(found)


def _of_ladders(run: RunFolder) -> Iterator[ReportFinding]:
    for name, result in run.ladders.items():
        if result.is_bad:
            broken = [row for row in result.rows if row.status in ("breaks", "falls")]
            facts = [("cause", result.cause)] if result.cause else []
            first = [row for row in broken if result.rung is None or row.rung is None or row.rung <= result.rung]
            facts += [(f"rung {r.rung}", f"{r.what}: {r.metric} {_change(r.expected, r.value)}") for r in first]
            if later := dict.fromkeys(f"{row.rung} {row.what}" for row in broken if row not in first):
                text = f"rung {result.rung} is the first that breaks. What does not hold behind it may follow from it:"
                facts.append(("decides", f"{text} {'; '.join(later)} (see Evidence)."))
            facts += [("difference", difference) for difference in _differences(result)]
            if result.next_step and not result.cause and result.verdict != "quantization error":
                facts.append(("do", result.next_step))
            advice = Advice(result.verdict, "error", as_sentence(result.finding), facts=tuple(facts))
            yield ReportFinding(name, advice)


def _differences(result: PipelineResult) -> list[str]:
    rows = [row for table in (result.differences, result.stages) for row in table.rows if row.suspicion == "strong"]
    texts = [row.what for row in rows if row.what != result.cause]
    more = len(texts) - _MOST_DIFFERENCES
    return [*texts[:_MOST_DIFFERENCES], *([f"and {more} more, in the table below"] if more > 0 else [])]


def _of_convergence(run: RunFolder) -> Iterator[ReportFinding]:
    held = run.convergence
    if held is not None and held.is_bad:
        flagged = [row for row in held.rows if row.status == "flagged"]
        for place, row in enumerate(flagged or [first_flag(held)]):  # the first one is the verdict
            advice = _convergence_advice(row, row.check if place else held.verdict)
            yield ReportFinding("convergence", advice, row.names, row.left_open, row.next_step)


def _convergence_advice(row: ConvergenceRow, heading: str) -> Advice:
    facts = (("do", row.advice),) if row.advice else ()
    return Advice(heading, "error", as_sentence(row.evidence), row.names, facts)


def _of_diagnoses(run: RunFolder, is_innocent: bool) -> Iterator[ReportFinding]:
    """That of the model that training started from comes first; the later one adds what is new."""
    level = "info" if is_innocent else "warning"
    known: set[tuple[str, str, str]] = set()
    for name, result in (("calibrated_diagnosis", run.start_diagnosis), ("diagnosis", run.diagnosis)):
        if result is None:
            continue
        if result.calibration:
            yield ReportFinding("calibration", Advice("calibration data", "error", result.calibration))
        for row, rounds in result.worst_rounds():
            about = (row.region, row.point, row.verdict)
            is_said = about in known or (result.calibration and row.verdict == _CALIBRATION)
            if row.verdict not in ("fine", "inherited") and not is_said:
                known.add(about)
                follows = point_key(row.region, row.point) in run.follows
                advice = _diagnosis_advice(row, rounds, "info" if follows else level)
                facts = (*advice.facts, ("measured", measured_on(run, name)))
                yield ReportFinding(name, replace(advice, facts=facts), advice.names)


_CALIBRATION = "calibration data"
_MEASURED = (
    "{model}, with the values that the float model has at this point. The table of points is about those that reach it "
    "in the quantized model."
)


def _diagnosis_advice(row: Diagnosis, rounds: int, level: str) -> Advice:
    facts = [("do", row.action)] if row.action else []
    if row.factor is not None:
        of_what = "relative error" if row.relative else "error"
        facts.append(("gain", f"the {of_what} of this point becomes at least {row.factor:.3g} times smaller"))
    text = f"{row.evidence} This is the worst of {rounds} rounds of {row.loop}." if rounds > 1 else row.evidence
    return Advice(row.verdict, level, text, (full_name(point_key(row.region, row.point)),), tuple(facts), row.yaml)


def _of_model_check(run: RunFolder) -> Iterator[ReportFinding]:
    if run.model_check is not None:
        (block,) = run.model_check.blocks()
        rules = rules_with_fixed_scale(run)
        for finding, advice in zip(run.model_check.findings, block.advice, strict=True):
            keys = [point_key(finding.region, name) for name in finding.names]
            where = {rules[key] for key in keys if key in rules}
            if where:  # a snippet would be a second rule for the point
                facts = (*advice.facts, ("where", ", ".join(sorted(where))))
                advice = replace(advice, yaml="", facts=facts)
            yield ReportFinding("model_check", advice, tuple(map(full_name, keys)))


def measured_on(run: RunFolder, source: str) -> str:
    """Say which model, and which values, the numbers of a diagnosis are about.

    Args:
        run: its files.
        source: a key of :data:`SOURCES`.
    """
    is_latest = source == "diagnosis"
    return _MEASURED.format(model=latest_model(run.comparison.about.get("epoch")) if is_latest else "before training")


def latest_model(epoch: object) -> str:
    """Return which model the latest analyses are about.

    Args:
        epoch: its epoch, as a file has it; None if the file does not say.

    Example:
        >>> latest_model(2), latest_model(None)
        ('at the end of epoch 2, counted from 0', 'at the latest analysis')
    """
    return f"at the end of epoch {epoch}, counted from 0" if isinstance(epoch, int) else "at the latest analysis"


def first_action(findings: tuple[ReportFinding, ...], *sources: str) -> str:
    """Return what to do about the first finding of some sources; empty without one."""
    for finding in findings:
        if finding.source in sources:
            action = finding.do or finding.advice.text
            return f"{finding.points[0]}: {action}" if len(finding.points) == 1 else action
    return ""


def culprits(result: DiagnosisResult | None) -> tuple[Diagnosis, ...]:
    """The points that a diagnosis wants to be looked at, the worst first; the worst round of a loop."""
    return () if result is None else replace(result, rows=tuple(row for row, _ in result.worst_rounds())).culprits


def first_flag(result: ConvergenceResult) -> ConvergenceRow:
    """Return the flagged check that the verdict is about; without one, what the note says.

    Args:
        result: that is bad.
    """
    return next(
        (row for row in result.rows if row.status == "flagged"), ConvergenceRow("", "flagged", evidence=result.note)
    )


def with_verdict(result: PipelineResult) -> str:
    """Return the verdict of a pipeline check and what it has found, without the next step."""
    return result.note if result.finding == result.note else f"{result.verdict}: {result.finding}"


def as_sentence(text: str) -> str:
    """Return a text that stood behind a colon with a capital letter."""
    return text[:1].upper() + text[1:]


def _change(before: float | None, after: float | None) -> str:
    numbers = ["?" if number is None else f"{number:.4g}" for number in (before, after)]
    return " -> ".join(numbers)
