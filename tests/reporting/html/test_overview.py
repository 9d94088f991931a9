"""The first screen: which of the verdicts in a run's files is the verdict, and what is to be done next.

A wrong verdict costs more than a crash, so every combination that a run can leave stands here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from lightning_qat.analysis.convergence.convergence import ConvergenceResult
from lightning_qat.analysis.convergence.training_series import ConvergenceRow
from lightning_qat.analysis.diagnosis.diagnosis_result import DiagnosisResult
from lightning_qat.analysis.fingerprint.difference import PipelineDifference, PipelineDifferences
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.rows import PipelineRow
from lightning_qat.analysis.ladder.rungs import Verdict
from lightning_qat.analysis.open_question import RAISE_POINTS, OpenQuestion, with_question
from lightning_qat.reporting.files import write_json
from lightning_qat.reporting.html.answers import Answers
from lightning_qat.reporting.html.findings import ReportFinding
from lightning_qat.reporting.html.judged_run import JudgedRun
from lightning_qat.reporting.html.overview import Overview
from lightning_qat.reporting.html.page import write_report
from lightning_qat.reporting.html.run_folder import read_run
from tests.harness import run_folder as folder
from tests.harness.parsed_page import ParsedPage

Write = Callable[[Path], None]


def judged(run: Path, *writes: Write) -> Overview:
    folder.write_run(run, 3)
    for write in writes:
        write(run)
    return JudgedRun.of(read_run(run)).overview


def accuracy(passed: bool | None, *stages: str) -> Write:
    return lambda run: folder.write_accuracy(run, passed, stages or ("calibrated", "QAT"))


def ladder(
    verdict: str, finding: str = "it collapses.", next_step: str = "Compare the data.", cause: str = ""
) -> Write:
    return lambda run: folder.write_ladder(run, verdict, finding, next_step, cause)  # type: ignore[arg-type]


def convergence(verdict: str) -> Write:
    return lambda run: folder.write_convergence(run, verdict)


def diagnosis(*points: str) -> Write:
    return lambda run: folder.write_diagnosis(run, *points)


def model_check(severity: str) -> Write:
    return lambda run: folder.write_model_check(run, "fc", severity=severity)


def finished(value: bool) -> Write:
    def write(run: Path) -> None:
        (run / "lightning_qat" / "provenance.json").write_text(json.dumps({"finished": value}))

    return write


@pytest.mark.parametrize(
    ("writes", "verdict", "level"),
    [
        ([accuracy(True), ladder("healthy"), convergence("healthy")], "target reached", "good"),
        ([accuracy(True), diagnosis("a.weight"), model_check("warning")], "target reached", "good"),
        ([accuracy(True), ladder("cannot tell"), convergence("too early")], "target reached", "good"),
        ([accuracy(True), model_check("error")], "target reached", "good"),
        ([accuracy(True), convergence("diverging")], "target reached", "warning"),
        ([accuracy(True), ladder("pipeline misaligned")], "target reached", "warning"),
        ([accuracy(True, "calibrated")], "target reached by calibration", "good"),
        ([accuracy(False), ladder("pipeline misaligned"), convergence("diverging")], "pipeline misaligned", "bad"),
        ([accuracy(False), ladder("healthy"), convergence("diverging")], "diverging", "bad"),
        ([accuracy(False), ladder("healthy"), convergence("healthy")], "target missed", "bad"),
        ([accuracy(False, "calibrated")], "target missed by calibration alone", "warning"),
        ([ladder("hyperparameters")], "hyperparameters", "bad"),
        ([accuracy(None), ladder("healthy")], "nothing wrong found", "unknown"),
        ([diagnosis("a.weight")], "not judged", "unknown"),
        ([model_check("error")], "unfused", "bad"),
        ([model_check("info")], "nothing wrong found", "unknown"),
        ([], "nothing wrong found", "unknown"),
    ],
)
def test_the_verdict_is_that_of_the_check_that_looks_deepest(
    tmp_path: Path, writes: list[Write], verdict: str, level: str
) -> None:
    found = judged(tmp_path, *writes)
    assert (found.verdict, found.level) == (verdict, level)
    assert found.next_action
    assert found.sentence


def test_a_running_training_is_not_called_sick_by_what_calibration_lost(tmp_path: Path) -> None:
    found = judged(tmp_path, accuracy(False, "calibrated"), finished(False))
    assert (found.verdict, found.level) == ("training goes on", "unknown")
    reached = judged(tmp_path / "other", accuracy(True, "calibrated"), finished(False))
    assert (reached.verdict, reached.level) == ("target reached by calibration", "good")
    assert "Wait for the end of the run" in reached.next_action


@pytest.mark.parametrize(
    ("writes", "action"),
    [
        (
            [ladder("pipeline misaligned", "it falls.", "Compare the data.")],
            "Compare the data.",
        ),
        (
            [ladder("pipeline misaligned", cause="channels are swapped")],
            "Mend what differs first:\n- channels are swapped\n",
        ),
        ([convergence("diverging")], "Lower the learning rate."),
        ([accuracy(False), diagnosis("a.weight")], "Calibrate anew."),
        ([accuracy(False), ladder("quantization error"), diagnosis("a.weight")], "Calibrate anew."),
        ([accuracy(False), ladder("quantization error", next_step="Calibrate with other data.")], "with other data."),
        ([accuracy(False), model_check("error"), diagnosis("a.weight")], "Mark it."),
        ([accuracy(False)], "PipelineCheck() says whether it is quantization."),
        ([accuracy(False), ladder("healthy")], "The pipeline check on this page (healthy) says whether it is quant"),
        ([], "Add AccuracyTable(target=...)"),
    ],
)
def test_the_next_action_is_that_of_the_verdict(tmp_path: Path, writes: list[Write], action: str) -> None:
    assert action in judged(tmp_path, *writes).next_action


def test_points_to_look_at_are_those_of_the_diagnosis_unless_the_target_is_reached(tmp_path: Path) -> None:
    assert judged(tmp_path / "a", accuracy(False), diagnosis("b.weight", "a.weight")).look_at == (
        "b.weight",
        "a.weight",
    )
    assert judged(tmp_path / "b", accuracy(True), diagnosis("b.weight")).look_at == ()


def test_no_point_is_blamed_where_the_pipeline_is_at_fault(tmp_path: Path) -> None:
    misaligned = judged(tmp_path, accuracy(False), ladder("pipeline misaligned"), diagnosis("b.weight"))
    assert misaligned.look_at == ()
    assert [f.advice.level for f in misaligned.findings if f.source == "diagnosis"] == ["info"]


@pytest.mark.parametrize(
    ("writes", "said"),
    [
        ([accuracy(True), diagnosis("a.weight")], "none has to be changed"),
        ([accuracy(False), ladder("pipeline misaligned"), diagnosis("a.weight")], "none is to blame"),
        ([accuracy(True), ladder("pipeline misaligned")], "none is to blame"),
        ([accuracy(True), convergence("diverging")], ""),
        ([accuracy(False), ladder("quantization error"), diagnosis("a.weight")], ""),
        ([accuracy(False)], ""),
    ],
)
def test_that_no_point_is_to_blame_is_said_where_it_is_known(tmp_path: Path, writes: list[Write], said: str) -> None:
    found = judged(tmp_path, *writes)
    assert said in found.no_point
    assert bool(found.no_point) == bool(said)
    assert not (found.no_point and found.look_at)


def test_a_later_diagnosis_adds_what_the_first_has_not_said(tmp_path: Path) -> None:
    def write(run: Path) -> None:
        folder.write_diagnosis(run, "a.weight", name="calibrated_diagnosis")

    found = judged(tmp_path, accuracy(False), write, diagnosis("b.weight", "a.weight"))
    assert [(f.source, f.points) for f in found.findings] == [
        ("calibrated_diagnosis", ("a.weight",)),
        ("diagnosis", ("b.weight",)),
    ]
    assert found.look_at == ("a.weight",)


def test_a_finding_and_the_table_say_of_which_model_their_numbers_are(tmp_path: Path) -> None:
    """The diagnosis looks at the float model's values, before training or at an epoch; the table at quantized ones."""

    first, second, _ = folder.point_names(3)

    def write(run: Path) -> None:
        folder.write_diagnosis(run, first, name="calibrated_diagnosis")
        (run / "lightning_qat" / "layer_comparison.json").write_text(json.dumps({"epoch": 7, "rows": []}))

    found = judged(tmp_path, accuracy(False), write, diagnosis(second))
    before, later = (dict(finding.advice.facts)["measured"] for finding in found.findings)
    assert before.startswith("before training, with the values that the float model has")
    assert later.startswith("at the end of epoch 7, counted from 0, with the values that the float model has")
    page = ParsedPage(write_report([tmp_path]).read_text())
    text = page.text
    assert {one["measured"] for one in page.data["advice"].values()} == {before, later}
    assert "All numbers are those of the quantized model at the end of epoch 2, counted from 0" in text


