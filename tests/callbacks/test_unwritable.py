"""A disk that is full or read-only, a logger that fails, a terminal that is closed: no report is worth a run."""

from __future__ import annotations

import builtins
import csv
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger

import lightning_qat
from lightning_qat import atomic_files
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult
from lightning_qat.callbacks.trainer.reporting_callback import ReportingCallback
from lightning_qat.reporting import growing_table
from lightning_qat.reporting.accuracy_table_files import read_result_table
from tests.callbacks.test_report_folder import callbacks_of_the_example
from tests.harness.noisy_run import Classifier, run, trainer_of
from tests.harness.state import assert_same

EPOCHS = 3
GROWING = ("sensitivity", "layer_statistics", "layer_comparison", "diagnosis")
FILES = {
    "quant_plan.json", "model_check_result.txt", "model_check_result.json", "pipeline_check.txt", "pipeline_check.json",
    "zero_lr_finetune.txt", "zero_lr_finetune.json", "float_finetune.txt", "float_finetune.json", "convergence.txt",
    "convergence.json", "result_table.json", "result_table.md", "result_table.csv", "pipeline_fingerprint.json",
    "figures/sqnr_by_depth.png", "figures/sensitivity.png", "accuracy.json", "provenance.json", "report.html",
    *(f"{name}.{ending}" for name in GROWING for ending in ("csv", "txt", "json")),
}  # fmt: skip


class Disk:
    """What the package opens for writing while ``error`` is set fails with it; reading works."""

    def __init__(self) -> None:
        self.error: int | None = None
        self.refused: set[str] = set()

    def open(self, path: Any, mode: str = "r", **options: Any) -> Any:
        if self.error is not None and set(mode) & set("xwa+"):
            self.refused.add(str(path))
            raise OSError(self.error, os.strerror(self.error), str(path))
        return builtins.open(path, mode, **options)


class Repaired(Callback):
    """Repairs the disk when an epoch begins."""

    def __init__(self, disk: Disk, epoch: int) -> None:
        self.disk, self.epoch = disk, epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.disk.error = None


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()
    for module in (atomic_files, growing_table):
        monkeypatch.setattr(module, "open", found.open, raising=False)
    return found


def all_callbacks() -> list[Callback]:
    pytest.importorskip("matplotlib")
    others = [lightning_qat.PipelineFingerprint(batches=1), lightning_qat.ZeroLRFinetune(batches=1)]
    return [*callbacks_of_the_example(), *others, lightning_qat.FloatFinetune(batches=1)]


@contextmanager
def warnings_of_reports() -> Iterator[list[str]]:
    """The warnings about what could not be written."""
    found: list[str] = []
    with pytest.warns() as caught:
        yield found
    found += [str(w.message) for w in caught if "Training goes on" in str(w.message)]


