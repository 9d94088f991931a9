"""The base of callbacks that write reports, which are never worth a run."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.utilities.warnings import PossibleUserWarning
from typing_extensions import override

from lightning_qat.callbacks.trainer.final_report import FinalReport
from lightning_qat.callbacks.trainer.messages import rank_zero_info, rank_zero_warn
from lightning_qat.reporting.reports_of_run import RunReports


class ReportingCallback(FinalReport):
    """A callback with a final report. Its reports go through ``self._reports``: what cannot be written is tried again.

    A subclass that overrides ``teardown`` or ``on_exception`` calls that of this class.
    """

    def __init__(self) -> None:
        self._reports = reports_of_run()

    @property
    def missing_files(self) -> dict[Path, str]:
        """The files that could not be written in the latest run, with the reason."""
        return self._reports.missing

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._reports.finish()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._reports.finish()  # Lightning does not call teardown then


def reports_of_run() -> RunReports:
    """Return reports whose remarks become warnings and infos of rank zero."""
    return RunReports(_warn, rank_zero_info)


def _warn(text: str) -> None:
    rank_zero_warn(text, category=PossibleUserWarning)
