"""Record the training series of healthy and sick runs: ``python -m tests.sabotage.record``.

Written to tests/analysis/convergence/recorded_runs; done again only when the series hold something new.
"""

from __future__ import annotations

import io
import re
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_qat.callbacks.convergence_monitor import ConvergenceMonitor
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.qconfig import QConfig
from tests.analysis.convergence.recorded import DIRECTORY, RecordedEpoch, RecordedRun, save
from tests.sabotage.pipelines import HEALTHY, QAT_LR, SABOTAGES, Pipeline, Sabotage, qat_run
from tests.sabotage.suite import float_reference

EPOCHS = 5
HEALTHY_RUNS = 10
# what training itself suffers from; the other faults show in no series, only in a comparison with the float run
VISIBLE = {
    "normalization missing in training", "labels shuffled", "labels shifted in the step",
    "augmentation destroys the input", "learning rate 100 times", "average swapped in after every step",
    "one scale fixed at a wrong value",
}  # fmt: skip


class Dividing(Pipeline):
    """A division by zero from the 40th batch on."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss / 0.0 if self.trainer.global_step >= 40 else loss


class Detached(Pipeline):
    """Only the head gets a gradient that is not zero."""

    def dropped(self, h: Tensor) -> Tensor:
        return h.detach() + 0.0 * h


class Recorder(ConvergenceMonitor):
    """Keeps what the series has only of the latest epoch."""

    def __init__(self) -> None:
        super().__init__(float_batches=16)
        self.epochs: list[RecordedEpoch] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        series = self.series
        self.epochs.append(RecordedEpoch(series.metrics, series.points.latest, series.zero_gradients))


def _int2() -> QuantizationAwareTraining:
    return QuantizationAwareTraining(QConfig.of({"activation": {"dtype": "int2"}, "weight": {"dtype": "int2"}}))


ONLY_HERE = (
    Sabotage("learning rate 1000 times", "", (), lambda: Pipeline(lr=1000 * QAT_LR)),
    Sabotage("division by zero", "", (), Dividing),
    Sabotage("gradients cut", "", (), Detached),
    Sabotage("int2, hardly trained", "", (), lambda: Pipeline(lr=1e-6), _int2),
)


def record(sabotage: Sabotage, is_sick: bool, name: str, seed: int = 0) -> None:
    """Train with the monitor, and write what it saw."""
    _, weights = float_reference(seed)
    monitor = Recorder()
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        trainer = qat_run(sabotage, weights, Path(directory), monitor, max_epochs=EPOCHS)
    run = RecordedRun(name, is_sick, int(trainer.num_training_batches), monitor.series, tuple(monitor.epochs))
    save(run, DIRECTORY / (re.sub(r"\W+", "_", name).strip("_") + ".json"))


def main() -> None:
    torch.set_num_threads(1)
    for seed in range(HEALTHY_RUNS):
        record(HEALTHY, False, f"healthy, seed {seed}", seed)
    for sabotage in SABOTAGES:
        if sabotage.name in VISIBLE:
            record(sabotage, True, sabotage.name)
    for sabotage in ONLY_HERE:
        record(sabotage, True, sabotage.name)


if __name__ == "__main__":
    main()
