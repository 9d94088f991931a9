"""What a run comes to: one verdict, and the next action. It weighs the verdicts that the run's reports hold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_qat.analysis.fingerprint.module_differences import ATTRIBUTES
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.rungs import QAT
from lightning_qat.analysis.open_question import RAISE_POINTS
from lightning_qat.analysis.results import Block
from lightning_qat.reporting.html.answers import Answers
from lightning_qat.reporting.html.findings import (
    SOURCES,
    ReportFinding,
    as_sentence,
    culprits,
    find_all,
    first_action,
    first_flag,
)
from lightning_qat.reporting.html.point_causes import bad_ladder, pipeline_is_at_fault
from lightning_qat.reporting.html.point_history import PointKey, full_name, point_key
from lightning_qat.reporting.html.provenance import ANY_CHECKPOINT, export_command, known_checkpoint
from lightning_qat.reporting.html.run_folder import RunFolder

Level = Literal["good", "bad", "warning", "unknown"]
_NO_TARGET = (
    "Add AccuracyTable(target=...) to the callbacks, or evaluate the checkpoint with it. It says whether the target is "
    "reached."
)
_REACHED = "Nothing has to be mended. Export the model with `{command}`{unknown}, or try narrower types."
_UNKNOWN_CHECKPOINT = f" ({ANY_CHECKPOINT} stands for your checkpoint: the run names none)"
_ABOUT_POINTS = ("calibrated_diagnosis", "diagnosis")
_DIFFERS = "Mend what differs first:"
_DIFFERS_FROM_FLOAT = "Mend what differs from the float run first (float run -> here):"
_CHECKS_AGAIN = "Then run again: the check says whether it was that."
_STILL_TRAINING = "Wait for the end of the run, or stop it: calibration alone reaches the target already."


@dataclass(frozen=True)
class Overview:
    """The first screen.

    Args:
        verdict: in a few words.
        level: how good that is.
        sentence: the verdict as a sentence.
        next_action: what to do now.
        source: whose verdict it is.
        remarks: what is no finding: which check could not tell, and which model a diagnosis is about.
        look_at: names of the points to look at first.
        no_point: why there are none, if that is known.
        metrics: the metrics of the run, by stage.
        findings: of all reports, the most severe first.
        answers: what the page says in place of what a report leaves open.
    """

    verdict: str
    level: Level
    sentence: str
    next_action: str
    source: str = ""
    remarks: tuple[str, ...] = ()
    look_at: tuple[str, ...] = ()
    no_point: str = ""
    metrics: tuple[Block, ...] = ()
    findings: tuple[ReportFinding, ...] = ()
    answers: Answers = field(default_factory=Answers)

    @property
    def flagged(self) -> frozenset[str]:
        """Names of the points that the diagnosis warns of."""
        warned = (f for f in self.findings if f.source in _ABOUT_POINTS and f.advice.level != "info")
        return frozenset(name for finding in warned for name in finding.points)


def judge_run(run: RunFolder) -> Overview:
    """Weigh the verdicts of a run.

    A target that is reached decides: what else was found stays a finding. Otherwise the check that looks deepest
    decides: the pipeline checks, then convergence, then calibration and the model check, then the diagnosis.

    Args:
        run: its files, from :func:`~lightning_qat.reporting.html.point_causes.with_causes`.
    """
    passed = _passed(run)
    is_innocent = passed is True or pipeline_is_at_fault(run)
    findings = find_all(run, is_innocent)
    verdict, level, sentence, source = _verdict(run, passed, findings)
    answers = Answers(run.ladders.get("pipeline_check"))
    action = _next_action(run, source, level, findings, answers)
    answers = replace(answers, has_next=level != "good" and RAISE_POINTS.lower() not in action.lower())
    findings = tuple(_answered(answers, finding) for finding in findings)
    if source in run.ladders and any(row.rung == QAT and row.metric for row in run.ladders[source].rows):
        sentence = f"{sentence} {_whole_run(run)}".rstrip()
    named = tuple(map(full_name, _culprits(run)[:5]))
    return Overview(
        verdict,
        level,
        sentence,
        action,
        SOURCES.get(source, source),
        remarks=_remarks(run, answers),
        look_at=() if is_innocent else named,
        no_point=_no_point(run, level),
        metrics=_metrics(run, with_note=source != "accuracy"),
        findings=tuple(_without_repetition(finding, source, sentence, action) for finding in findings),
        answers=answers,
    )


def _no_point(run: RunFolder, level: Level) -> str:
    """Why there is no point to look at; empty where points are judged one by one."""
    if level == "good":
        return "Points: none has to be changed for this target."
    return "Points: none is to blame, because quantization is not the cause." if pipeline_is_at_fault(run) else ""


def _without_repetition(finding: ReportFinding, source: str, sentence: str, action: str) -> ReportFinding:
    """Leave out what the first screen has already said; a text stays if nothing else would be left."""
    if finding.source != source:
        return finding
    advice = replace(finding.advice, facts=tuple(fact for fact in finding.advice.facts if fact != ("do", action)))
    is_said = bool(advice.facts) and sentence.startswith(advice.text)
    return replace(finding, advice=replace(advice, text="") if is_said else advice)


def _metrics(run: RunFolder, with_note: bool) -> tuple[Block, ...]:
    held = run.accuracy
    return replace(held, note=held.finding if with_note else "").blocks() if held is not None else ()


def _passed(run: RunFolder) -> bool | None:
    """Whether the target is reached; None if nothing is judged."""
    judged = [row.passed for row in run.accuracy.rows if row.passed is not None] if run.accuracy is not None else []
    return all(judged) if judged else None


def _is_calibrated_only(run: RunFolder) -> bool:
    return run.accuracy is not None and "QAT" not in run.accuracy.own


def _verdict(run: RunFolder, passed: bool | None, findings: tuple[ReportFinding, ...]) -> tuple[str, Level, str, str]:
    note = run.accuracy.finding if run.accuracy is not None else ""
    if passed:
        worst = [f.source for f in findings if f.advice.level == "error" and f.source != "model_check"]
        stage = " by calibration" if _is_calibrated_only(run) else ""
        return f"target reached{stage}", "warning" if worst else "good", note, "accuracy"
    ladder = bad_ladder(run)
    if ladder is not None:
        name, result = ladder
        return result.verdict, "bad", as_sentence(result.finding), name
    if run.convergence is not None and run.convergence.is_bad:
        return run.convergence.verdict, "bad", as_sentence(first_flag(run.convergence).evidence), "convergence"
    if passed is False and _is_calibrated_only(run):
        if run.provenance.get("finished") is False:
            text = "The calibrated model misses the target. Training goes on, and may win it back."
            return "training goes on", "unknown", f"{text} {note}", "accuracy"
        return "target missed by calibration alone", "warning", note, "accuracy"
    if passed is False:
        return "target missed", "bad", note, "accuracy"
    if any(f.advice.level == "error" for f in findings):
        first = findings[0]
        return first.advice.heading, "bad", first.advice.text, first.source
    if any(f.advice.level == "warning" for f in findings):
        text = "There are warnings, and no accuracy to judge the run by."
        return "not judged", "unknown", text, findings[0].source
    return "nothing wrong found", "unknown", "No report of this run finds a fault; its accuracy is not known.", ""


def _next_action(
    run: RunFolder, source: str, level: Level, findings: tuple[ReportFinding, ...], answers: Answers
) -> str:
    if source == "accuracy" and level == "good":
        return (
            _STILL_TRAINING
            if run.provenance.get("finished") is False
            else _REACHED.format(
                command=export_command(run.path, run.provenance),
                unknown="" if known_checkpoint(run.path, run.provenance) else _UNKNOWN_CHECKPOINT,
            )
        )
    ladder = run.ladders.get(source)
    if ladder is not None and ladder.verdict != "quantization error":
        return _mend(ladder) if ladder.cause else ladder.next_step or ladder.note
    of_points = first_action(findings, "calibration") or _model_check_error(findings)
    of_points = of_points or first_action(findings, "diagnosis", "calibrated_diagnosis")
    if source == "convergence":
        flag = next(finding for finding in findings if finding.source == source)
        if not (flag.left_open == "points" and of_points):
            return first_action((_answered(answers, flag),), source)
    if of_points:
        return of_points
    if ladder is not None and ladder.next_step:
        return ladder.next_step
    if run.accuracy is None:
        return _NO_TARGET
    if level == "warning":
        return "Read the findings below: a report speaks against this run although it reaches its target."
    return answers(run.accuracy.left_open, run.accuracy.next_step) or run.accuracy.finding


def _mend(ladder: PipelineResult) -> str:
    """The cause, and the settings of the user's own modules that differ: they often say where it is made."""
    rows = ladder.differences.rows
    settings = [row.what for row in rows if row.part == ATTRIBUTES and row.suspicion != "unlikely"]
    texts = [text.replace(" ((the module itself))", "") for text in settings if text != ladder.cause]
    lead = _DIFFERS_FROM_FLOAT if any(row.what == ladder.cause for row in rows) else _DIFFERS
    return "\n".join([lead, *(f"- {text}" for text in (ladder.cause, *texts[:3])), _CHECKS_AGAIN])


