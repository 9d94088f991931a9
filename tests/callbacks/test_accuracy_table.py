"""AccuracyTable: float, calibrated and QAT values across runs, pass or fail (D7)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_qat.callbacks.accuracy_table import AccuracyTable
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from tests.harness.small_digits import Digits, pretrained
from tests.harness.trainers import qat_trainer, quiet

BATCHES = 3


def trainer_with(directory: Path, table: AccuracyTable, **kwargs: Any) -> Trainer:
    return qat_trainer(directory, table, **({"limit_train_batches": BATCHES} | kwargs))


def fit(directory: Path, table: AccuracyTable, **kwargs: Any) -> Trainer:
    trainer = trainer_with(directory, table, **kwargs)
    trainer.fit(pretrained())
    return trainer


def runs(directory: Path) -> dict[str, Any]:
    data = json.loads((directory / "lightning_qat" / "result_table.json").read_text())
    return dict(data["runs"])


def test_numbers_are_those_of_trainer_validate(tmp_path: Path) -> None:
    """D7: float, calibrated and QAT against Lightning's own evaluation."""
    table = AccuracyTable(name="a")
    trainer = fit(tmp_path, table)
    stages = runs(tmp_path)["a"]
    assert list(stages) == ["float", "calibrated", "QAT"]
    plain = Trainer(**quiet(), default_root_dir=tmp_path).validate(pretrained(), verbose=False)[0]
    assert stages["float"] == pytest.approx(plain, rel=1e-6)
    # the last values of the run are those of the trained model
    last = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    assert stages["QAT"] == pytest.approx(last, rel=1e-6)
    calibrated = qat_trainer(tmp_path).validate(pretrained(), verbose=False)[0]
    assert stages["calibrated"] == pytest.approx(calibrated, abs=0.02)  # other calibration batches
    assert stages["calibrated"] != stages["float"]


def test_pass_and_fail_with_a_target_for_every_metric(tmp_path: Path) -> None:
    """D7."""
    table = AccuracyTable(target={"val_acc": "5%", "val_loss": 1e-9})
    fit(tmp_path, table)
    assert table.result is not None
    rows = {row.metric: row for row in table.result.rows}
    assert rows["val_acc"].passed is True
    assert rows["val_acc"].float_value is not None
    assert rows["val_acc"].target == pytest.approx(rows["val_acc"].float_value * 0.95)
    assert rows["val_loss"].passed is False
    assert "target missed for val_loss (needs 1e-09)" in table.result.note


def test_run_is_not_disturbed(tmp_path: Path) -> None:
    ends = []
    for tables in ([], [AccuracyTable()]):
        torch.manual_seed(0)
        model = pretrained()
        qat_trainer(tmp_path, *tables, limit_train_batches=BATCHES).fit(model)
        ends.append(
            torch.cat([t.flatten().double() for t in model.state_dict().values() if isinstance(t, torch.Tensor)])
        )
    assert torch.equal(ends[0], ends[1])


def test_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    """D7: columns = stages of all runs."""
    fit(tmp_path, AccuracyTable(name="int8"))
    second = AccuracyTable(name="int16")
    int16 = QuantizationAwareTraining({"activation": {"dtype": "int16"}, "weight": {"dtype": "int16"}})
    fit(tmp_path, second, quantization=int16)
    assert list(runs(tmp_path)) == ["int8", "int16"]
    assert second.result is not None
    assert second.result.columns()[3:-1] == ("int8 calibrated", "int8 QAT", "int16 calibrated", "int16 QAT")
    header = (tmp_path / "lightning_qat" / "result_table.csv").read_text().splitlines()[0]
    assert header == "metric,float,target,int8 calibrated,int8 QAT,int16 calibrated,int16 QAT,passed"
    assert "| val\\_acc |" in (tmp_path / "lightning_qat" / "result_table.md").read_text()


@pytest.mark.parametrize(("name", "expected"), [("mine", ["mine", "mine (2)"]), (None, ["run", "run (2)"])])
def test_second_run_of_the_same_name_overwrites_nothing(name: str | None, expected: list[str], tmp_path: Path) -> None:
    """D7: and without a logger there is no version to tell runs apart."""
    fit(tmp_path, AccuracyTable(name=name))
    first = runs(tmp_path)[expected[0]]
    fit(tmp_path, AccuracyTable(name=name))
    assert list(runs(tmp_path)) == expected
    assert runs(tmp_path)[expected[0]] == first


