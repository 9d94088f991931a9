"""A calibrated model that has lost accuracy is analysed before its first step; later reports point back to it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_qat.callbacks.convergence_monitor import ConvergenceMonitor
from lightning_qat.callbacks.layer_comparison import LayerComparison
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.quantized_run import evaluations_of
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.quantization.qconfig import QConfig
from tests.harness.planted import DominatingChannel, Planted, Sentinel, SinePlaces
from tests.harness.small_digits import Digits, pretrained
from tests.harness.state import assert_same
from tests.harness.trainers import qat_trainer

# divisors that become zero make gradients that are not finite
pytestmark = pytest.mark.filterwarnings("ignore:.*of the float model holds NaN")
FILES = {
    f"calibrated_{name}.{end}"
    for name in ("sensitivity", "layer_comparison", "diagnosis")
    for end in ("csv", "txt", "json")
}


def quantization(rules: list[dict[str, Any]] | None = None, **kwargs: Any) -> QuantizationAwareTraining:
    """Weights have one scale, so that one of their channels can dominate."""
    qconfig = QConfig.of({"weight": {"granularity": "per_tensor"}})
    return QuantizationAwareTraining(qconfig=qconfig, overrides=rules or [], **kwargs)


class Start(Callback):
    """Notes what there is when the first training step begins."""

    def __init__(self, capture: pytest.CaptureFixture[str] | None = None) -> None:
        self.capture = capture
        self.files: set[str] = set()
        self.shown = ""
        self.accuracy: list[float] = []
        self.epoch = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "lightning_qat"
        found = {path.name for path in folder.glob("calibrated_*")}
        if self.epoch < 0 and (found or trainer.global_step == 0):
            self.files, self.epoch = found, trainer.current_epoch if found else -1
            self.shown += self.capture.readouterr().out if self.capture else ""
        if trainer.global_step == 0:
            results = [evaluations_of(trainer).evaluate(trainer, pl_module, state) for state in ("off", "quantize")]
            self.accuracy = [result.metrics["val_acc"] for result in results]


def run(directory: Path, module: LightningModule, *callbacks: Callback, **kwargs: Any) -> Trainer:
    seed_everything(0, verbose=False)
    settings = {"max_epochs": 1, "limit_train_batches": 2, "calibration_batches": 12, "quantization": quantization()}
    trainer = qat_trainer(directory, *callbacks, **(settings | kwargs))
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize(
    ("model", "point", "remedy"),
    [
        (SinePlaces, "div_0.input1", "split"),
        (DominatingChannel, "hidden.weight", "per_channel"),
    ],
)
def test_cause_comes_first_before_the_first_step_and_its_yaml_repairs(
    model: type[Planted], point: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A divisor of sine places, and a channel that dominates a weight with one scale."""
    start, logger = Start(capsys), TensorBoardLogger(tmp_path)
    trainer = run(tmp_path, model.pretrained(), SensitivityAnalysis(), LayerComparison(), start, logger=logger)
    assert start.accuracy[1] < 0.9 * start.accuracy[0]
    assert start.files == FILES
    folder = Path(str(trainer.log_dir)) / "lightning_qat"
    first = json.loads((folder / "calibrated_diagnosis.json").read_text())["rows"][0]
    assert (first["point"], first["verdict"]) == (point, "non-uniform")
    assert remedy in first["yaml"]
    assert first["yaml"].splitlines()[1] in start.shown
    assert "Calibration alone loses accuracy (val_acc" in " ".join(start.shown.split())
    assert f"1. {point}: non-uniform" in (folder / "calibrated_layer_comparison.txt").read_text()
    assert json.loads((folder / "calibrated_sensitivity.json").read_text())["rows"][0]["point"] == point
    texts = EventAccumulator(str(trainer.log_dir)).Reload().Tags()["tensors"]
    assert {"calibrated_sensitivity/text_summary", "calibrated_diagnosis/text_summary"} <= set(texts)

    repaired = Start()
    rules = yaml.safe_load(first["yaml"])["overrides"]
    run(tmp_path / "repaired", model.pretrained(), LayerComparison(), repaired, quantization=quantization(rules))
    assert repaired.accuracy[1] > 0.97 * repaired.accuracy[0]
    assert repaired.files == set()


def test_task_that_loses_alone_is_enough(tmp_path: Path) -> None:
    """-99 for what is missing doubles the error of one of two tasks."""
    comparison = LayerComparison()
    run(tmp_path, Sentinel.pretrained(), comparison)
    assert comparison.calibration_loss.startswith("val_mae ")
    first = json.loads((tmp_path / "lightning_qat" / "calibrated_diagnosis.json").read_text())["rows"][0]
    assert first["verdict"] == "non-uniform"
    assert "mask them in the model" in first["action"]


def test_order_of_the_diagnosis_does_not_need_a_sensitivity(tmp_path: Path) -> None:
    comparison = LayerComparison()
    run(tmp_path, SinePlaces.pretrained(), comparison)
    assert comparison.diagnosis is not None
    assert comparison.diagnosis.rows[0].point == "div_0.input1"


class Counting(Digits):
    """Counts what is evaluated, also by copies of it."""

    steps = 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        type(self).steps += 1
        super().validation_step(batch, batch_idx)


class CountAtStart(Callback):
    steps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.steps = self.steps or Counting.steps