def files_in(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


def test_every_callback_that_writes_is_among_those_tested() -> None:
    """A new callback that writes reports is to be listed above."""
    public = {c for c in vars(lightning_qat).values() if isinstance(c, type) and issubclass(c, ReportingCallback)}
    assert public == {type(c) for c in all_callbacks() if isinstance(c, ReportingCallback)}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_full_disk_that_is_repaired_later_costs_nothing(tmp_path: Path, disk: Disk, error: int) -> None:
    """Reports at fit start, train start, epoch end, train end and fit end; those of the first epochs come later.

    The siblings: growing tables, tables and texts, figures, the plan, the fingerprint and the result table.
    """
    plain, _ = run(tmp_path / "plain", max_epochs=EPOCHS)
    disk.error = error
    with warnings_of_reports() as warned:
        model, _ = run(tmp_path / "other", *all_callbacks(), Repaired(disk, EPOCHS - 1), max_epochs=EPOCHS)
    assert_same(plain.state_dict(), model.state_dict())
    directory = tmp_path / "other" / "lightning_qat"
    files = files_in(directory)
    assert files >= FILES, FILES - files
    assert not [name for name in files if "unfinished" in name]
    for name in GROWING:
        with open(directory / f"{name}.csv", newline="") as file:
            assert {row["epoch"] for row in csv.DictReader(file)} == set(map(str, range(EPOCHS))), name
    assert len(warned) == len(set(warned))
    assert all(os.strerror(error) in text and "tried again" in text for text in warned)
    assert (
        len(warned) <= len(all_callbacks()) + 1
    )  # one for each callback and the plan, not one for each epoch and file


def test_disk_that_stays_full_ends_in_a_trained_model_and_in_the_names_of_what_is_missing(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.error = errno.ENOSPC
    with warnings_of_reports() as warned, caplog.at_level("INFO"):
        _, trainer = run(tmp_path, *all_callbacks(), max_epochs=2)
    assert trainer.state.finished
    assert trainer.current_epoch == 2
    assert warned
    missing = " ".join(record.getMessage() for record in caplog.records if "Not written" in record.getMessage())
    for name in FILES - {"result_table.csv"}:
        assert f"{tmp_path / 'lightning_qat' / name}" in missing, name
    assert files_in(tmp_path) == set()


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    """As a read-only folder, for root too, whom modes do not stop."""
    (tmp_path / "lightning_qat").write_text("mine")
    with warnings_of_reports() as warned:
        _, trainer = run(tmp_path, *all_callbacks(), max_epochs=1)
    assert trainer.state.finished
    assert any(f"{tmp_path / 'lightning_qat' / 'quant_plan.json'} could not be written" in text for text in warned)
    assert (tmp_path / "lightning_qat").read_text() == "mine"


def test_one_blocked_file_keeps_no_other_from_being_written(tmp_path: Path) -> None:
    """A folder in place of a csv, of a text, of the plan."""
    directory = tmp_path / "lightning_qat"
    for name in ("sensitivity.csv", "layer_statistics.txt", "quant_plan.json"):
        (directory / name / "mine").mkdir(parents=True)
    with warnings_of_reports() as warned:
        run(tmp_path, *callbacks_of_the_example(), max_epochs=1)
    assert len(warned) == 3
    assert {"sensitivity.json", "sensitivity.txt", "layer_statistics.csv", "layer_statistics.json"} <= files_in(
        directory
    )


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_goes_on_too(tmp_path: Path, disk: Disk, stage: str) -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.step(batch, "test")

        test_dataloader = Classifier.val_dataloader

    disk.error = errno.ENOSPC
    callbacks = (lightning_qat.ModelCheck(), lightning_qat.AccuracyTable())
    with warnings_of_reports() as warned:
        values = getattr(trainer_of(tmp_path, *callbacks), stage)(Tested(), verbose=False)
    assert values
    assert values[0]
    assert len(warned) == 2


def test_exception_in_training_writes_what_is_owed(tmp_path: Path, disk: Disk) -> None:
    """Lightning calls no teardown then."""

    class Stops(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            disk.error = None
            raise RuntimeError("mine")

    disk.error = errno.ENOSPC
    with warnings_of_reports(), pytest.raises(RuntimeError, match="mine"):
        run(tmp_path, lightning_qat.ModelCheck(), Stops())
    assert {"quant_plan.json", "model_check_result.txt", "model_check_result.json"} <= files_in(
        tmp_path / "lightning_qat"
    )


class FailingLogger(DummyLogger):
    """Refuses what is not a metric of the run itself, as the writer of a full disk or a lost server does."""

    @property
    def experiment(self) -> Any:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return SimpleNamespace(add_text=refuse, add_histogram=refuse, add_figure=refuse)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any("." in name for name in metrics):  # numbers of points
            raise ConnectionError("the server is gone")


class Noting(FailingLogger):
    """Shows texts."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(add_text=lambda tag, text, global_step: self.texts.append(tag))


def test_logger_that_fails_ends_no_run_and_keeps_no_other_logger_from_its_reports(tmp_path: Path) -> None:
    """Siblings: scalars, texts, histograms, figures, at epoch end and at the end of training."""
    other = Noting()
    other.log_metrics = lambda metrics, step=None: None  # type: ignore[method-assign, assignment]
    with warnings_of_reports() as warned:
        _, trainer = run(tmp_path, *all_callbacks(), max_epochs=1, logger=[FailingLogger(), other])
    assert trainer.state.finished
    assert any("FailingLogger did not take a report (ConnectionError: the server is gone)" in text for text in warned)
    assert any("FailingLogger did not take a report (No space left on device)" in text for text in warned)
    assert {"model_check", "sensitivity", "layer_statistics", "layer_comparison", "result_table"} <= set(other.texts)


def test_terminal_that_cannot_be_written_to_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Siblings: ``train.py > log.txt`` on a full disk, a closed pipe, a terminal without these letters."""

    class Full:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self) -> None:
            pass

    monkeypatch.setattr("sys.stdout", Full())
    with warnings_of_reports() as warned:
        _, trainer = run(tmp_path, *all_callbacks(), max_epochs=1)
    assert trainer.state.finished
    for name in ("model check", "pipeline_check", "What to do", "accuracy table"):
        assert any(f"{name} was not printed (No space left on device)" in text for text in warned), (name, warned)


def test_what_the_user_asks_for_himself_is_one_clear_error(tmp_path: Path) -> None:
    """Public functions, and the commands."""
    (tmp_path / "file").write_text("mine")
    for write in (lightning_qat.write_csv, lightning_qat.write_json):
        with pytest.raises(OSError, match=r"file/x cannot be written: (Not a directory|File exists)\.") as caught:
            write(SensitivityResult(()), tmp_path / "file" / "x")
        assert caught.value.errno
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    lightning_qat.insert(model, (torch.ones(1, 2),))
    with pytest.raises(OSError, match=r"file/quant_plan\.json cannot be written"):
        lightning_qat.write_plan(model, tmp_path / "file")


def test_result_table_that_was_damaged_meanwhile_is_no_end_either(tmp_path: Path) -> None:
    """Before training a damaged table is an error, see test_accuracy_table.py; afterwards too much would be lost."""
    path = tmp_path / "lightning_qat" / "result_table.json"

    class Damages(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            path.write_text("{")

    table = lightning_qat.AccuracyTable(name="a")
    with warnings_of_reports() as warned:
        run(tmp_path, table, Damages(), max_epochs=1)
    assert warned
    assert path.read_text() == "{"
    assert table.result is not None
    assert table.result.stages == ("a calibrated", "a QAT")
    path.unlink()
    assert list(read_result_table(path).runs["a"]) == ["float", "calibrated", "QAT"]
