"""What the page reads of a run beside the tables: histograms, depth, graph, front, gaps, provenance; damaged files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_qat.analysis.convergence.convergence import ConvergenceResult
from lightning_qat.analysis.convergence.training_series import ConvergenceRow
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.rows import PipelineRow
from lightning_qat.reporting.files import write_json
from lightning_qat.reporting.growing_table import GrowingTable
from lightning_qat.reporting.html.background import background, compared_runs, find_gaps, float_places
from lightning_qat.reporting.html.drawings import depth, first_jump, graph, histograms
from lightning_qat.reporting.html.front import front_choices
from lightning_qat.reporting.html.judged_run import JudgedRun
from lightning_qat.reporting.html.page_data import page_data
from lightning_qat.reporting.html.point_history import MOST_EPOCHS, read_history
from lightning_qat.reporting.html.point_table import COLUMNS, point_table
from lightning_qat.reporting.html.run_folder import read_run
from tests.harness import run_folder as folder
from tests.harness.damage import damaged_bytes


def put(run: Path, name: str, document: Any) -> None:
    (run / "lightning_qat" / name).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ([50, 48, 47], None),
        ([50, 43.9, 30], 1),
        ([50, 60, 54, 44.1, 43.9], None),  # step by step
        ([50, 60, 54, 44, 30], 3),
        ([None, "inf", 50, None, 44], 4),
        ([10], None),
        ([], None),
    ],
)
def test_first_jump_is_where_the_ratio_falls_a_bit_below_the_lowest_before(
    values: list[Any], place: int | None
) -> None:
    assert first_jump(values) == place


def test_depth_is_that_of_the_layer_comparison_if_there_is_one(tmp_path: Path) -> None:
    run = folder.write_run(tmp_path, ["a.weight", "a.output", "b.output"])
    alone = depth(read_run(run), point_table(read_run(run)))
    assert alone["points"] == [0, 1, 2]
    assert alone["accumulated"] == []
    rows = [
        {"mod_name": "a", "base_op_type": "conv2d", "point": "a.output", "SQNR": 40.0, "own_SQNR": 41.0, "region": ""},
        {"mod_name": "a.weight", "base_op_type": "weight", "point": "a.weight", "SQNR": 10.0, "own_SQNR": 10.0},
        {"mod_name": "b", "base_op_type": "add", "point": "", "SQNR": 30.0, "own_SQNR": None, "region": ""},
    ]
    put(run, "layer_comparison.json", {"rows": rows})
    found = depth(read_run(run), point_table(read_run(run)))
    assert found.pop("low") == []
    assert found == {"names": ["a", "b"], "points": [1, None], "accumulated": [40, 30], "own": [41, None], "jump": 1}


@pytest.mark.parametrize("compared", [True, False])
def test_a_low_ratio_is_one_that_the_diagnosis_does_not_call_fine(tmp_path: Path, compared: bool) -> None:
    """Three bits worse than an even spread: 30.1 dB at int8, 48.2 dB at int16; half of the points may be low.

    Siblings: with and without a layer comparison, a type that is not quantized, one that does not exist.
    """
    own = {"a.output": 30.2, "b.output": 1.5, "c.output": 29.9, "d.output": 40.0, "e.output": 1.0, "f.output": 1.0}
    types = dict(zip(own, ("int8", "int8", "int8", "int16", "float32", "int99"), strict=True))
    run = folder.write_run(tmp_path, list(own))
    plan = folder.plan(list(own))
    for point in plan["regions"][""]["points"]:
        point["dtype"] = types[point["name"]]
    put(run, "quant_plan.json", plan)
    rows = [{"mod_name": n, "point": n, "SQNR": 20.0, "own_SQNR": v, "quant_dtype": types[n]} for n, v in own.items()]
    if compared:
        put(run, "layer_comparison.json", {"rows": rows})
    read = read_run(run)
    table = point_table(read)
    if not compared:
        at = [column.key for column in COLUMNS].index("sqnr")
        table = replace(
            table, rows=tuple((*r[:at], v, *r[at + 1 :]) for r, v in zip(table.rows, own.values(), strict=True))
        )
    drawn = depth(read, table)
    assert [drawn["names"][place] for place in drawn["low"]] == ["b.output", "c.output", "d.output"]


def test_histograms_stand_beside_the_statistics(tmp_path: Path) -> None:
    run = folder.write_run(tmp_path, ["a.weight", "a.output"])
    one = {"point": "a.output", "first_code": -128, "codes_per_bin": 8, "counts": [1, 2], "below": 3, "above": 0}
    put(run, "layer_statistics.json", {"histograms": [one, "x", {"point": "b"}], "rows": []})
    found = read_run(run)
    assert histograms(found, point_table(found)) == [None, [-128, 8, [1, 2], 3, 0]]


def test_graph_has_producers_types_and_the_reason_for_float(tmp_path: Path) -> None:
    run = folder.write_run(tmp_path, ["a.weight", "a.output", "b.output"])
    plan = folder.plan(["a.weight", "a.output", "b.output"])
    ops = plan["regions"][""]["ops"]
    ops.append({"name": "c", "op_type": "topk", "status": "float", "reason": "indices", "inputs": ["b", "nowhere"]})
    put(run, "quant_plan.json", plan)
    found = read_run(run)
    drawn = graph(found, point_table(found))
    assert drawn["ops"] == [
        ["a", "conv2d", "int8", [], 1, ""],
        ["b", "conv2d", "int8", [0], 2, ""],
        ["c", "topk", "float", [1], None, "indices"],
    ]
    assert drawn["op_of_point"] == [0, 0, 1]


def test_a_fused_op_has_the_type_of_the_op_it_runs_in(tmp_path: Path) -> None:
    """The count of ops by type is then that of the model check; what only moves values keeps having none."""
    run = folder.write_run(tmp_path, ["relu.output"])
    plan = folder.plan(["relu.output"])
    other = {"op_type": "x", "location": "net.py:1", "inputs": []}
    plan["regions"][""]["ops"] += [
        {"name": "bn", "status": "fused", "reason": "fused into relu", **other},
        {"name": "flatten", "status": "passes", "reason": "", **other},
    ]
    put(run, "quant_plan.json", plan)
    read = read_run(run)
    types = {op[0]: op[2] for op in graph(read, point_table(read))["ops"]}
    assert types == {"relu": "int8", "bn": "int8", "flatten": ""}


def test_a_check_that_cannot_tell_is_a_gap(tmp_path: Path) -> None:
    """Siblings: a check of convergence, a rung of the pipeline check."""
    run = folder.write_run(tmp_path, 3)
    rows = (ConvergenceRow("oscillation", "cannot tell", evidence="fewer than 4 epochs"), ConvergenceRow("x", "holds"))
    write_json(ConvergenceResult(rows, "healthy", "healthy: so."), run / "lightning_qat" / "convergence.json")
    steps = (PipelineRow(5, "float finetune", "", None, None, None, "cannot tell", "it was not asked for"),)
    write_json(PipelineResult(steps, "healthy", "healthy: so."), run / "lightning_qat" / "pipeline_check.json")
    gaps = {gap.what: gap.why for gap in find_gaps(read_run(run))}
    assert gaps["convergence: oscillation"] == "it cannot tell: fewer than 4 epochs."
    assert gaps["pipeline check: rung 5, float finetune"] == "it cannot tell: it was not asked for."
    assert "convergence: x" not in gaps


def test_choices_on_the_front_are_overrides_to_paste(tmp_path: Path) -> None:
    run = folder.write_run(tmp_path, 3)
    overrides = [[{"match": f"a{i}: 'x'", "activation": {"dtype": "int16"}} for i in range(n)] for n in range(60)]
    rows = [{"raised": n, "cost": 1 + n / 60, "sqnr": 20.0 + n} for n in range(60)]
    put(run, "front.json", {"cost_name": "bops", "overrides": overrides, "rows": rows})
    choices = front_choices(read_run(run))
    assert len(choices) == 20
    assert [choices[0].raised, choices[-1].raised] == [0, 59]
    assert choices[0].yaml == ""
    for choice in choices[1:]:
        assert yaml.safe_load(choice.yaml)["overrides"] == overrides[choice.raised]


def test_what_was_not_analysed_is_said_with_the_reason(tmp_path: Path) -> None:
    run = folder.write_run(tmp_path, 3)
    put(run, "sensitivity.json", {"left_out": ["a", "b"], "not_reached": [], "uncalibrated": ["c"], "rows": []})
    gaps = {gap.what: gap.why for gap in find_gaps(read_run(run))}
    assert "AccuracyTable() was not in this run" in gaps["accuracy"]
    assert gaps["sensitivity of 2 points"].endswith("a, b.")
    assert "no scale" in gaps["sensitivity of 1 points"]
    assert "sensitivity" not in gaps
    plan = folder.plan(["a.weight"])
    plan["regions"][""]["float_points"] = {"head.output": "it leaves the region"}
    put(run, "quant_plan.json", plan)
    assert float_places(read_run(run)).rows == (("head.output", "it leaves the region"),)


@pytest.mark.parametrize(
    "name",
    ["quant_plan.json", "layer_statistics.csv", "layer_statistics.json", "sensitivity.csv", "convergence.json",
     "diagnosis.json", "accuracy.json", "pipeline_check.json", "model_check_result.json"],
)  # fmt: skip
def test_a_damaged_file_is_a_gap_and_the_page_is_made(tmp_path: Path, name: str) -> None:
    run = folder.write_run(tmp_path, 3)
    folder.write_accuracy(run, False)
    folder.write_ladder(run)
    folder.write_convergence(run)
    folder.write_diagnosis(run, "a.weight")
    folder.write_model_check(run, "a")
    path = run / "lightning_qat" / name
    whole = path.read_bytes()
    gaps = 0
    for _, content in damaged_bytes(whole, places=6):
        path.write_bytes(content)
        found = read_run(run)
        page_data(found, point_table(found))
        gaps += len(found.gaps)
    assert gaps


def test_a_long_history_keeps_some_epochs_and_the_last(tmp_path: Path) -> None:
    run = folder.write_run(tmp_path, 2, epochs=201)
    path = run / "lightning_qat" / "layer_statistics.csv"
    history = read_history(path, ("sqnr",))
    assert history.epochs[0] == 0
    assert history.epochs[-1] == 200
    assert MOST_EPOCHS <= len(history.epochs) <= 2 * MOST_EPOCHS + 1
    steps = {b - a for a, b in zip(history.epochs[:-1], history.epochs[1:-1], strict=False)}
    assert len(steps) == 1
    values = next(iter(history.series["sqnr"].values()))
    assert values[-1] == next(iter(history.latest.values()))["sqnr"]
    with open(path, "ab") as file:
        file.write(b"201,half")
    assert read_history(path, ("sqnr",)) == history


def test_an_epoch_without_a_point_has_no_value_for_it(tmp_path: Path) -> None:
    from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult, SensitivityRow

    table = GrowingTable(tmp_path / "sensitivity.csv")
    for epoch, names in enumerate((["a", "1"], ["1"], ["a"])):
        rows = [SensitivityRow(n, "weight", "linear", None, "int8", n, epoch + 0.5, False) for n in names]
        table.write(SensitivityResult(tuple(rows)), epoch)
    found = read_history(table.path, ("score",))
    assert found.series["score"] == {("", "a"): [0.5, None, 2.5], ("", "1"): [0.5, 1.5, None]}
    assert found.latest["", "1"]["score"] == 1.5


def test_provenance_leaves_out_secrets(tmp_path: Path) -> None:
    run = folder.write_run(tmp_path, 2)
    put(run, "provenance.json", {"command": ["python", "fit"], "seed": "7", "versions": {"torch": "2.13"}})
    config = "logger:\n  api_key: hush1\n  - wandb_token: 'hush2'\nmodel:\n  tokens: 16\n  max_token_count: 3\n"
    (run / "config.yaml").write_text(config)
    found = background(read_run(run))
    text = found.configurations["config.yaml"]
    assert "hush" not in text
    assert "tokens: 16" in text
    assert "max_token_count: 3" in text
    facts = dict(found.facts)
    assert (facts["command"], facts["seed"], facts["torch"]) == ("python fit", "7", "2.13")
    assert len(facts["SHA-256 of config.yaml"]) == 64


def test_runs_side_by_side_say_what_changed(tmp_path: Path) -> None:
    first = folder.write_run(tmp_path / "a", 3, seed=0)
    second = folder.write_run(tmp_path / "b", 3, seed=1)
    folder.write_accuracy(second, True)
    blocks = compared_runs([JudgedRun.of(read_run(first)), JudgedRun.of(read_run(second))])
    assert [row[1] for row in blocks[0].rows] == ["nothing wrong found", "target reached"]
    assert blocks[0].rows[0][-1] == "3 int8"
    assert blocks[0].columns[2] == "val_acc"
    assert [row[2] for row in blocks[0].rows] == [None, 0.9]
    assert {row[2] for row in blocks[1].rows} <= {"fell", "same", "rose"}
    assert compared_runs([JudgedRun.of(read_run(first))]) == ()