def test_what_a_point_might_gain_is_no_warning_if_the_target_is_reached(tmp_path: Path) -> None:
    def levels(findings: tuple[ReportFinding, ...]) -> list[str]:
        return [finding.advice.level for finding in findings if finding.source == "diagnosis"]

    assert levels(judged(tmp_path / "a", accuracy(True), diagnosis("a.weight")).findings) == ["info"]
    assert levels(judged(tmp_path / "b", accuracy(False), diagnosis("a.weight")).findings) == ["warning"]


def test_findings_are_sorted_by_severity_and_then_by_what_looks_deepest(tmp_path: Path) -> None:
    found = judged(
        tmp_path, diagnosis("a.weight"), model_check("warning"), convergence("diverging"), ladder("quantization error")
    )
    assert [(f.source, f.advice.level) for f in found.findings] == [
        ("pipeline_check", "error"),
        ("convergence", "error"),
        ("model_check", "warning"),
        ("diagnosis", "warning"),
    ]


def test_the_first_screen_says_one_thing_to_do(tmp_path: Path) -> None:
    """The sentence of a check ends with advice of its own; what stands there is told apart, or replaced by a cause.

    Siblings: the note of the accuracy table, the finding of the same check, the flag of the convergence report.
    """
    check = ladder("quantization error", "it falls.", f"R{RAISE_POINTS[1:]}.")
    alone = judged(tmp_path / "a", accuracy(False), check)
    assert alone.sentence.startswith("It falls.")
    assert alone.next_action == f"R{RAISE_POINTS[1:]}."
    both = judged(tmp_path / "b", accuracy(False), check, diagnosis("a.weight"))
    assert both.next_action == "a.weight: Calibrate anew."
    missed = judged(tmp_path / "c", accuracy(False), diagnosis("a.weight"))
    for found in (both, missed):
        texts = [found.sentence, *(finding.advice.text for finding in found.findings)]
        texts += [block.note for block in found.metrics]
        assert not any("Next:" in text or RAISE_POINTS in text for text in texts)


