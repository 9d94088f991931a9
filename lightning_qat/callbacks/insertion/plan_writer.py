"""The file that says which plan is in effect, written at the start and at the end of training."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning.pytorch as pl

from lightning_qat.callbacks.trainer.output_directory import leaves_files, run_directory
from lightning_qat.callbacks.trainer.reporting_callback import reports_of_run
from lightning_qat.export.plan_files import FILE_NAME, write_plan


class PlanWriter:
    """Writes ``quant_plan.json`` of one run into its directory. Call its methods on all ranks."""

    def __init__(self) -> None:
        self._has_started = False
        self._reports = reports_of_run()

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the plan that training starts with."""
        self._write(trainer, pl_module)
        self._has_started = True

    def end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the plan with the scales of the weights that are kept, if there was training, now or before."""
        if self._has_started or trainer.ckpt_path is not None:
            self._write(trainer, pl_module)

    @property
    def missing_files(self) -> dict[Path, str]:
        """The files that could not be written in the latest run, with the reason."""
        return self._reports.missing

    def finish(self) -> None:
        """Try once more what could not be written."""
        self._reports.finish()

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        directory = run_directory(trainer)  # broadcasts: on all ranks
        if leaves_files(trainer):
            self._reports.write(directory / FILE_NAME, partial(write_plan, pl_module, directory))
