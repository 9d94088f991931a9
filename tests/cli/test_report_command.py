"""``python -m lightning_qat report``."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_qat.cli.command_line import main
from lightning_qat.reporting.html import judged_run
from lightning_qat.reporting.html.point_causes import with_causes
from lightning_qat.reporting.html.run_folder import RunFolder
from tests.harness import run_folder
from tests.harness.parsed_page import ParsedPage


def test_page_of_a_log_directory_or_of_the_folder_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder.write_run(tmp_path)
    assert main(["report", str(run)]) == 0
    path = run / "lightning_qat" / "report.html"
    assert str(path) in capsys.readouterr().out
    assert main(["report", str(run / "lightning_qat"), "--output", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "a.html").read_text() == path.read_text()
    assert main(["report", str(run), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text() == path.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "takes the log directory of a run"),
        (["nowhere"], "there is no folder nowhere"),
        (["."], "holds no file of a run"),
        ([".", "--colour", "red"], "there is no option --colour"),
    ],
)
def test_what_cannot_be_reported_is_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_damaged_file_is_left_out_and_said(tmp_path: Path) -> None:
    run = run_folder.write_run(tmp_path)
    (run / "lightning_qat" / "convergence.json").write_text("{")
    (run / "lightning_qat" / "sensitivity.csv").write_text("epoch,point\n0\n")
    assert main(["report", str(run)]) == 0
    page = ParsedPage((run / "lightning_qat" / "report.html").read_text())
    assert len(page.data["points"]["rows"]) == 12


def test_columns_for_model_explorer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder.write_run(tmp_path, 3)
    assert main(["report", str(run), "--node-data", "score", "--node-data", "dtype"]) == 0
    folder = run / "lightning_qat"
    assert {path.name for path in folder.glob("node_data*")} == {"node_data_score.json", "node_data_dtype.json"}
    assert main(["report", str(run), "--node-data", "scores"]) == 2
    assert "score" in capsys.readouterr().err


def test_every_run_is_judged_once_for_the_page_and_for_node_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run_folder.write_run(tmp_path / name, 3) for name in ("a", "b")]
    judged: list[Path] = []

    def noted(run: RunFolder) -> RunFolder:
        judged.append(run.path.parent)
        return with_causes(run)

    monkeypatch.setattr(judged_run, "with_causes", noted)
    assert main(["report", *map(str, runs), "--node-data", "verdict", "--node-data", "score"]) == 0
    assert judged == runs