def test_no_table_or_remark_advises_something_else_than_the_first_screen(tmp_path: Path) -> None:
    """Siblings: the note of the pipeline check, the note and a cell of convergence, a remark, a finding.

    Where the first screen itself says so, it may stand everywhere; so it may where nothing has to be mended.
    """
    check = ladder("quantization error", "it falls.", f"R{RAISE_POINTS[1:]}; evaluate again.")

    def write(run: Path) -> None:
        row = ConvergenceRow("metric", "flagged", 0.1, 0.9, "It fell.", "Calibration had lost it.", (), "points")
        held = ConvergenceResult((row,), "metric collapsed", f"metric collapsed: It fell. {row.advice}", 9, 2)
        write_json(held, run / "lightning_qat" / "convergence.json")

    run = tmp_path / "a"
    found = judged(run, accuracy(False), check, write, diagnosis("a.weight"))
    assert found.next_action == "a.weight: Calibrate anew."
    text = ParsedPage(write_report([run]).read_text()).text
    assert RAISE_POINTS not in text
    assert "First do what stands under Next. Calibration had lost it." in text
    alone = judged(tmp_path / "b", accuracy(False), check, write)
    assert alone.next_action.startswith(f"R{RAISE_POINTS[1:]}")
    assert any(RAISE_POINTS in text for finding in alone.findings for _, text in finding.advice.facts)
    reached = judged(tmp_path / "c", accuracy(True), ladder("healthy"))
    assert reached.answers("points", "It fell.") == f"First {RAISE_POINTS}. It fell."


def test_a_flag_that_advises_wider_types_gives_way_to_the_cause_at_a_point(tmp_path: Path) -> None:
    def write(run: Path) -> None:
        row = ConvergenceRow("metric", "flagged", 0.1, 0.9, "It fell.", left_open="points")
        write_json(ConvergenceResult((row,), "diverging", "", 9, 2), run / "lightning_qat" / "convergence.json")

    assert RAISE_POINTS in judged(tmp_path / "a", write).next_action
    assert judged(tmp_path / "b", write, diagnosis("a.weight")).next_action == "a.weight: Calibrate anew."


def test_numbers_of_the_check_are_told_apart_from_those_of_the_run(tmp_path: Path) -> None:
    def write(run: Path) -> None:
        row = PipelineRow(6, "QAT", "val_acc", 0.9, 0.2, 0.05, "breaks")
        note = "quantization error (rung 6): it falls."
        result = PipelineResult((row,), "quantization error", note, 6, finding="it falls.")
        write_json(result, run / "lightning_qat" / "pipeline_check.json")

    whole = "The run itself, which trains longer than the check, came to val_acc 0.5."
    assert judged(tmp_path / "a", write, accuracy(False)).sentence == f"It falls. {whole}"
    assert "The run itself" not in judged(tmp_path / "b", write, accuracy(False, "calibrated")).sentence


