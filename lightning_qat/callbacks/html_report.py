"""The callback that writes the page of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
from typing_extensions import override

from lightning_qat.callbacks.trainer._compat import steps_taken
from lightning_qat.callbacks.trainer.misconfiguration import misconfiguration
from lightning_qat.callbacks.trainer.numeric_arguments import require_at_least
from lightning_qat.callbacks.trainer.output_directory import console_of, leaves_files, run_directory
from lightning_qat.callbacks.trainer.reporting_callback import ReportingCallback
from lightning_qat.reporting.console import print_text
from lightning_qat.reporting.html.page import FILE_NAME, require_jinja, write_report
from lightning_qat.reporting.html.provenance import FILE_NAME as PROVENANCE
from lightning_qat.reporting.html.provenance import write_provenance
from lightning_qat.reporting.loggers import log_text
from lightning_qat.reporting.tables import escape_markdown


class HTMLReport(ReportingCallback):
    """Write ``report.html``: one page with the verdict, the findings, the metrics and all points of this run.

    The page is one file that needs no network. It is made from the files of the run, so ``python -m lightning_qat
    report RUN_DIR`` makes the same page later. It is written when training begins, behind every n-th epoch, and at the
    end of fit, validate and test; always as a whole, so that a killed run leaves the last one. A page that cannot be
    written ends no run. The page shows what the other callbacks have found, wherever they stand in the list.

    Goes to: ``report.html`` in the run's ``lightning_qat`` directory, and ``provenance.json`` with the command, the
    seed and the versions; values of options that are called like a secret are left out. Loggers that show text get the
    path of the page. A ``fast_dev_run`` leaves no files.

    Args:
        every_n_epochs: number of epochs from one page to the next.

    Raises:
        MisconfigurationException: Jinja2 is missing (``pip install 'lightning-qat[html]'``).

    Attributes:
        path: the page of the latest run; None before it is written.

    Example::

        trainer = Trainer(callbacks=[QuantizationAwareTraining(), Calibration(), LayerStatistics(), HTMLReport()])
    """

    def __init__(self, every_n_epochs: int = 5) -> None:
        require_at_least("HTMLReport", every_n_epochs=every_n_epochs)
        with misconfiguration():
            require_jinja()
        super().__init__()
        self.every_n_epochs = every_n_epochs
        self.path: Path | None = None
        self._directory: Path | None = None

    def should_write(self, trainer: pl.Trainer) -> bool:
        """Whether to write the page before this epoch begins. Override for another schedule."""
        return trainer.current_epoch % self.every_n_epochs == 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.should_write(trainer):  # all callbacks have written what they found in the epoch before
            self._write()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._begin(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._finish(trainer)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._write()
        super().on_exception(trainer, pl_module, exception)

    def _begin(self, trainer: pl.Trainer) -> None:
        directory = run_directory(trainer)  # broadcasts: on all ranks
        self._directory = directory if leaves_files(trainer) else None
        self.path = None
        self._note_provenance(trainer, finished=False)

    def _finish(self, trainer: pl.Trainer) -> None:
        directory = run_directory(trainer)  # broadcasts: on all ranks; a resumed run may have had no start
        self._directory = directory if leaves_files(trainer) else None
        self._note_provenance(trainer, finished=True)
        self._write()
        if self.path is None:
            return
        path, step = str(self.path.resolve()), steps_taken(trainer)
        text = f"The report of this run: {escape_markdown(path)}"
        self._reports.send(trainer.loggers, lambda loggers: log_text(loggers, "report", text, step))
        self._reports.attempt(lambda: print_text(f"Report: {path}", console_of(trainer)), "The path was not printed")

    def _note_provenance(self, trainer: pl.Trainer, finished: bool) -> None:
        if self._directory is not None:
            best = str(getattr(trainer.checkpoint_callback, "best_model_path", ""))
            path = self._directory / PROVENANCE
            self._reports.write(path, partial(write_provenance, self._directory, finished, best))

    def _write(self) -> None:
        if self._directory is not None:
            path = self._directory / FILE_NAME
            if self._reports.write(path, partial(write_report, [self._directory], path)):
                self.path = path
