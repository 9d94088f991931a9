"""What callbacks add to an epoch of the digits example, in processor time of one thread.

.venv/bin/python tests/benchmarks/epoch_cost.py        # prints the tables of README.md
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.digits import DigitsClassifier, DigitsDataModule
from lightning_qat import (
    Calibration,
    ConvergenceMonitor,
    HTMLReport,
    LayerComparison,
    LayerStatistics,
    ModelCheck,
    QuantizationAwareTraining,
    SensitivityAnalysis,
)

ROWS: dict[str, Callable[[], list[Callback]]] = {
    "SensitivityAnalysis": lambda: [SensitivityAnalysis()],
    "SensitivityAnalysis, max_samples=16": lambda: [SensitivityAnalysis(max_samples=16)],
    "LayerStatistics": lambda: [LayerStatistics()],
    "ConvergenceMonitor": lambda: [ConvergenceMonitor()],
    "LayerStatistics, ConvergenceMonitor": lambda: [LayerStatistics(), ConvergenceMonitor()],
    "these three, LayerComparison, ModelCheck, HTMLReport": lambda: [
        LayerStatistics(),
        ConvergenceMonitor(),
        SensitivityAnalysis(),
        LayerComparison(),
        ModelCheck(),
        HTMLReport(),
    ],
}


class Epochs(Callback):
    """The processor time of each epoch, and that of the hooks of some callbacks in it, in seconds.

    Args:
        callbacks: their hooks are replaced by timed ones.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.found: list[tuple[float, float]] = []
        self._start: float | None = None
        self._in_hooks, self._inside = 0.0, False
        for callback in callbacks:
            for name in dir(Callback):
                if name.startswith("on_") and getattr(type(callback), name) is not getattr(Callback, name):
                    setattr(callback, name, functools.partial(self._timed, getattr(callback, name)))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = time.process_time()
        if self._start is not None:
            self.found.append((now - self._start, self._in_hooks))
        self._start, self._in_hooks = now, 0.0

    def _timed(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._inside:  # a hook that runs a step, which calls hooks
            return hook(*args, **kwargs)
        self._inside, start = True, time.process_time()
        try:
            return hook(*args, **kwargs)
        finally:
            self._inside = False
            self._in_hooks += time.process_time() - start


def epoch_cost(epochs: int, callbacks: list[Callback]) -> tuple[float, float]:
    """Return milliseconds of the callbacks and of the rest of an epoch: medians, without the first epoch.

    What runs once per training is in the first epoch: measurements at the start, and where the samples are.
    """
    timed = Epochs(callbacks)
    seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            max_epochs=epochs + 2,
            callbacks=[QuantizationAwareTraining(), Calibration(epochs=1), timed, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            default_root_dir=directory,
        )
        trainer.fit(DigitsClassifier(), DigitsDataModule())
    later = timed.found[1 : epochs + 1]
    return 1e3 * statistics.median(own for _, own in later), 1e3 * statistics.median(all_ - own for all_, own in later)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("| callbacks | ms per epoch | rest of the epoch, ms | share |\n|---|---|---|---|")
    for name, callbacks in ROWS.items():
        for _ in range(arguments.runs):
            analysis, rest = epoch_cost(arguments.epochs, callbacks())
            print(f"| {name} | {analysis:.1f} | {rest:.0f} | {analysis / rest:.1%} |", flush=True)


if __name__ == "__main__":
    main()