def test_good_calibration_is_not_analysed_and_costs_no_evaluation_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ConvergenceMonitor evaluates both models anyway. Warnings are errors here."""
    counts = []
    for callbacks in ([], [SensitivityAnalysis(), LayerComparison()]):
        Counting.steps = 0
        model = Counting()
        model.load_state_dict(pretrained().state_dict())
        monitor, count, start = ConvergenceMonitor(float_batches=2), CountAtStart(), Start(capsys)
        folder, plain = tmp_path / str(len(callbacks)), QuantizationAwareTraining()
        run(folder, model, *callbacks, monitor, count, start, quantization=plain)
        counts.append(count.steps)
        assert start.files == set()
        assert "Calibration alone" not in start.shown
    assert counts[0] == counts[1]


def test_training_ends_bit_for_bit_as_without_it(tmp_path: Path) -> None:
    """Foundation: weights, optimizer, random numbers."""
    ends = []
    for callbacks in ([], [SensitivityAnalysis(), LayerComparison()]):
        model, start = DominatingChannel.pretrained(lr=1e-3), Start()
        trainer = run(tmp_path / str(len(callbacks)), model, *callbacks, start, limit_train_batches=4, max_epochs=2)
        assert start.files == (FILES if callbacks else set())
        numbers = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        ends.append([model.state_dict(), trainer.optimizers[0].state_dict(), torch.get_rng_state(), numbers])
    assert_same(ends[0], ends[1])


@pytest.mark.parametrize("monitors", [True, False])
def test_report_about_a_diverged_model_points_back(monitors: bool, tmp_path: Path) -> None:
    """The wreck is not taken for the cause, whether ConvergenceMonitor flags the run or only the metric shows it."""
    callbacks = [SensitivityAnalysis(), LayerComparison()]
    callbacks = [ConvergenceMonitor(float_batches=2), *callbacks] if monitors else callbacks
    with pytest.warns(UserWarning, match="collapsed") if monitors else nullcontext():
        run(tmp_path, DominatingChannel.pretrained(lr=3.0), *callbacks, limit_train_batches=6, max_epochs=2)
    folder = tmp_path / "lightning_qat"
    for name in ("diagnosis", "layer_comparison", "sensitivity"):
        text = " ".join((folder / f"{name}.txt").read_text().split())
        assert "This is about a model that has diverged (" in text
        assert ("metric collapsed" in text) == monitors
        assert "calibrated_diagnosis.txt first" in text
    early, late = (json.loads((folder / f"{name}.json").read_text()) for name in ("calibrated_diagnosis", "diagnosis"))
    assert early["rows"][0]["point"] == "hidden.weight"
    assert late["rows"][0]["point"] != "hidden.weight"


def test_weights_that_are_not_finite_point_back_too(tmp_path: Path) -> None:
    """Then there is no list at all, so the warning says where to look."""
    with pytest.warns(
        UserWarning, match=r"LayerComparison, epoch 1: .*This is .* \(hidden.weight is not finite.*calibrated_diagnos"
    ):
        run(tmp_path, SinePlaces.pretrained(), LayerComparison())


def test_loss_of_calibration_that_training_does_not_win_back_points_back(tmp_path: Path) -> None:
    comparison = LayerComparison()
    run(tmp_path, DominatingChannel.pretrained(lr=1e-6), comparison)
    assert comparison.diagnosis is not None
    assert "Training has not won back what calibration lost (val_acc" in comparison.diagnosis.remark
    assert "calibrated_diagnosis.txt first" in comparison.diagnosis.remark


def test_diverged_run_after_a_good_calibration_is_not_sent_to_a_report_that_does_not_exist(tmp_path: Path) -> None:
    comparison = LayerComparison()
    run(tmp_path, pretrained(lr=3.0), comparison, limit_train_batches=8, quantization=QuantizationAwareTraining())
    assert comparison.diagnosis is not None
    assert "PipelineCheck() says whether it is quantization." in comparison.diagnosis.note
    assert not list((tmp_path / "lightning_qat").glob("calibrated_*"))


def test_calibration_in_the_middle_of_training_is_looked_at_then(tmp_path: Path) -> None:
    start = Start()
    run(
        tmp_path,
        SinePlaces.pretrained(),
        LayerComparison(),
        start,
        quantization=quantization(start_epoch=1),
        max_epochs=2,
    )
    assert (start.epoch, len(start.files)) == (1, 6)


def test_trained_model_is_not_taken_for_a_calibrated_one(tmp_path: Path) -> None:
    """A resumed run and a second fit."""
    model, comparison = SinePlaces.pretrained(lr=1e-3), LayerComparison()
    trainer = run(tmp_path, model, comparison)
    for file in (tmp_path / "lightning_qat").glob("calibrated_*"):
        file.unlink()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert not list((tmp_path / "lightning_qat").glob("calibrated_*"))


def test_analysis_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    class Failing(LayerComparison):
        def analyse_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise RuntimeError("no.")

    with pytest.warns(
        UserWarning, match=r"Failing, epoch 0: the analysis failed with RuntimeError: no\..*Training goes on"
    ):
        trainer = run(tmp_path, SinePlaces.pretrained(), Failing())
    assert trainer.global_step == 2


def test_it_can_be_left_out(tmp_path: Path) -> None:
    class Late(LayerComparison):
        def should_analyse_start(self, trainer: Trainer) -> bool:
            return False

    start = Start()
    run(tmp_path, SinePlaces.pretrained(), Late(), start)
    assert start.files == set()


def test_two_ranks_look_at_the_calibrated_model_together(tmp_path: Path) -> None:
    """DDP: evaluation, analysis and report are collective."""
    settings: dict[str, Any] = {"devices": 2, "strategy": "ddp_spawn"}
    run(tmp_path, DominatingChannel.pretrained(), SensitivityAnalysis(), LayerComparison(), **settings)
    rows = json.loads((tmp_path / "lightning_qat" / "calibrated_diagnosis.json").read_text())["rows"]
    assert rows[0]["point"] == "hidden.weight"
