"""What a run leaves of an analysis, in files and loggers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

from lightning_qat.analysis.sensitivity.sensitivity import SensitivityResult, SensitivityRow
from lightning_qat.reporting.reports_of_run import RunReports
from lightning_qat.reporting.run_outputs import RunOutputs
from lightning_qat.reporting.tensorboard_tags import sensitivity_tags


def result(value: float) -> SensitivityResult:
    row = SensitivityRow("fc", "weight", "linear", value, "int8", "fc.weight", 2 * value, True)
    return SensitivityResult((row,), output="output 'x'", points=1)


class Logger:
    """Notes what it is sent; shows texts and histograms if asked to."""

    def __init__(self, shows: bool) -> None:
        self.sent: list[tuple[object, ...]] = []
        note = {
            "add_text": lambda tag, text, global_step: self.sent.append((tag, global_step)),
            "add_histogram": lambda tag, values, global_step: self.sent.append((tag, *values, global_step)),
        }
        self.experiment = SimpleNamespace(**(note if shows else {}))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.sent.append((metrics, step))


def test_csv_grows_and_the_others_are_of_the_last_epoch(tmp_path: Path) -> None:
    warnings: list[str] = []
    outputs = RunOutputs("sensitivity", sensitivity_tags("MSE"), RunReports(warnings.append, warnings.append))
    for epoch in range(3):
        outputs.write(result(float(epoch)), tmp_path, epoch)
    with open(tmp_path / "sensitivity.csv", newline="") as file:
        assert [(row["epoch"], row["MSE"]) for row in csv.DictReader(file)] == [
            ("0", "0.0"),
            ("1", "1.0"),
            ("2", "2.0"),
        ]
    data = json.loads((tmp_path / "sensitivity.json").read_text())
    assert (data["epoch"], data["rows"][0]["MSE"]) == (2, 2.0)
    assert "at the end of epoch 2" in (tmp_path / "sensitivity.txt").read_text()
    outputs.write(result(5.0), tmp_path / "other", 0)  # another fit
    assert len((tmp_path / "other" / "sensitivity.csv").read_text().splitlines()) == 2
    assert warnings == []


def test_file_that_had_to_be_moved_is_said(tmp_path: Path) -> None:
    (tmp_path / "sensitivity.csv").write_text("op_name,point\nfc,fc.weight\n")
    warnings: list[str] = []
    RunOutputs("sensitivity", sensitivity_tags("MSE"), RunReports(warnings.append, warnings.append)).write(
        result(1.0), tmp_path, 0
    )
    (warning,) = warnings
    assert "now called sensitivity.1.csv" in warning


def test_tags_of_a_sensitivity_and_one_warning_about_loggers_that_show_no_tables() -> None:
    """E: TensorBoard, and other loggers."""
    warnings: list[str] = []
    outputs = RunOutputs("sensitivity", sensitivity_tags("MSE"), RunReports(warnings.append, warnings.append))
    numbers, all_of_it = Logger(shows=False), Logger(shows=True)
    for step in (3, 6):
        outputs.log(result(0.5), [numbers, all_of_it], step)
    scalars = {"sensitivity.MSE/fc.weight": 0.5, "sensitivity.score/fc.weight": 1.0}
    assert numbers.sent == [(scalars, 3), (scalars, 6)]
    assert all_of_it.sent[:4] == [
        (scalars, 3),
        ("sensitivity/MSE", 0.5, 3),
        ("sensitivity/score", 1.0, 3),
        ("sensitivity", 3),
    ]
    assert warnings == ["Logger shows no tables: those of sensitivity are only in the files."]
    outputs.log(result(0.5), [], 9)