def test_callback_used_for_a_second_fit_begins_a_new_run(tmp_path: Path) -> None:
    table = AccuracyTable(name="a")
    fit(tmp_path, table)
    fit(tmp_path, table)
    assert list(runs(tmp_path)) == ["a", "a (2)"]


def test_resumed_run_goes_on_with_its_own_entry(tmp_path: Path) -> None:
    """Foundation 7."""
    fit(tmp_path, AccuracyTable(name="a"))
    trainer = fit(tmp_path, AccuracyTable(name="a"))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    before = runs(tmp_path)
    again = trainer_with(tmp_path, AccuracyTable(name="a"), max_epochs=2)
    again.fit(Digits(), ckpt_path=tmp_path / "one.ckpt")
    after = runs(tmp_path)
    assert list(after) == ["a", "a (2)"]
    assert after["a"] == before["a"]
    assert after["a (2)"]["float"] == before["a (2)"]["float"]
    assert after["a (2)"]["QAT"] != before["a (2)"]["QAT"]


def test_test_after_fit_joins_the_run_and_does_not_call_trained_weights_float(tmp_path: Path) -> None:
    """D7: compare with the float model, not with trained weights."""
    trainer = fit(tmp_path, AccuracyTable(name="a"))
    before = runs(tmp_path)["a"]
    expected = trainer.test(trainer.lightning_module, verbose=False)[0]["test_acc"]
    after = runs(tmp_path)["a"]
    assert after["QAT"] == {**before["QAT"], "test_acc": pytest.approx(expected)}
    assert after["float"] == before["float"]
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer_with(tmp_path, AccuracyTable(name="a")).test(Digits(), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert list(runs(tmp_path)) == ["a"]
    assert runs(tmp_path)["a"] == after


def test_weights_only_checkpoint_is_not_taken_for_float(tmp_path: Path) -> None:
    """It does not say whose weights it holds."""
    trainer = fit(tmp_path, AccuracyTable(name="a"))
    trainer.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    trainer_with(tmp_path, AccuracyTable(name="b")).validate(Digits(), ckpt_path=tmp_path / "w.ckpt", verbose=False)
    assert list(runs(tmp_path)["b"]) == ["QAT"]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_alone_compares_float_with_calibrated(stage: str, tmp_path: Path) -> None:
    """D1, D7: post-training quantization is a Trainer call."""
    table = AccuracyTable(name="ptq")
    values = getattr(trainer_with(tmp_path, table), stage)(pretrained(), verbose=False)[0]
    stages = runs(tmp_path)["ptq"]
    assert list(stages) == ["float", "calibrated"]
    assert stages["calibrated"] == pytest.approx(values, rel=1e-6)
    plain = getattr(Trainer(**quiet(), default_root_dir=tmp_path), stage)(pretrained(), verbose=False)[0]
    assert stages["float"] == pytest.approx(plain, rel=1e-6)
    assert table.result is not None
    assert table.result.note.startswith("ptq calibrated: target ")
    loader = pretrained().val_dataloader() if stage == "validate" else pretrained().test_dataloader()
    assert table.result.samples == len(loader.dataset)
    assert table.result.blocks()[0].title == f"Accuracy of run ptq on {len(loader.dataset)} samples"


def test_calibration_at_a_later_epoch_is_noted_then(tmp_path: Path) -> None:
    """D7."""
    quantization = QuantizationAwareTraining(start_epoch=1)
    fit(tmp_path, AccuracyTable(name="late"), quantization=quantization, max_epochs=2)
    assert list(runs(tmp_path)["late"]) == ["float", "calibrated", "QAT"]


def test_unknown_metric_lists_what_is_logged(tmp_path: Path) -> None:
    """Bad input: before the first training step."""
    for table in (AccuracyTable(metrics=["val_accuracy"]), AccuracyTable(target={"val_accuracy": "1%"})):
        trainer = trainer_with(tmp_path, table)
        with pytest.raises(MisconfigurationException, match=r"'val_accuracy': did you mean 'val_acc'.*val_loss"):
            trainer.fit(pretrained())
        assert trainer.global_step == 0
    assert {path.name for path in (tmp_path / "lightning_qat").iterdir()} == {"quant_plan.json"}


def test_test_that_logs_other_metrics_than_validation_is_not_an_error(tmp_path: Path) -> None:
    """One YAML file serves fit and test."""
    table = AccuracyTable(name="a", metrics=["val_acc"])
    trainer = fit(tmp_path, table)
    with pytest.warns(UserWarning, match=r"test step logs none of the metrics asked for .val_acc.. It logs: test_acc"):
        trainer.test(trainer.lightning_module, verbose=False)
    assert list(runs(tmp_path)["a"]["QAT"]) == ["val_acc"]


def test_listed_before_calibration_is_an_error(tmp_path: Path) -> None:
    """Bad input."""
    callbacks = [QuantizationAwareTraining(), AccuracyTable(), Calibration()]
    trainer = Trainer(**quiet(), max_epochs=1, default_root_dir=tmp_path, callbacks=callbacks)
    with pytest.raises(MisconfigurationException, match=r"listed before Calibration.*List it after"):
        trainer.fit(pretrained())


def test_corrupted_table_is_an_error_before_training_and_is_left_alone(tmp_path: Path) -> None:
    """Bad input: nothing is overwritten silently."""
    path = tmp_path / "lightning_qat" / "result_table.json"
    path.parent.mkdir()
    path.write_text('{"version": 1, "runs": {"a"')
    trainer = trainer_with(tmp_path, AccuracyTable())
    with pytest.raises(MisconfigurationException, match=r"result_table\.json is not a result table.*move it away"):
        trainer.fit(pretrained())
    assert trainer.global_step == 0
    assert path.read_text() == '{"version": 1, "runs": {"a"'


@pytest.mark.parametrize("arguments", [{"target": "1"}, {"target": {"a": "x"}}, {"batches": 0}])
def test_bad_arguments_are_refused(arguments: Any) -> None:
    """Bad input; "1" alone is the value 1, which is fine."""
    if arguments == {"target": "1"}:
        AccuracyTable(**arguments)
        return
    with pytest.raises(MisconfigurationException, match=r"write 1%|must be at least 1"):
        AccuracyTable(**arguments)


def test_fast_dev_run_leaves_no_files(tmp_path: Path) -> None:
    fit(tmp_path, AccuracyTable(), fast_dev_run=True)
    assert not (tmp_path / "lightning_qat").exists()


def test_table_reaches_tensorboard(tmp_path: Path) -> None:
    """Foundation 8."""
    trainer = fit(tmp_path, AccuracyTable(), logger=TensorBoardLogger(tmp_path, name="int8"))
    events = EventAccumulator(str(trainer.log_dir)).Reload()
    text = events.Tensors("result_table/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "target" in text
    assert "val_acc" in text
    assert list(runs(tmp_path)) == ["int8/version_0"]


def test_stopped_before_the_first_step_notes_no_qat(tmp_path: Path) -> None:
    """Calibrated values must not be called QAT."""

    class Stopping(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = True

    qat_trainer(tmp_path, AccuracyTable(name="a"), Stopping()).fit(pretrained())
    assert list(runs(tmp_path)["a"]) == ["float", "calibrated"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this strategy trains in child processes")
def test_two_ranks_write_one_table(tmp_path: Path) -> None:
    """Foundation 7."""

    class Ranks(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            table = next(c for c in trainer.callbacks if isinstance(c, AccuracyTable))  # type: ignore[attr-defined]
            assert table.result is not None
            (tmp_path / f"{trainer.global_rank}.txt").write_text(f"{table._run} {table.result.note}")

    fit(tmp_path, AccuracyTable(name="a"))
    trainer = qat_trainer(
        tmp_path, AccuracyTable(name="a"), Ranks(), devices=2, strategy="ddp_fork", limit_train_batches=2
    )
    trainer.fit(pretrained())
    assert list(runs(tmp_path)) == ["a", "a (2)"]
    notes = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert notes[0] == notes[1]
    assert notes[0].startswith("a (2) a (2) QAT: target ")
