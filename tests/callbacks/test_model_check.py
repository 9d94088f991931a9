"""The ModelCheck callback: when it runs, what it writes, and that training does not notice."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console

from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult
from lightning_qat.callbacks import model_check
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.model_check import ModelCheck
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.reporting.files import write_json
from lightning_qat.reporting.model_check_file import read_model_check
from lightning_qat.reporting.reports import markdown_report
from tests.harness import noisy_run
from tests.harness.classifier import Classifier, SelfClassifier, loader
from tests.harness.trainers import qat_trainer, trainer

WRONG = {
    "overrides": [
        {"match": "conv1.weight", "weight": {"dtype": "int16"}},
        {"match": "conv1", "weight": {"dtype": "int8"}},
    ]
}


def kinds(result: ModelCheckResult | None) -> set[str]:
    assert result is not None
    return {finding.kind for finding in result.findings}


class Results(ModelCheck):
    """Keeps every result, with the state of the run at that time."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(show=False, **kwargs)
        self.seen: list[tuple[int, bool, bool]] = []

    def check(self, trainer: Trainer, pl_module: LightningModule) -> ModelCheckResult:
        calibrated = model_check.is_calibrated(pl_module)
        self.seen.append((trainer.global_step, trainer.sanity_checking, calibrated))
        return super().check(trainer, pl_module)


def test_files_summary_and_result_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A1: model_check_result.txt and .json, and the summary."""
    printed = Console(file=io.StringIO(), width=100)
    monkeypatch.setattr(model_check, "console_of", lambda trainer: printed)
    callback = ModelCheck()
    qat_trainer(tmp_path, callback).fit(SelfClassifier())
    directory = tmp_path / "lightning_qat"
    assert read_model_check(directory / "model_check_result.json") == callback.result
    counts = (directory / "model_check_result.txt").read_text().splitlines()[0]
    assert isinstance(printed.file, io.StringIO)
    text = printed.file.getvalue()
    assert text.splitlines()[0].strip() == counts
    assert str(directory / "model_check_result.txt") in "".join(text.split("\n"))
    assert kinds(callback.result) >= {"initial weights"}


@pytest.mark.parametrize("first", [True, False])
def test_runs_once_after_calibration_and_before_the_sanity_check(tmp_path: Path, first: bool) -> None:
    """Wherever it is listed; without a sanity check too."""
    for steps in (0, 2):
        callback = Results()
        rest = [Calibration(batches=2), QuantizationAwareTraining()]
        callbacks = [callback, *rest] if first else [*rest, callback]
        trainer(tmp_path, *callbacks, num_sanity_val_steps=steps).fit(Classifier())
        assert callback.seen == [(0, steps > 0, True)]


def test_start_epoch_checks_again_once_there_are_scales(tmp_path: Path) -> None:
    """A5: without calibration the report says so; 4 steps per epoch."""
    callback = Results()
    qat_trainer(tmp_path, callback, qat={"start_epoch": 1}, max_epochs=3).fit(Classifier())
    assert [(step, calibrated) for step, _, calibrated in callback.seen] == [(0, False), (4, True)]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("first", [True, False])
def test_runs_before_evaluation_without_training(tmp_path: Path, stage: str, first: bool) -> None:
    callback = Results()
    rest: list[Callback] = [QuantizationAwareTraining(), Calibration(batches=2)]
    run = trainer(tmp_path, *([callback, *rest] if first else [*rest, callback]))
    getattr(run, stage)(Classifier(), **({} if stage == "predict" else {"verbose": False}))
    assert callback.seen == [(0, False, True)]
    assert (tmp_path / "lightning_qat" / "model_check_result.txt").is_file()


def test_training_is_bit_identical(tmp_path: Path) -> None:
    """Foundation: analysis leaves no trace, in a run with shuffling, augmentation, dropout and metrics."""
    runs = []
    for extra in ([], [ModelCheck(show=False)]):
        numbers = noisy_run.RandomNumbers()
        module, run = noisy_run.run(tmp_path, *extra, numbers)
        metrics = dict(run.callback_metrics)
        runs.append(
            [module.state_dict(), run.optimizers[0].state_dict(), metrics, numbers.drawn, torch.get_rng_state()]
        )
    noisy_run.assert_same(*runs)


def test_tensorboard_shows_the_report(tmp_path: Path) -> None:
    """A1: also to TensorBoard as text, read back with its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = ModelCheck(show=False)
    logger = TensorBoardLogger(tmp_path)
    qat_trainer(tmp_path, callback, logger=logger).fit(Classifier())
    events = EventAccumulator(logger.log_dir).Reload()
    (event,) = events.Tensors("model_check/text_summary")
    assert callback.result is not None
    assert event.tensor_proto.string_val[0].decode() == markdown_report(
        callback.result.full_blocks(), 30, "model_check_result.txt"
    )
    assert event.step == 0


