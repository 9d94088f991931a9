"""An analysis that cannot run warns, and the training run goes on exactly as without it.

The kinds: what an analysis copies cannot be copied (optimizers, schedulers, tensors with an odd attribute), and a step
that only runs in Lightning's own loop. Errors of training itself are raised as ever.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_qat import (
    AccuracyTable,
    ConvergenceMonitor,
    FloatFinetune,
    LayerComparison,
    LayerStatistics,
    PipelineCheck,
    PipelineFingerprint,
    SensitivityAnalysis,
    ZeroLRFinetune,
)
from tests.harness.classifier import Classifier, loader
from tests.harness.state import assert_same, state_of
from tests.harness.trainers import qat_trainer

CALLBACKS: dict[str, Callable[[], Callback]] = {
    "accuracy": AccuracyTable,
    "comparison": LayerComparison,
    "fingerprint": PipelineFingerprint,
    "float": lambda: FloatFinetune(batches=1),
    "monitor": lambda: ConvergenceMonitor(float_batches=1),
    "pipeline": lambda: PipelineCheck(batches=1),
    "sensitivity": lambda: SensitivityAnalysis(metric="val_loss"),
    "statistics": lambda: LayerStatistics(batches=1),
    "zero lr": lambda: ZeroLRFinetune(batches=1),
}


class OnlyInTheLoop(Classifier):
    """Its steps count on a callback of the user, whose hooks our evaluation does not run."""

    ready = False

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.ready and self.trainer.state.fn == "fit" and not self.is_set_up:
            raise RuntimeError("the cache was not filled")
        super().validation_step(batch, batch_idx)

    is_set_up = True  # until then insertion and calibration run it


class Fills(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.is_set_up = False  # type: ignore[assignment]

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        pl_module.ready = True  # type: ignore[assignment]

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        pl_module.ready = False  # type: ignore[assignment]


class OddOptimizer(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        optimizer.lock = threading.Lock()  # type: ignore[attr-defined]
        return optimizer


class OddTensor(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1))
        self.table.lock = threading.Lock()


def run(path: Path, module: LightningModule, *callbacks: Callback) -> list[str]:
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qat_trainer(path, Fills(), *callbacks, max_epochs=2).fit(module, loader(shuffle=True), loader(16, seed=1))
    return [str(warning.message) for warning in caught]


def made(module_class: type[Classifier]) -> Classifier:
    torch.manual_seed(1)
    return module_class()


@pytest.mark.parametrize("name", sorted(CALLBACKS))
def test_a_step_that_fails_outside_of_the_loop_does_not_end_training(tmp_path: Path, name: str) -> None:
    """The weights are those of a run without the callback; the warning says the error and its place, once."""
    plain, module = made(OnlyInTheLoop), made(OnlyInTheLoop)
    run(tmp_path / "plain", plain)
    texts = [t for t in run(tmp_path / "analysed", module, CALLBACKS[name]()) if "the cache was not filled" in t]
    assert_same(state_of(module), state_of(plain))
    assert 1 <= len(texts) <= 2  # of a callback that analyses at the start, too
    assert len(set(texts)) == len(texts)
    assert all(type(CALLBACKS[name]()).__name__ in text for text in texts)


@pytest.mark.parametrize("module_class", [OddOptimizer, OddTensor])
@pytest.mark.parametrize("name", ["float", "monitor", "pipeline", "zero lr"])
def test_what_cannot_be_copied_does_not_end_training(tmp_path: Path, name: str, module_class: type[Classifier]) -> None:
    plain, module = made(module_class), made(module_class)
    run(tmp_path / "plain", plain)
    texts = [text for text in run(tmp_path / "analysed", module, CALLBACKS[name]()) if "_thread.lock" in text]
    assert_same(state_of(module), state_of(plain))
    assert len(texts) == 1
    assert "Training goes on without" in texts[0]


def test_the_monitor_keeps_what_it_could_measure(tmp_path: Path) -> None:
    """Only the loss of the float model needs a copy."""
    monitor = ConvergenceMonitor(float_batches=1)
    run(tmp_path, made(OddOptimizer), monitor)
    assert monitor.series.float_loss is None
    assert monitor.series.calibrated is not None
    assert monitor.series.points.epochs == 2
    assert monitor.result is not None


def test_errors_of_training_are_raised(tmp_path: Path) -> None:
    class Breaks(Classifier):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        run(tmp_path, made(Breaks), *(make() for make in CALLBACKS.values()))


def test_a_mistake_in_the_configuration_is_raised_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="no such metric"):
        run(tmp_path, made(Classifier), SensitivityAnalysis(metric="val_lost"))
