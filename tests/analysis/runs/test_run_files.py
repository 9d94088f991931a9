"""What is read back from the files of runs: the present layout, and that of earlier versions.

``old_layout/`` holds files that two runs have really left behind before there was an ``epoch`` column.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from lightning_qat.analysis.runs.run_comparison import compare_runs
from lightning_qat.analysis.runs.run_files import RunFiles
from lightning_qat.callbacks.layer_comparison import LayerComparison
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from tests.harness.noisy_run import rows_of, run

OLD = Path(__file__).parent / "old_layout"
CHANGED = ("relu_0.output", "dtype int8 -> int16")


def scores(path: Path) -> dict[str, float]:
    """By Python's own csv reader."""
    with open(path, newline="") as file:
        return {row["point"]: float(row["score"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    "name",
    ["", "sensitivity.csv", "sensitivity.json", "sensitivity_epoch0.csv", "sensitivity_epoch1.csv",
     "sensitivity_epoch1.json", "layer_comparison.csv", "layer_comparison.json"],
)  # fmt: skip
def test_files_of_earlier_versions_are_still_compared(name: str) -> None:
    """B9: the ratios are those that the version which wrote the files has printed."""
    result = compare_runs(OLD / "before" / name, OLD / "after" / name)
    (row,) = result.changed
    assert (row.point, row.change) == CHANGED
    assert len(result.rows) == 5
    expected = {"": 0.9510787480314821, "sensitivity_epoch1.csv": 0.9673634937993857}
    assert row.ratio == pytest.approx(expected.get(name, row.ratio), rel=1e-12)


@pytest.mark.parametrize("name", ["sensitivity.csv", "sensitivity_epoch0.csv", "sensitivity_epoch1.csv"])
def test_old_tables_have_all_their_rows(name: str) -> None:
    files = RunFiles(OLD / "before" / name)
    assert {point: files.score(("", point)) for _, point in files.points} == scores(OLD / "before" / name)


def test_old_run_that_was_stopped_is_represented_by_its_last_epoch(tmp_path: Path) -> None:
    for name in ("sensitivity_epoch0.json", "sensitivity_epoch1.json"):
        shutil.copy(OLD / "before" / name, tmp_path)
    files = RunFiles(tmp_path)
    expected = scores(OLD / "before" / "sensitivity_epoch1.csv")
    assert {point: files.score(("", point)) for _, point in files.points} == expected


def test_last_epoch_counts_in_the_present_layout(tmp_path: Path) -> None:
    run(tmp_path, SensitivityAnalysis(), LayerComparison(every_n_epochs=1), max_epochs=2)
    directory = tmp_path / "lightning_qat"
    expected = {row["point"]: float(row["score"]) for row in rows_of(directory / "sensitivity.csv", 1)}
    assert len(rows_of(directory / "sensitivity.csv", 0)) == 5
    for path in (tmp_path, directory, directory / "sensitivity.csv", directory / "sensitivity.json"):
        files = RunFiles(path)
        assert {point: files.score(("", point)) for _, point in files.points} == expected
    errors = RunFiles(directory / "layer_comparison.csv").errors
    assert {row["epoch"] for row in errors.values()} == {"1"}
    # an old and a new run
    result = compare_runs(OLD / "before", tmp_path)
    assert [row.outcome for row in result.rows if row.outcome in ("new", "gone")] == []
    assert len(result.rows) == 5


def test_line_that_was_not_finished_is_left_out(tmp_path: Path) -> None:
    """A run that fails in the middle of a write does not make the table useless."""
    path = tmp_path / "sensitivity.csv"
    path.write_text("epoch,point,quant_dtype,score\n0,a,int8,1.0\n1,a,int8,2.0\n1,b,int8,0.")
    files = RunFiles(path)
    assert files.points == [("", "a")]
    assert files.score(("", "a")) == 2.0


def test_json_of_the_present_layout_says_its_epoch(tmp_path: Path) -> None:
    run(tmp_path, SensitivityAnalysis(), max_epochs=2)
    assert json.loads((tmp_path / "lightning_qat" / "sensitivity.json").read_text())["epoch"] == 1