def _whole_run(run: RunFolder) -> str:
    """What the run itself came to: the pipeline check trains a copy for some batches, and the table has the run."""
    if run.accuracy is None or "QAT" not in run.accuracy.own:
        return ""
    column = f"{run.accuracy.run} QAT"
    values = [f"{row.metric} {row.values[column]:.4g}" for row in run.accuracy.rows if column in row.values]
    return f"The run itself, which trains longer than the check, came to {', '.join(values[:2])}." if values else ""


def _answered(answers: Answers, finding: ReportFinding) -> ReportFinding:
    if not finding.left_open:
        return finding
    step = answers(finding.left_open, finding.next_step)
    facts = tuple((label, step if label == "do" else text) for label, text in finding.advice.facts)
    return replace(finding, advice=replace(finding.advice, facts=facts))


def _model_check_error(findings: tuple[ReportFinding, ...]) -> str:
    return first_action(tuple(f for f in findings if f.advice.level == "error"), "model_check")


def _culprits(run: RunFolder) -> tuple[PointKey, ...]:
    found = culprits(run.start_diagnosis) or culprits(run.diagnosis)
    return tuple(key for row in found if (key := point_key(row.region, row.point)) not in run.follows)


def _remarks(run: RunFolder, answers: Answers) -> tuple[str, ...]:
    """Which check could not tell, and which model the diagnosis is about."""
    found = [f"{SOURCES[name]}: {held.note}" for name, held in run.ladders.items() if held.verdict == "cannot tell"]
    if run.diagnosis is not None and run.diagnosis.remark:
        remark = f"{run.diagnosis.remark} {answers(run.diagnosis.left_open)}".rstrip()
        found.append(f"{SOURCES['diagnosis']}: {remark}")
    return tuple(found)
