"""Advice about a point begins where the cause lies: in a rule of the user, at a point before it, in the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_qat.analysis.diagnosis.diagnosis_result import Diagnosis, DiagnosisResult
from lightning_qat.analysis.diagnosis.remedy_choice import LEAVE_OUT, REMOVE_SCALE
from lightning_qat.cli.command_line import main
from lightning_qat.reporting.files import write_result
from lightning_qat.reporting.html.judged_run import JudgedRun
from lightning_qat.reporting.html.overview import Overview
from lightning_qat.reporting.html.page import write_report
from lightning_qat.reporting.html.run_folder import read_run
from tests.harness import run_folder
from tests.harness.parsed_page import ParsedPage

FIRST, LATER = "a.output", "b.output"


def written(
    run: Path,
    actions: tuple[str, str] = ("Widen it.", "Widen it."),
    origins: tuple[str, str] = ("own", "inherited"),
    severities: tuple[float, float] = (0.8, 0.5),
    rule: dict[str, object] | None = None,
) -> Path:
    """Two points that clip, the one behind the other."""
    run_folder.write_run(run, [FIRST, LATER])
    place = run / "lightning_qat"
    plan = run_folder.plan([FIRST, LATER])
    if rule is not None:
        plan["regions"][""]["overrides"] = [{"match": "x"}, rule]
        plan["regions"][""]["points"][0]["reason"] = f"override 2 (match {FIRST!r}); input 0"
    (place / "quant_plan.json").write_text(json.dumps(plan))
    compared = [
        {"mod_name": n, "point": n, "SQNR": 1.0, "origin": o} for n, o in zip((FIRST, LATER), origins, strict=True)
    ]
    (place / "layer_comparison.json").write_text(json.dumps({"rows": compared}))
    rows = tuple(
        Diagnosis(name, "clipping", "It clips.", action, f"overrides:\n  - {{match: {name}}}", 4.0, severity=severity)
        for name, action, severity in zip((FIRST, LATER), actions, severities, strict=True)
    )
    write_result(DiagnosisResult(rows), place, "diagnosis")
    run_folder.write_accuracy(run, passed=False)
    return run


def judged(run: Path) -> Overview:
    return JudgedRun.of(read_run(run)).overview


def by_point(run: Path) -> dict[str, tuple[str, str, str]]:
    """Level, what to do, and what to paste, of the findings about points."""
    found = judged(run).findings
    return {f.points[0]: (f.advice.level, dict(f.advice.facts)["do"], f.advice.yaml) for f in found if f.points}


def test_a_point_whose_error_comes_from_a_worse_one_before_it_gets_no_override(tmp_path: Path) -> None:
    run = written(tmp_path)
    found = by_point(run)
    assert found[FIRST][:2] == ("warning", "Widen it.")
    level, action, yaml = found[LATER]
    assert (level, yaml) == ("info", "")
    assert action.startswith(f"Mend {FIRST} first")
    assert judged(run).look_at == (FIRST,)
    data = ParsedPage(write_report([run]).read_text()).data
    verdicts = [row[[c["key"] for c in data["points"]["columns"]].index("verdict")] for row in data["points"]["rows"]]
    assert verdicts == ["clipping", "clipping, follows"]
    assert data["points"]["flagged"] == [0]
    advice = data["advice"]
    assert [a["action"].startswith(f"Mend {FIRST} first") for a in advice.values()] == [False, True]


def test_node_data_say_what_follows_too(tmp_path: Path) -> None:
    run = written(tmp_path)
    assert main(["report", str(run), "--node-data", "verdict"]) == 0
    results = json.loads((run / "lightning_qat" / "node_data_verdict.json").read_text())["results"]
    assert {name: one["value"] for name, one in results.items()} == {FIRST: "clipping", LATER: "clipping, follows"}


@pytest.mark.parametrize(
    ("origins", "severities"),
    [(("own", "own"), (0.8, 0.5)), (("inherited", "inherited"), (0.8, 0.5)), (("own", "inherited"), (0.1, 0.5))],
)
def test_a_point_keeps_its_advice_unless_another_explains_it(
    tmp_path: Path, origins: tuple[str, str], severities: tuple[float, float]
) -> None:
    found = by_point(written(tmp_path, origins=origins, severities=severities))
    assert found[LATER][:2] == ("warning", "Widen it.")
    assert found[LATER][2]


def test_points_on_another_branch_explain_nothing(tmp_path: Path) -> None:
    run = written(tmp_path)
    path = run / "lightning_qat" / "quant_plan.json"
    plan = json.loads(path.read_text())
    for op in plan["regions"][""]["ops"]:
        op["inputs"] = []
    path.write_text(json.dumps(plan))
    assert by_point(run)[LATER][1] == "Widen it."


@pytest.mark.parametrize("origin", ["own", "inherited"])
def test_the_worst_round_of_a_loop_is_found_by_the_name_of_its_point(tmp_path: Path, origin: str) -> None:
    """All that finds a point by its name: marks, links, what to look at first, what follows from another point."""
    rounds, line = ["mul_1.output", "mul.output", "mul_2.output"], "mul in net.py:3"
    names = [FIRST, "mul.output", "mul_1.output", "mul_2.output"]
    run = run_folder.write_run(tmp_path, names)
    place = run / "lightning_qat"
    compared = [{"mod_name": n, "point": n, "SQNR": 1.0, "origin": "own" if n == FIRST else origin} for n in names]
    (place / "layer_comparison.json").write_text(json.dumps({"rows": compared}))
    rows = [Diagnosis(FIRST, "clipping", "It clips.", "Widen it.", severity=0.95)]
    for name, severity in zip(rounds, (0.9, 0.5, 0.4), strict=True):
        rows.append(Diagnosis(name, "rounding", "It rounds.", "Widen it.", severity=severity, loop=line))
    write_result(DiagnosisResult(tuple(rows)), place, "diagnosis")
    write_result(DiagnosisResult(tuple(rows[:3])), place, "calibrated_diagnosis")  # it has the loop with fewer rounds
    overview = judged(run)
    own = origin == "own"
    (finding,) = (found for found in overview.findings if found.advice.heading == "rounding")
    assert finding.points == finding.advice.names == (rounds[0],)
    assert finding.advice.text == f"It rounds. This is the worst of 2 rounds of {line}."
    assert finding.advice.level == ("warning" if own else "info")
    assert overview.look_at == ((FIRST, rounds[0]) if own else (FIRST,))
    assert overview.flagged == {FIRST, *rounds[:own]}
    page = write_report([run]).read_text()
    assert ParsedPage(page).data["points"]["flagged"] == ([0, 2] if own else [0])
    assert f'<a class="name" href="#point={rounds[0]}">' in page


@pytest.mark.parametrize("ending", [LEAVE_OUT, REMOVE_SCALE])
def test_a_fixed_scale_of_the_user_is_removed_where_it_stands(tmp_path: Path, ending: str) -> None:
    """No snippet: a second rule for the point would leave the first one in the configuration."""
    rule = {"match": FIRST, "activation": {"fixed_scale": 0.0015}}
    actions = (f"It is too small: {ending} Or fix the scale: 3.17/127.", "Widen it.")
    run = written(tmp_path, actions, rule=rule)
    _, action, yaml = by_point(run)[FIRST]
    run_folder.write_model_check(run, FIRST)
    (checked,) = (f.advice for f in judged(run).findings if f.source == "model_check")
    assert dict(checked.facts)["where"] == f"override 2 (match {FIRST!r}) of the configuration"
    assert not checked.yaml
    where = f"It stands in override 2 (match {FIRST!r}) of the configuration. This point needs no other override."
    assert (action, yaml) == (f"It is too small: {ending} {where}", "")
    assert judged(run).next_action == f"{FIRST}: {action}"


def test_a_scale_that_no_rule_fixes_keeps_its_snippet(tmp_path: Path) -> None:
    actions = (f"It is too small: {LEAVE_OUT}", "Widen it.")
    found = by_point(written(tmp_path, actions, rule={"match": FIRST, "activation": {"dtype": "int8"}}))
    assert found[FIRST][1] == actions[0]
    assert found[FIRST][2]


def test_points_wait_for_the_pipeline(tmp_path: Path) -> None:
    run = written(tmp_path)
    run_folder.write_ladder(run, "pipeline misaligned")
    for level, action, _ in by_point(run).values():
        assert level == "info"
        assert action == "Mend the pipeline first, then run again: this may follow from it. If it does not: Widen it."
    run_folder.write_ladder(run, "quantization error")
    assert by_point(run)[FIRST][1] == "Widen it."