def test_other_loggers_and_switches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="CSVLogger shows no text: the model check is only in model_check_result.txt"):
        qat_trainer(tmp_path, ModelCheck(show=False), logger=CSVLogger(tmp_path)).fit(Classifier())
    qat_trainer(tmp_path, ModelCheck(show=False, log=False), logger=CSVLogger(tmp_path)).fit(Classifier())
    assert "Model check" not in capsys.readouterr().out


def test_fast_dev_run_leaves_no_files(tmp_path: Path) -> None:
    callback = Results()
    qat_trainer(tmp_path, callback, fast_dev_run=True).fit(Classifier())
    assert len(callback.seen) == 1
    assert not (tmp_path / "lightning_qat").exists()


def test_fail_on_stops_before_training_and_names_the_file(tmp_path: Path) -> None:
    """Continuous integration: the first finding, and where the rest is."""
    callback = ModelCheck(fail_on="warning", show=False)
    run = qat_trainer(tmp_path, callback, qat=WRONG)
    with pytest.raises(MisconfigurationException, match=r"fail_on='warning'.*See .*model_check_result.txt") as error:
        run.fit(Classifier())
    assert run.global_step == 0
    assert callback.result is not None
    assert callback.result.at_least("warning")[0].what in str(error.value)
    assert (tmp_path / "lightning_qat" / "model_check_result.json").is_file()
    qat_trainer(tmp_path, ModelCheck(fail_on="error", show=False)).fit(Classifier())  # a sound model


def test_batch_size_of_training_is_known_where_batch_norm_needs_it(tmp_path: Path) -> None:
    """BatchNorm with tiny batches."""

    class Tiny(Classifier):
        def train_dataloader(self) -> Any:
            return loader(8, batch_size=2, shuffle=True)

    found = []
    for module in (Tiny(), Classifier()):
        callback = ModelCheck(show=False)
        qat_trainer(tmp_path, callback).fit(module)
        assert callback.result is not None
        found.append([f for f in callback.result.at_least("warning") if "batch" in f.kind])
    (finding,), none = found
    assert "2" in finding.what
    assert none == []


def test_findings_that_only_the_trainer_knows(tmp_path: Path) -> None:
    callback = ModelCheck(show=False)
    run = qat_trainer(tmp_path, callback, qat={"init_from": None})
    run.fit(Classifier())
    assert "initial weights" in kinds(callback.result)
    run.callbacks.append(LearningRateFinder())
    run.state.fn = "fit"
    assert "tuner before calibration" in kinds(callback.check(run, run.lightning_module))


class NanSometimes(Classifier):
    def loss(self, batch: Any) -> Any:
        images, labels = batch
        bad = self.trainer.state.fn == "fit" and not self.trainer.training and not self.trainer.sanity_checking
        return super().loss((torch.where(images > 2.4, torch.nan, images) if bad else images, labels))


@pytest.mark.filterwarnings("ignore:Calibration. ")
def test_what_calibration_saw_becomes_a_finding(tmp_path: Path) -> None:
    callback = ModelCheck(show=False)
    qat_trainer(tmp_path, callback).fit(NanSometimes())
    assert callback.result is not None
    (finding,) = [f for f in callback.result.findings if f.kind == "nan in calibration"]
    assert finding.severity == "warning"
    assert "net:conv1.input0" in finding.names


def test_bad_arguments_and_a_missing_callback_are_refused(tmp_path: Path) -> None:
    """Bad input: one clear error before training."""
    with pytest.raises(MisconfigurationException, match=r"unknown fail_on 'warn'.*did you mean 'warning'"):
        ModelCheck(fail_on="warn")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="ModelCheck needs fake-quants in the model"):
        trainer(tmp_path, ModelCheck()).fit(Classifier())


class Dump(Callback):
    """Every rank writes what it found."""

    def __init__(self, path: Path, check: ModelCheck) -> None:
        self.path = path
        self.check = check

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.check.result is not None
        write_json(self.check.result, self.path / f"rank{trainer.global_rank}.json")


@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks")
@pytest.mark.filterwarnings("ignore:this strategy trains in child processes")
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
def test_two_ranks_have_one_result_and_stop_together(tmp_path: Path) -> None:
    """A1: rank 0 writes; fail_on raises on all ranks."""
    check = ModelCheck(show=False)
    qat_trainer(tmp_path, check, Dump(tmp_path, check), strategy="ddp_fork", devices=2).fit(Classifier())
    written = read_model_check(tmp_path / "lightning_qat" / "model_check_result.json")
    assert read_model_check(tmp_path / "rank0.json") == read_model_check(tmp_path / "rank1.json") == written
    failing = ModelCheck(fail_on="warning", show=False)
    with pytest.raises(Exception, match="fail_on='warning'"):
        qat_trainer(tmp_path, failing, qat=WRONG, strategy="ddp_fork", devices=2).fit(Classifier())
