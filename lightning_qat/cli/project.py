"""The user's own project: the Trainer, module, data and callbacks that ``fit`` would train with."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, Checkpoint, LearningRateFinder, ModelSummary
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override

from lightning_qat.atomic_files import NotWrittenError
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.trainer.final_report import FinalReport
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.callbacks.trainer.output_directory import run_directory
from lightning_qat.callbacks.trainer.reporting_callback import ReportingCallback
from lightning_qat.quantization.errors import ConfigurationError

T = TypeVar("T")
Work = Callable[[pl.Trainer, pl.LightningModule], T]
_WRITES_OR_TRAINS = (Checkpoint, LearningRateFinder, BatchSizeFinder, ModelSummary, SaveConfigCallback)
_DEFAULT_CALIBRATION_BATCHES = 8


@dataclass(frozen=True)
class Project:
    """A call of ``trainer.fit``, as the user's code made it.

    Args:
        trainer: the Trainer; on one device, whatever the project asks for.
        module: the module.
        arguments: the other arguments of the call: loaders or datamodule, ``ckpt_path``.
        fit: Lightning's own method, of this trainer.
        cli: the LightningCLI that made the call, if one did.
        notes: remarks for the user about what a command had to change.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    arguments: dict[str, Any]
    fit: Callable[..., None]
    cli: LightningCLI | None = None
    notes: list[str] = field(default_factory=list)

    def before_training(self, work: Work[T], calibration_batches: int | None = None) -> T:
        """Set everything up as ``fit`` does, calibrate, do some work in the place of training, and tear down.

        Fake-quant is inserted, weights are loaded, the module is on its device and the optimizers exist. Callbacks that
        would train, write or analyse are left out, and loggers are silent.

        Args:
            work: is given the trainer and the module.
            calibration_batches: how many batches to calibrate with; 0 for none. As configured if not given.

        Returns:
            What ``work`` returned.
        """
        kept = [c for c in listed(self.trainer, Callback) if not _is_left_out(c)]
        return self._in_place_of_training(work, self._quantizing(kept, calibration_batches))

    def without_fake_quant(self, work: Work[T]) -> T:
        """Do the same as :meth:`before_training` for a float project: callbacks of this package are left out.

        Args:
            work: is given the trainer and the module.
        """
        ours = (QuantizationAwareTraining, Calibration)
        kept = [c for c in listed(self.trainer, Callback) if not _is_left_out(c) and not isinstance(c, ours)]
        return self._in_place_of_training(work, kept)

    def final_reports(self, output: Path | None = None) -> tuple[tuple[str, ...], Path]:
        """Let the project's callbacks make their reports of a checkpoint, as at the end of training.

        Args:
            output: files go to ``lightning_qat`` in this directory; in the default root directory if not given.

        Returns:
            The callbacks that reported, and the directory of their files.

        Raises:
            NotWrittenError: a file cannot be written.
            ConfigurationError: an analysis has failed.
        """
        trainer = self.trainer
        kept = [c for c in listed(trainer, Callback) if not isinstance(c, _WRITES_OR_TRAINS)]
        trainer.callbacks = [*kept, _NothingToTrain()]  # type: ignore[attr-defined]
        trainer.loggers = [_SilentLogger(str(output))] if output is not None else []
        self.fit(self.module, **self.arguments)
        failed = [(c, why) for c in listed(trainer, ReportingCallback) for why in c.failures]
        if failed:
            raise ConfigurationError("; ".join(f"{type(c).__name__}: {why}" for c, why in failed))
        plans = [c.plan_writer.missing_files for c in listed(trainer, QuantizationAwareTraining)]
        files = [*plans, *(c.missing_files for c in listed(trainer, ReportingCallback))]
        missing = [(path, reason) for of_one in files for path, reason in of_one.items()]
        if missing:  # the files are what was asked for
            path, reason = missing[0]
            raise NotWrittenError(errno.EIO, reason, str(path))
        reporting = [c for c in listed(trainer, FinalReport) if not isinstance(c, QuantizationAwareTraining)]
        return tuple(type(c).__name__ for c in reporting), run_directory(trainer)

    def _in_place_of_training(self, work: Work[T], callbacks: list[Callback]) -> T:
        trainer, last = self.trainer, _InPlaceOfTraining(work)
        trainer.callbacks = [*callbacks, last]  # type: ignore[attr-defined]
        if trainer.loggers:
            trainer.loggers = [DummyLogger()]
        self.fit(self.module, **self.arguments)
        return last.results[0]

    def _quantizing(self, callbacks: list[Callback], calibration_batches: int | None) -> list[Callback]:
        """Complete the callbacks: fake-quant from the first step on, and calibrated as asked for."""
        if not any(isinstance(c, QuantizationAwareTraining) for c in callbacks):
            weights = self.arguments.pop("ckpt_path", None)  # of a float run
            callbacks = [QuantizationAwareTraining(init_from=weights), *callbacks]
            self.notes.append(
                "QuantizationAwareTraining is not among the callbacks of this project: its defaults were used (int8), "
                + (f"from {weights}." if weights else "from the weights that the project starts with.")
            )
        if calibration_batches is not None:
            callbacks = [c for c in callbacks if not isinstance(c, Calibration)]
        if not any(isinstance(c, Calibration) for c in callbacks) and calibration_batches != 0:
            callbacks = [*callbacks, Calibration(batches=calibration_batches or _DEFAULT_CALIBRATION_BATCHES)]
        for callback in callbacks:
            if isinstance(callback, QuantizationAwareTraining):  # start_epoch, or a schedule of the user's
                callback.__dict__["should_quantize"] = lambda trainer: True
        return callbacks


class _InPlaceOfTraining(Callback, Generic[T]):
    """Does the work when everything is set up, and ends the fit before training."""

    def __init__(self, work: Work[T]) -> None:
        self.work = work
        self.results: list[T] = []

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for calibration in listed(trainer, Calibration):  # from the module's configure_callbacks: these come last
            calibration.calibrate_if_needed(trainer, pl_module)
        self.results.append(self.work(trainer, pl_module))
        trainer.num_sanity_val_steps = 0
        trainer.fit_loop.epoch_loop.max_steps = 0
        trainer.fit_loop.max_epochs = -1  # a checkpoint of a finished training is restored after this


class _NothingToTrain(Callback):
    """Ends a fit before its first step, however many steps the checkpoint has taken."""

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.num_sanity_val_steps = 0
        trainer.fit_loop.epoch_loop.max_steps = 0


class _SilentLogger(DummyLogger):
    """Logs nothing, and says which directory the run's files go to."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self._directory = directory

    @property
    @override
    def save_dir(self) -> str:
        return self._directory


def _is_left_out(callback: Callback) -> bool:
    if isinstance(callback, (QuantizationAwareTraining, Calibration)):
        return False
    ours = any(base.__module__.startswith("lightning_qat.") for base in type(callback).__mro__)
    return ours or isinstance(callback, _WRITES_OR_TRAINS)
