"""The base of callbacks that analyse and write reports, which are never worth a run."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from typing_extensions import override

from lightning_qat.callbacks.trainer.final_report import FinalReport
from lightning_qat.callbacks.trainer.messages import rank_zero_info, rank_zero_warn
from lightning_qat.reporting.reports_of_run import RunReports

T = TypeVar("T")


class ReportingCallback(FinalReport):
    """A callback with a final report. Its analyses go through :meth:`tried`, its reports through ``self._reports``.

    An analysis that fails is left out. A report that cannot be written is tried again until the run ends.

    A subclass that overrides ``teardown`` or ``on_exception`` calls that of this class.

    Attributes:
        failures: why analyses of the latest run that has ended are missing.
    """

    def __init__(self) -> None:
        self._reports = reports_of_run()
        self._failures: set[str] = set()
        self.failures: tuple[str, ...] = ()

    def tried(self, trainer: pl.Trainer, analyse: Callable[[], T], *, refuses: bool = True) -> T | None:
        """Return the result of an analysis, or None if it fails: then a warning says why, once for each reason.

        Such an analysis runs the user's steps at unusual moments, copies the module, and may need more memory than
        training does. What it changes is put back also if it fails, so that training goes on as without it.

        Args:
            trainer: the running trainer.
            analyse: the analysis, with its reports.
            refuses: a MisconfigurationException before the first step ends the run: then nothing is lost yet.

        Raises:
            Exception: see :func:`ends_run`.
        """
        try:
            return analyse()
        except Exception as error:
            if ends_run(trainer, error) and (refuses or not isinstance(error, MisconfigurationException)):
                raise
            self._note_failure(trainer, error)
            return None

    def _note_failure(self, trainer: pl.Trainer, error: Exception) -> None:
        text = str(error)
        if not isinstance(error, MisconfigurationException):
            text = f"the analysis failed with {described(error)}. Training goes on without it."
        if text not in self._failures:
            self._failures.add(text)
            rank_zero_warn(f"{type(self).__name__}, epoch {trainer.current_epoch}: {text}")

    @property
    def missing_files(self) -> dict[Path, str]:
        """The files that could not be written in the latest run, with the reason."""
        return self._reports.missing

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end_run()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end_run()  # Lightning does not call teardown then

    def _end_run(self) -> None:
        self.failures, self._failures = tuple(self._failures), set()
        self._reports.finish()


def ends_run(trainer: pl.Trainer, error: Exception) -> bool:
    """Whether an error in an analysis ends the run.

    It does before the first step, if it is about the configuration; and if there are several ranks, unless it is about
    the configuration, which they share: the others would wait for this one forever.
    """
    if isinstance(error, MisconfigurationException):
        return trainer.global_step == 0
    return trainer.world_size > 1


def described(error: Exception) -> str:
    """Return the type, the text and the place of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def reports_of_run() -> RunReports:
    """Return reports whose remarks become warnings and infos of rank zero."""
    return RunReports(_warn, rank_zero_info)


def _warn(text: str) -> None:
    rank_zero_warn(text, category=PossibleUserWarning)
