"""Two runs side by side (B9): from the files that runs write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_qat.analysis.comparison.comparison import compare
from lightning_qat.analysis.runs.accuracy import ResultTable
from lightning_qat.analysis.runs.run_comparison import compare_runs
from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.cli.command_line import main
from lightning_qat.export.plan_files import write_plan
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.reporting.files import write_result
from lightning_qat.reporting.result_table_files import write_result_table

FAULT = [{"match": "1.output", "activation": {"fixed_scale": 0.5}}]
FIX = [*FAULT, {"match": "1.output", "activation": {"dtype": "int16", "fixed_scale": "8/32768"}}]


def write_run(directory: Path, overrides: list[dict[str, object]]) -> None:
    """What SensitivityAnalysis, LayerComparison and QuantizationAwareTraining leave behind."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    region = insert(model, (x,), overrides=overrides)
    calibrate(region, [x])
    write_result(sensitivity(region, [x], method="isolation"), directory / "lightning_qat", "sensitivity")
    write_result(compare(region, [x]), directory / "lightning_qat", "layer_comparison")
    write_plan(region, directory / "lightning_qat")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    before, after = root / "logs" / "version_0", root / "logs" / "version_1"
    write_run(before, FAULT)  # type: ignore[arg-type]
    write_run(after, FIX)  # type: ignore[arg-type]
    table = ResultTable()
    table.record("logs/version_0", "calibrated", {"val_acc": 0.5, "val_loss": 1.0})
    table.record("logs/version_1", "calibrated", {"val_acc": 0.5, "val_loss": 0.5})
    write_result_table(table, root / "lightning_qat" / "result_table.json")
    return before, after


def test_sensitivity_of_what_was_changed_fell(runs: tuple[Path, Path]) -> None:
    """B9: even where the accuracy does not move yet."""
    result = compare_runs(*runs)
    first = result.rows[0]
    assert (first.point, first.outcome) == ("1.output", "fell")
    assert first.change == "dtype int8 -> int16, fixed_scale 0.5 -> 0.0002441"
    assert first.ratio is not None
    assert first.ratio < 0.01
    assert (first.after_own_sqnr or 0) > (first.before_own_sqnr or 0) + 10
    assert [row.point for row in result.changed] == ["1.output"]
    assert "1 point was changed; of 1 measured in both runs, 1 fell" in result.note
    by_metric = {row.metric: row for row in result.accuracy}
    assert by_metric["val_acc"].better is None
    assert (by_metric["val_loss"].before, by_metric["val_loss"].after, by_metric["val_loss"].better) == (1.0, 0.5, True)


def test_scores_are_those_of_the_tables(runs: tuple[Path, Path]) -> None:
    files = [json.loads((run / "lightning_qat/sensitivity.json").read_text())["rows"] for run in runs]
    scores = [{row["point"]: row["score"] for row in rows} for rows in files]
    result = compare_runs(*runs)
    assert {row.point: row.before_score for row in result.rows} == scores[0]
    assert {row.point: row.after_score for row in result.rows} == scores[1]
    assert all(row.outcome == "same" for row in result.rows if row.point in ("4.weight", "2.weight"))


@pytest.mark.parametrize(
    "name", ["sensitivity.csv", "sensitivity.json", "layer_comparison.csv", "layer_comparison.json"]
)
def test_single_files_do(name: str, runs: tuple[Path, Path]) -> None:
    before, after = (run / "lightning_qat" / name for run in runs)
    row = compare_runs(before, after).rows[0]
    assert (row.point, row.outcome) == ("1.output", "fell")


def test_command_prints_both_tables_and_writes_files(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare-runs", *map(str, runs), "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Accuracy") == printed.count("Sensitivity of two runs") == 1
    assert "val_loss" in printed
    assert "1.output" in printed
    assert {path.name for path in tmp_path.iterdir()} == {f"run_comparison.{end}" for end in ("csv", "txt", "json")}
    assert "val_loss" in (tmp_path / "run_comparison.txt").read_text()
    assert main(["compare-runs", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "compare-runs BEFORE AFTER" in shown
    assert "Your project" not in shown


def test_command_shows_what_was_changed_and_how_many_rows_are_left_out(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of a thousand points does not scroll the note away."""
    result = compare_runs(*runs)
    monkeypatch.setattr("lightning_qat.cli.compare_runs_command._SHOWN", 0)
    assert main(["compare-runs", *map(str, runs)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert len(result.changed) == 1
    assert result.changed[0].point in printed
    assert f"{len(result.rows) - 1} more rows" in printed
    assert result.note in printed


def test_bad_input_is_refused(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, _ = runs
    with pytest.raises(ConfigurationError, match="there is no file or directory"):
        compare_runs(before, tmp_path / "missing")
    with pytest.raises(ConfigurationError, match=r"has neither sensitivity.json\|csv nor layer_comparison"):
        compare_runs(before, tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigurationError, match="is not JSON"):
        compare_runs(before, tmp_path / "broken.json")
    (tmp_path / "other.json").write_text('{"rows": [{"a": 1}]}')
    with pytest.raises(ConfigurationError, match="is not a table of points"):
        compare_runs(before, tmp_path / "other.json")
    with pytest.raises(ConfigurationError, match="has a sensitivity table and"):
        compare_runs(before, before / "lightning_qat" / "layer_comparison.csv")
    assert main(["compare-runs", str(before)]) == 2
    assert "takes two runs" in capsys.readouterr().err


def test_runs_that_looked_at_different_outputs_are_not_compared_silently(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    before, after = runs
    data = json.loads((after / "lightning_qat/sensitivity.json").read_text())
    (tmp_path / "sensitivity.json").write_text(json.dumps({**data, "output": "output 'map'"}))
    assert "what was looked at differs" in compare_runs(before, tmp_path).note


def test_point_that_does_not_break_the_output_any_more_fell(tmp_path: Path) -> None:
    """A score of NaN is more than any number."""
    scores = {"before": ("nan", "1.0", "nan", "0.0"), "after": ("0.1", "nan", "nan", "0.5")}
    for name, values in scores.items():
        lines = [f"p{i}.output,int8,{value},0.0" for i, value in enumerate(values)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["point,quant_dtype,score,standard_error", *lines]))
    result = compare_runs(tmp_path / "before.csv", tmp_path / "after.csv")
    assert {row.point: row.outcome for row in result.rows} == {
        "p0.output": "fell",
        "p1.output": "rose",
        "p2.output": "same",
        "p3.output": "rose",
    }
    assert {row.ratio for row in result.rows} == {None}
    assert result.rows[-1].point == "p2.output"