def test_a_setting_that_differs_stands_in_what_to_do(tmp_path: Path) -> None:
    """It says where the difference is made; the inputs that differ only say that there is one."""

    def row(suspicion: str, part: str, what: str) -> PipelineDifference:
        return PipelineDifference(suspicion, part, "", "", "", what)  # type: ignore[arg-type]

    def write(run: Path) -> None:
        rows = (
            row("strong", "model input (train)", "mean 0 -> 5: normalization missing here?"),
            row("possible", "attribute", "Digits normalized: True -> False ((the module itself))"),
            row("possible", "settings", "settings seed: 1 -> 2"),
            row("unlikely", "attribute", "Digits lr: 0.1 -> 0.01"),
        )
        result = PipelineResult((), "pipeline misaligned", "it falls.", 2, rows[0].what, PipelineDifferences(rows))
        write_json(result, run / "lightning_qat" / "pipeline_check.json")

    assert judged(tmp_path, write).next_action.splitlines() == [
        "Mend what differs from the float run first (float run -> here):",
        "- mean 0 -> 5: normalization missing here?",
        "- Digits normalized: True -> False",
        "Then run again: the check says whether it was that.",
    ]


def test_the_rung_that_decides_is_shown_and_those_behind_it_are_named(tmp_path: Path) -> None:
    def write(run: Path) -> None:
        rows = [PipelineRow(n, f"rung {n}", "val_acc", 0.9, 0.2, 0.05, s) for n, s in ((2, "falls"), (3, "breaks"))]
        rows += [PipelineRow(n, f"rung {n}", "val_acc", 0.9, 0.1, 0.05, "breaks") for n in (5, 6)]
        rows.append(PipelineRow(4, "rung 4", "val_acc", 0.9, 0.9, 0.05, "holds"))
        result = PipelineResult(tuple(rows), "pipeline misaligned", "it falls.", 3)
        write_json(result, run / "lightning_qat" / "pipeline_check.json")

    (finding,) = judged(tmp_path, write).findings
    assert finding.advice.facts == (
        ("rung 2", "rung 2: val_acc 0.9 -> 0.2"),
        ("rung 3", "rung 3: val_acc 0.9 -> 0.2"),
        (
            "decides",
            "rung 3 is the first that breaks. What does not hold behind it may follow from it: 5 rung 5; 6 rung 6 "
            "(see Evidence).",
        ),
    )


def test_nothing_sends_the_reader_to_a_check_whose_result_is_on_the_page(tmp_path: Path) -> None:
    """Siblings: a remark, the text and the advice of a finding, the note of the accuracy table."""

    def write(run: Path) -> None:
        row = ConvergenceRow("metric", "flagged", 0.1, 0.9, "It fell.", "Change nothing.", left_open="quantization")
        held = ConvergenceResult((row,), "diverging", "", 9, 2)
        write_json(held, run / "lightning_qat" / "convergence.json")
        diagnosis = DiagnosisResult((), "It has diverged.", left_open="quantization")
        write_json(diagnosis, run / "lightning_qat" / "diagnosis.json")

    found = judged(tmp_path / "a", write, accuracy(False), ladder("pipeline misaligned"))
    said = [found.sentence, found.next_action, *found.remarks]
    said += [text for finding in found.findings for _, text in finding.advice.facts]
    assert not any("PipelineCheck()" in text for text in said)
    answered = "The pipeline check on this page answers whether it is quantization: no, pipeline misaligned."
    assert f"diagnosis of the latest model: It has diverged. {answered}" in found.remarks
    undecided = judged(tmp_path / "c", write, accuracy(False), ladder("healthy"))
    said = "The pipeline check on this page (healthy) says whether it is quantization."
    assert f"diagnosis of the latest model: It has diverged. {said}" in undecided.remarks
    without = judged(tmp_path / "b", write, accuracy(False))
    assert without.next_action == "PipelineCheck() says whether it is quantization. Change nothing."


@pytest.mark.parametrize("verdict", [v for v in get_args(Verdict) if v != "cannot tell"])
@pytest.mark.parametrize("left_open", get_args(OpenQuestion))
def test_a_page_with_an_answer_never_asks_the_question(verdict: Verdict, left_open: OpenQuestion) -> None:
    """Whatever is left open, and whatever the check says: the step itself stays."""
    said = Answers(PipelineResult((), verdict), has_next=True)(left_open, "Change nothing.")
    assert "PipelineCheck()" not in said
    assert RAISE_POINTS not in said
    assert said.endswith("Change nothing.")
    blamed = {"quantization": "yes", "training": "no"} if verdict == "quantization error" else {
        "quantization": "no", "training": "yes"
    }  # fmt: skip
    if left_open in blamed and verdict != "healthy":
        assert f": {blamed[left_open]}, {verdict}." in said
    assert Answers()(left_open, "Change nothing.") == with_question(left_open, "Change nothing.")


