"""The result table across stages and runs (D7)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lightning_qat.analysis.runs.accuracy import ResultTable, target_value
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.reporting.accuracy_table_files import write_result_table
from lightning_qat.reporting.console import console_text


def source_table() -> ResultTable:
    """Numbers of the source document."""
    table = ResultTable()
    table.record("int16", "float", {"dynamic": 73.6, "static": 55.5})
    table.record("int16", "calibrated", {"dynamic": 73.4, "static": 54.7})
    table.record("int16", "QAT", {"dynamic": 74.1, "static": 55.3})
    table.record("int8", "float", {"dynamic": 73.6, "static": 55.5})
    table.record("int8", "calibrated", {"dynamic": 0.0, "static": 0.0})
    table.record("int8", "QAT", {"dynamic": 0.0, "static": 55.0})
    return table


def test_target_arithmetic_of_the_source() -> None:
    """D7: "loss < 1 %" of 73.6 and 55.5."""
    assert target_value("dynamic", 73.6, "1%") == pytest.approx(72.864, rel=1e-12)
    assert target_value("static", 55.5, "1%") == pytest.approx(54.945, rel=1e-12)


def test_target_of_a_cost_lies_above_and_of_a_negative_score_below() -> None:
    assert target_value("val_loss", 2.0, "5%") == pytest.approx(2.1)
    assert target_value("log_likelihood", -2.0, "5%") == pytest.approx(-2.1)


@pytest.mark.parametrize("target", ["x", "%", "-1%", "100%", "nan", math.nan, math.inf, [1]])
def test_bad_target_says_what_to_write(target: object) -> None:
    with pytest.raises(ConfigurationError, match=r"write .*(1%|0\.97)"):
        target_value("val_acc", 0.9, target)  # type: ignore[arg-type]


def test_pass_and_fail_of_the_newest_stage_of_the_run() -> None:
    """D7."""
    table = source_table()
    good = table.result("int16", ["dynamic", "static"], "1%")
    assert [row.passed for row in good.rows] == [True, True]
    assert good.note == "int16 QAT: target reached for dynamic, static."
    bad = table.result("int8", ["dynamic", "static"], "1%")
    assert [row.passed for row in bad.rows] == [False, True]
    assert "target missed for dynamic (needs 72.864)" in bad.note
    assert "SensitivityAnalysis" in bad.note


def test_training_that_loses_what_calibration_had_is_told_apart() -> None:
    """C2, C6: 73.4 calibrated and 0 after QAT is not a matter of dtypes."""
    table = source_table()
    table.record("first", "float", {"dynamic": 73.6})
    table.record("first", "calibrated", {"dynamic": 73.4})
    table.record("first", "QAT", {"dynamic": 0.0})
    note = table.result("first", ["dynamic"], "1%").note
    assert (
        "training has lost it and not quantization. PipelineCheck() says whether training goes wrong in float" in note
    )
    assert "SensitivityAnalysis" not in note


@pytest.mark.parametrize(
    ("calibrated", "is_enough"),
    [({"a": 0.9, "b": 0.8}, True), ({"a": 0.9, "b": 0.1}, False), ({"a": 0.9}, False), ({}, False)],
)
def test_a_target_that_calibration_alone_reaches_is_said_to_need_no_training(
    calibrated: dict[str, float], is_enough: bool
) -> None:
    """For all metrics that are judged; not where one of them is missed, or was not measured before training."""
    table = ResultTable(
        {"run": {"float": {"a": 0.9, "b": 0.8}, "calibrated": calibrated, "QAT": {"a": 0.95, "b": 0.8}}}
    )
    note = table.result("run", ["a", "b"], "1%").note
    assert note.startswith("run QAT: target reached for a, b.")
    assert ("Calibration alone reaches it too: for this target no training is needed." in note) == is_enough
    alone = ResultTable({"run": {"float": {"a": 0.9}, "calibrated": {"a": 0.9}}})
    assert alone.result("run", ["a"], "1%").note == "run calibrated: target reached for a."


def test_every_metric_can_have_a_target_of_its_own() -> None:
    """D7: tasks."""
    result = source_table().result("int16", ["dynamic", "static"], {"dynamic": 74.2, "static": "0.5%"})
    assert [(row.target, row.passed) for row in result.rows] == [(74.2, False), (pytest.approx(55.2225), True)]
    only = source_table().result("int16", ["dynamic", "static"], {"static": "1%"})
    assert [row.passed for row in only.rows] == [None, True]


def test_one_target_for_all_judges_scores_and_costs_only_where_there_are_no_scores() -> None:
    table = ResultTable({"a": {"float": {"acc": 0.9, "loss": 1.0}, "QAT": {"acc": 0.9, "loss": 2.0}}})
    assert [row.passed for row in table.result("a", ["acc", "loss"], "1%").rows] == [True, None]
    assert [row.passed for row in table.result("a", ["loss"], "1%").rows] == [False]


def test_columns_are_stages_of_all_runs_and_the_terminal_shows_those_of_the_run() -> None:
    """D7."""
    result = source_table().result("int8", ["dynamic", "static"], "1%")
    stages = ("int16 calibrated", "int16 QAT", "int8 calibrated", "int8 QAT")
    assert result.columns() == ("metric", "float", "target", *stages, "passed")
    assert result.to_dicts()[0]["int16 QAT"] == 74.1
    text = console_text(result, width=80)
    assert "74.1" not in text
    assert "FAIL" in text


def test_terminal_does_not_mix_runs_whose_names_begin_alike() -> None:
    table = source_table()
    table.record("int8 (2)", "QAT", {"dynamic": 99.0})
    assert "99" not in console_text(table.result("int8", ["dynamic"], "1%"))


def test_run_of_the_same_name_gets_a_number() -> None:
    """Nothing is overwritten silently."""
    table = source_table()
    assert table.entry("int4", "float", ["dynamic"]) == "int4"
    assert table.entry("int8", "float", ["dynamic"]) == "int8 (2)"
    table.record("int8 (2)", "float", {"dynamic": 1.0})
    assert table.entry("int8", "float", ["dynamic"]) == "int8 (3)"
    assert table.entry("int8", "QAT", ["test_map"]) == "int8 (2)"  # a test after the newest fit


def test_recording_keeps_the_other_values_of_a_stage() -> None:
    """A test must not take the validation's values away."""
    table = source_table()
    table.record("int8", "float", {"test_map": 70.0})
    assert table.runs["int8"]["float"] == {"dynamic": 73.6, "static": 55.5, "test_map": 70.0}


