"""The callback that finds the scales before training starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import override

from lightning_qat.callbacks.extra_pass import (
    analysis_batches,
    misconfiguration,
    require_regions,
    run_step,
    undisturbed,
)
from lightning_qat.quantization.calibration import CalibrationPass, CalibrationResult


class Calibration(Callback):
    """Run a pass over calibration data before the sanity check, and derive all scales from it.

    Also runs ahead of ``trainer.validate``, ``test`` and ``predict`` alone, so that post-training quantization is a Trainer
    call. Skipped when a restored checkpoint brings calibrated scales, and in a second fit. Data come from
    ``calibration_dataloader()`` of the datamodule or module if there is one, else from the training data, in eval mode.

    Args:
        batches: number of batches over all ranks together; 32 if neither is given.
        epochs: full passes of the loader instead.

    Raises:
        MisconfigurationException: both or nonsense are given; QuantizationAwareTraining is missing; there are no data.

    Attributes:
        result: what the last calibration did and found.
    """

    def __init__(self, batches: int | None = None, epochs: int | None = None) -> None:
        if batches is not None and epochs is not None:
            raise MisconfigurationException(
                "Calibration takes batches or epochs, not both: write Calibration(batches=32)."
            )
        for name, value in (("batches", batches), ("epochs", epochs)):
            if value is not None and value < 1:
                raise MisconfigurationException(f"Calibration({name}={value}): must be at least 1.")
        self.batches = 32 if batches is None and epochs is None else batches
        self.epochs = epochs
        self.result: CalibrationResult | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining

        if not any(isinstance(c, QuantizationAwareTraining) for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "Calibration needs fake-quants in the model: add QuantizationAwareTraining() to the Trainer's callbacks."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._calibrate_if_needed(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._calibrate_if_needed(trainer, pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._calibrate_if_needed(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._calibrate_if_needed(trainer, pl_module)

    def should_calibrate(self, pl_module: pl.LightningModule) -> bool:
        """Whether a region has no scales yet. Override to calibrate again."""
        return any(not region.is_calibrated for region in require_regions(pl_module, "Calibration").values())

    def _calibrate_if_needed(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.should_calibrate(pl_module):
            return
        with misconfiguration():
            self.result = self._calibrate(trainer, pl_module)
        points = self.result.points
        rank_zero_info(f"Calibration: {points} points from {self.result.batches * trainer.world_size} batches.")
        for finding in self.result.findings:
            rank_zero_warn(f"Calibration: {finding.message}")

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> CalibrationResult:
        regions = require_regions(pl_module, "Calibration")
        per_rank = math.ceil(self.batches / trainer.world_size) if self.batches is not None else math.inf
        with (
            undisturbed(trainer, pl_module),
            torch.inference_mode(False),
            torch.no_grad(),
            CalibrationPass(regions) as calibration,
            progress(trainer, "Calibrating", None if per_rank == math.inf else int(per_rank)) as advance,
        ):
            pl_module.eval()
            for _ in range(self.epochs or 1):
                for extra in analysis_batches(trainer, pl_module, per_rank, "calibration"):
                    run_step(trainer, pl_module, extra, "validate")
                    calibration.batch_done()
                    advance()
        return calibration.finish()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}


@contextmanager
def progress(trainer: pl.Trainer, what: str, total: int | None) -> Iterator[Any]:
    """Show a progress bar for an extra pass on rank 0, unless the trainer shows none; yields ``advance()``."""
    bar = trainer.progress_bar_callback
    if not trainer.is_global_zero or not isinstance(bar, ProgressBar) or getattr(bar, "is_disabled", False):
        yield lambda: None
        return
    live = getattr(bar, "progress", None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = live if live is not None else Progress(*columns, transient=True)
    if live is None:
        shown.start()
    task = shown.add_task(what, total=total)
    try:
        yield lambda: shown.advance(task)
    finally:
        shown.remove_task(task)
        if live is None:
            shown.stop()