def test_files_of_earlier_runs_are_shown_with_their_whole_sentences(tmp_path: Path) -> None:
    """They do not tell what was found from what to do: those of the check, the accuracy table and convergence."""

    def without(name: str, *fields: str) -> Write:
        def write(run: Path) -> None:
            path = run / "lightning_qat" / name
            held = json.loads(path.read_text())
            for row in (held, *held["rows"]):
                for field in fields:
                    row.pop(field, None)
            path.write_text(json.dumps(held))

        return write

    parts = ("finding", "next_step", "left_open")
    check = judged(tmp_path / "a", ladder("pipeline misaligned"), without("pipeline_check.json", *parts))
    assert check.sentence == "Pipeline misaligned (rung 2): it collapses. Compare the data."
    assert "Compare the data." in check.next_action
    missed = judged(tmp_path / "b", accuracy(False), without("accuracy.json", *parts))
    assert "target missed for val_acc" in missed.sentence
    assert RAISE_POINTS in missed.next_action
    flagged = judged(tmp_path / "c", convergence("diverging"), without("convergence.json", "left_open"))
    assert (flagged.sentence, flagged.next_action) == ("The loss rises.", "Lower the learning rate.")


@pytest.mark.parametrize(
    ("write", "step"), [(ladder("pipeline misaligned"), "Compare the data."), (convergence("diverging"), "Lower the")]
)
def test_what_to_do_is_said_once(tmp_path: Path, write: Write, step: str) -> None:
    """Under Next, and not in the finding or in a remark again; where something else comes first, in the finding."""
    found = judged(tmp_path, accuracy(False), write)
    assert step in found.next_action
    assert not found.remarks
    assert not any(step in said for finding in found.findings for _, said in finding.advice.facts)
    reached = judged(tmp_path, accuracy(True))
    assert step not in reached.next_action
    assert any(step in said for finding in reached.findings for _, said in finding.advice.facts)


def test_a_cause_is_said_once_above_the_findings(tmp_path: Path) -> None:
    found = judged(tmp_path, ladder("pipeline misaligned", "it falls.", "", "channels are swapped"))
    assert (found.sentence, found.next_action.count("channels are swapped")) == ("It falls.", 1)


@pytest.mark.parametrize(
    ("command", "checkpoints", "expected"),
    [
        (None, [], "train.py --config fit.yaml --ckpt_path best.ckpt"),
        (["python", "fit.py", "fit", "--config=a.yaml"], [], "fit.py --config a.yaml --ckpt_path best.ckpt"),
        (["python", "my fit.py"], ["x.ckpt", "y.ckpt"], "'my fit.py' --ckpt_path best.ckpt"),
    ],
)
def test_the_export_command_has_what_is_known_of_its_arguments(
    tmp_path: Path, command: list[str] | None, checkpoints: list[str], expected: str
) -> None:
    """With several checkpoints it is the user who knows the best one."""

    def write(run: Path) -> None:
        (run / "checkpoints").mkdir()
        for name in checkpoints:
            (run / "checkpoints" / name).touch()
        (run / "lightning_qat" / "provenance.json").write_text(json.dumps({"finished": True, "command": command}))

    action = judged(tmp_path, write, accuracy(True)).next_action
    assert f"`python -m lightning_qat export {expected}` (best.ckpt stands for your checkpoint" in action


def test_the_export_command_names_the_best_checkpoint_of_the_run(tmp_path: Path) -> None:
    """Wherever it is; also where others are beside it."""

    def write(run: Path) -> None:
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "last.ckpt").touch()
        held = {"finished": True, "checkpoint": "logs/my best.ckpt"}
        (run / "lightning_qat" / "provenance.json").write_text(json.dumps(held))

    action = judged(tmp_path, write, accuracy(True)).next_action
    assert "--ckpt_path 'logs/my best.ckpt'`, or" in action


def test_the_export_command_names_the_only_checkpoint(tmp_path: Path) -> None:
    def write(run: Path) -> None:
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "epoch=2.ckpt").touch()

    assert str(tmp_path / "checkpoints" / "epoch=2.ckpt") in judged(tmp_path, write, accuracy(True)).next_action
