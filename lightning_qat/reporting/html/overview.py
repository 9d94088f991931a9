"""What a run comes to: one verdict, and the next action. It weighs the verdicts that the run's reports hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lightning_qat.analysis.diagnosis.diagnosis_result import Diagnosis
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.results import Block
from lightning_qat.reporting.html.findings import (
    SOURCES,
    ReportFinding,
    culprits,
    find_all,
    first_action,
    without_verdict,
)
from lightning_qat.reporting.html.run_folder import LADDER_FILES, RunFolder

Level = Literal["good", "bad", "warning", "unknown"]
_NO_TARGET = (
    "Add AccuracyTable(target=...) to the callbacks, or evaluate the checkpoint with it. It says whether the target is "
    "reached."
)
_REACHED = "Nothing has to be done. Export the model with `python -m lightning_qat export`, or try narrower types."
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
        remarks: what else speaks against the run.
        look_at: names of the points to look at first.
        metrics: the metrics of the run, by stage.
        findings: of all reports, the most severe first.
    """

    verdict: str
    level: Level
    sentence: str
    next_action: str
    source: str = ""
    remarks: tuple[str, ...] = ()
    look_at: tuple[str, ...] = ()
    metrics: tuple[Block, ...] = ()
    findings: tuple[ReportFinding, ...] = ()


def judge_run(run: RunFolder) -> Overview:
    """Weigh the verdicts of a run.

    A target that is reached decides: what else was found becomes a remark. Otherwise the check that looks deepest
    decides: the pipeline checks, then convergence, then calibration and the model check, then the diagnosis.

    Args:
        run: its files.
    """
    passed = _passed(run)
    ladder = _bad_ladder(run)
    is_innocent = passed is True or (ladder is not None and ladder[1].verdict != "quantization error")
    findings = find_all(run, is_innocent)
    verdict, level, sentence, source = _verdict(run, passed, findings)
    action = _next_action(run, source, level, findings)
    named = [name for row in _culprits(run)[:5] for name in [f"{row.region}.{row.point}" if row.region else row.point]]
    return Overview(
        verdict,
        level,
        sentence,
        action,
        SOURCES.get(source, source),
        remarks=_remarks(run, source),
        look_at=() if is_innocent else tuple(named),
        metrics=_metrics(run, with_note=source != "accuracy"),
        findings=findings,
    )


def _metrics(run: RunFolder, with_note: bool) -> tuple[Block, ...]:
    blocks = run.accuracy.blocks() if run.accuracy is not None else ()
    return blocks if with_note else tuple(replace(block, note="") for block in blocks)


def _passed(run: RunFolder) -> bool | None:
    """Whether the target is reached; None if nothing is judged."""
    judged = [row.passed for row in run.accuracy.rows if row.passed is not None] if run.accuracy is not None else []
    return all(judged) if judged else None


def _is_calibrated_only(run: RunFolder) -> bool:
    return run.accuracy is not None and "QAT" not in run.accuracy.own


def _verdict(run: RunFolder, passed: bool | None, findings: tuple[ReportFinding, ...]) -> tuple[str, Level, str, str]:
    note = run.accuracy.note if run.accuracy is not None else ""
    if passed:
        worst = [f.source for f in findings if f.advice.level == "error" and f.source != "model_check"]
        stage = " by calibration" if _is_calibrated_only(run) else ""
        return f"target reached{stage}", "warning" if worst else "good", note, "accuracy"
    ladder = _bad_ladder(run)
    if ladder is not None:
        name, result = ladder
        return result.verdict, "bad", without_verdict(result.verdict, result.note), name
    if run.convergence is not None and run.convergence.is_bad:
        note = without_verdict(run.convergence.verdict, run.convergence.note)
        return run.convergence.verdict, "bad", note, "convergence"
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


def _next_action(run: RunFolder, source: str, level: Level, findings: tuple[ReportFinding, ...]) -> str:
    if source == "accuracy" and level == "good":
        return _STILL_TRAINING if run.provenance.get("finished") is False else _REACHED
    ladder = run.ladders.get(source)
    if ladder is not None and ladder.verdict != "quantization error":
        if ladder.cause:
            return f"Mend this first: {ladder.cause.rstrip('.?')}. Then run again: the check says whether it was that."
        return _last_part(without_verdict(ladder.verdict, ladder.note))
    if source == "convergence":
        return first_action(findings, "convergence")
    of_points = first_action(findings, "calibration") or _model_check_error(findings)
    of_points = of_points or first_action(findings, "diagnosis", "calibrated_diagnosis")
    if of_points:
        return of_points
    if run.accuracy is None:
        return _NO_TARGET
    if level == "warning":
        return "Read the findings below: a report speaks against this run although it reaches its target."
    return _last_part(run.accuracy.note)


def _model_check_error(findings: tuple[ReportFinding, ...]) -> str:
    return first_action(tuple(f for f in findings if f.advice.level == "error"), "model_check")


def _bad_ladder(run: RunFolder) -> tuple[str, PipelineResult] | None:
    bad = ((name, run.ladders[name]) for name in LADDER_FILES if name in run.ladders and run.ladders[name].is_bad)
    return next(bad, None)


def _culprits(run: RunFolder) -> tuple[Diagnosis, ...]:
    return culprits(run.start_diagnosis) or culprits(run.diagnosis)


def _remarks(run: RunFolder, source: str) -> tuple[str, ...]:
    """What other reports say against the run, and which model the diagnosis is about."""
    found = [
        f"{SOURCES[name]}: {result.note}"
        for name, result in run.ladders.items()
        if name != source and (result.is_bad or result.verdict == "cannot tell")
    ]
    if source != "convergence" and run.convergence is not None and run.convergence.is_bad:
        found.append(f"convergence: {run.convergence.note}")
    if run.diagnosis is not None and run.diagnosis.remark:
        found.append(run.diagnosis.remark)
    return tuple(found)


def _last_part(note: str) -> str:
    """What follows the first sentence of a note; all of it if there is but one."""
    first, stop, rest = note.partition(". ")
    return rest if stop and rest else first
