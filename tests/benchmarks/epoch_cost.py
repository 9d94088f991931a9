"""What SensitivityAnalysis adds to an epoch of the digits example, in processor time of one thread.

.venv/bin/python tests/benchmarks/epoch_cost.py        # prints the table of README.md
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.digits import DigitsClassifier, DigitsDataModule
from lightning_qat import Calibration, QuantizationAwareTraining, SensitivityAnalysis


class TimedSensitivity(SensitivityAnalysis):
    """With the processor time of each epoch's analysis, in seconds."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seconds: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start = time.process_time()
        super().on_train_epoch_end(trainer, pl_module)
        self.seconds.append(time.process_time() - start)


class TimedEpochs(Callback):
    """The processor time of each epoch, in seconds."""

    def __init__(self) -> None:
        self._starts: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._starts.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        """Of all epochs but the last."""
        return [end - start for start, end in zip(self._starts, self._starts[1:], strict=False)]


def epoch_cost(epochs: int, **options: Any) -> tuple[float, float]:
    """Return milliseconds of the analysis and of the rest of an epoch: medians, without the first epoch.

    The first epoch's analysis also finds out where the samples are in every tensor.
    """
    sensitivity, timed = TimedSensitivity(**options), TimedEpochs()
    seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            max_epochs=epochs + 2,
            callbacks=[QuantizationAwareTraining(), Calibration(epochs=1), timed, sensitivity],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            default_root_dir=directory,
        )
        trainer.fit(DigitsClassifier(), DigitsDataModule())
    analyses, rests = sensitivity.seconds[1 : epochs + 1], []
    for whole, analysis in zip(timed.seconds[1:], analyses, strict=True):
        rests.append(whole - analysis)
    return 1e3 * statistics.median(analyses), 1e3 * statistics.median(rests)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("| options | analysis, ms | rest of the epoch, ms | share |\n|---|---|---|---|")
    for name, options in (("defaults", {}), ("max_samples=16", {"max_samples": 16})):
        for _ in range(arguments.runs):
            analysis, rest = epoch_cost(arguments.epochs, **options)
            print(f"| {name} | {analysis:.1f} | {rest:.0f} | {analysis / rest:.1%} |", flush=True)


if __name__ == "__main__":
    main()