def test_float_value_of_another_run_serves_where_the_run_has_none() -> None:
    table = source_table()
    table.record("later", "QAT", {"dynamic": 73.0})
    assert table.result("later", ["dynamic"], "1%").rows[0].passed is True
    table.record("later", "QAT", {"unknown": 73.0})
    note = table.result("later", ["unknown"], "1%").note
    assert "float value of unknown is not known" in note
    assert "target: 0.97" in note


def test_table_survives_the_file_with_nan(tmp_path: Path) -> None:
    table = source_table()
    table.record("int4", "QAT", {"dynamic": math.nan})
    again = ResultTable.read(write_result_table(table, tmp_path / "t.json"))
    assert math.isnan(again.runs["int4"]["QAT"].pop("dynamic"))
    assert math.isnan(table.runs["int4"]["QAT"].pop("dynamic"))
    assert again == table
    again.record("int4", "QAT", {"dynamic": math.nan})
    assert again.result("int4", ["dynamic"], "1%").rows[0].passed is False


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"version": 9, "runs": {}}', '{"version": 1, "runs": {"a": {"b": {"c": "x"}}}}',
     '{"version": 1, "runs": {"a": 1}}', json.dumps({"version": 1})],
)  # fmt: skip
def test_file_that_is_no_table_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    """Bad input."""
    path = tmp_path / "result_table.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"result_table\.json is not a result table .* move it away"):
        ResultTable.read(path)
    assert path.read_text() == text


def test_missing_file_is_an_empty_table(tmp_path: Path) -> None:
    assert ResultTable.read(tmp_path / "none.json") == ResultTable()


def test_the_whole_table_has_the_metrics_of_every_stage() -> None:
    """D7: a test after validation adds its rows to the table instead of replacing it."""
    table = ResultTable()
    table.record("int8", "float", {"val_acc": 0.98})
    table.record("int8", "QAT", {"val_acc": 0.97})
    table.record("int8", "QAT (test)", {"test_acc": 0.96})
    assert table.metrics() == ["val_acc", "test_acc"]
    rows = table.result("int8", table.metrics(), "2%").rows
    assert [(row.metric, row.passed) for row in rows] == [("val_acc", True), ("test_acc", None)]
