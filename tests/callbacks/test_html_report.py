"""The page of a run while it runs: when it is written, what it costs the run (nothing), what a killed run leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_qat
from lightning_qat.callbacks import html_report
from lightning_qat.callbacks.accuracy_table import AccuracyTable
from lightning_qat.callbacks.html_report import HTMLReport
from lightning_qat.callbacks.layer_statistics import LayerStatistics
from lightning_qat.reporting.html.page import write_report
from tests.harness.classifier import Classifier
from tests.harness.noisy_run import assert_same_run
from tests.harness.parsed_page import ParsedPage
from tests.harness.trainers import qat_trainer


class Watch(Callback):
    """Notes, as each epoch begins behind HTMLReport, which epochs the page knows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.epochs: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            series = ParsedPage(self.path.read_text()).data["series"]
            self.epochs.append(series["sqnr"]["epochs"] if "sqnr" in series else [])


def test_page_is_written_behind_every_nth_epoch_and_at_the_end_wherever_the_callback_stands(tmp_path: Path) -> None:
    path = tmp_path / "lightning_qat" / "report.html"
    watch, report = Watch(path), HTMLReport(every_n_epochs=2)
    run = qat_trainer(tmp_path, report, watch, LayerStatistics(), AccuracyTable(), max_epochs=4)
    run.fit(Classifier())
    assert watch.epochs == [[], [], [0, 1], [0, 1]]
    assert report.path == path
    page = ParsedPage(path.read_text())
    assert page.data["series"]["sqnr"]["epochs"] == [0, 1, 2, 3]
    assert "target reached" in page.text  # what AccuracyTable found at the end of training
    assert write_report([tmp_path], tmp_path / "again.html").read_text() == path.read_text()  # from the files alone


def test_a_run_that_is_interrupted_leaves_a_whole_page(tmp_path: Path) -> None:
    class Failing(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        qat_trainer(tmp_path, HTMLReport(), LayerStatistics(), Failing(), max_epochs=3).fit(Classifier())
    text = (tmp_path / "lightning_qat" / "report.html").read_text()
    assert text.endswith("</html>\n")
    assert ParsedPage(text).data["series"]["sqnr"]["epochs"] == [0]


def test_a_page_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no page")

    monkeypatch.setattr(html_report, "write_report", broken)
    report = HTMLReport()
    run = qat_trainer(tmp_path, report, max_epochs=1)
    with pytest.warns(UserWarning, match=r"report\.html could not be written \(ValueError: no page\)"):
        run.fit(Classifier())
    assert run.global_step > 0
    assert [path.name for path in report.missing_files] == ["report.html"]
    assert report.path is None


def test_training_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    assert_same_run(tmp_path, HTMLReport(every_n_epochs=1), LayerStatistics(), own_metrics="layer_statistics")


@pytest.mark.parametrize("inside", [True, False])
def test_the_best_checkpoint_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    """As a path from where the user stands, if it is below."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path if inside else tmp_path / "here")
    checkpoint = ModelCheckpoint(tmp_path / "kept", filename="best", monitor="val_loss")
    qat_trainer(tmp_path, HTMLReport(), checkpoint, max_epochs=1).fit(Classifier())
    held = json.loads((tmp_path / "lightning_qat" / "provenance.json").read_text())
    assert held["checkpoint"] == ("kept/best.ckpt" if inside else str(tmp_path / "kept" / "best.ckpt"))
    assert held["finished"]


def test_a_test_without_training_has_a_page_too(tmp_path: Path) -> None:
    report = HTMLReport()
    qat_trainer(tmp_path, AccuracyTable(), report).validate(Classifier(), verbose=False)
    assert report.path is not None
    assert "calibrated" in ParsedPage(report.path.read_text()).text


def test_fast_dev_run_leaves_no_page(tmp_path: Path) -> None:
    report = HTMLReport()
    qat_trainer(tmp_path, report, fast_dev_run=True).fit(Classifier())
    assert report.path is None
    assert not list(tmp_path.rglob("report.html"))


def test_a_missing_jinja_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MisconfigurationException, match="needs Jinja2"):
        lightning_qat.HTMLReport()
