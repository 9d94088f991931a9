"""The base of callbacks that analyse the model at the end of epochs: their schedule, their inputs and their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_qat.analysis.captured_calls import RepeatableForward
from lightning_qat.analysis.open_question import OpenQuestion, with_question
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.analysis.results import Result
from lightning_qat.callbacks.analyses.monitored_numbers import check_early_stopping, log_numbers
from lightning_qat.callbacks.analyses.region_inputs import Calls, RegionInputs
from lightning_qat.callbacks.analyses.undisturbed_analysis import undisturbed_analysis
from lightning_qat.callbacks.quantized_run import is_calibrated, require_quantization
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.final_report import last_epoch
from lightning_qat.callbacks.trainer.messages import rank_zero_warn
from lightning_qat.callbacks.trainer.output_directory import leaves_files, run_directory
from lightning_qat.callbacks.trainer.reporting_callback import ReportingCallback
from lightning_qat.quantization.region.region import Region
from lightning_qat.reporting.run_outputs import RunOutputs
from lightning_qat.reporting.tensorboard_tags import Tags

T = TypeVar("T")


class EpochEndAnalysis(ReportingCallback):
    """Analyses at the end of every n-th epoch, and at the end of training unless these weights were analysed already.

    Args:
        every_n_epochs: how often.
        tags: what goes to the loggers; their name is the first part of the file names too.
    """

    monitored: ClassVar[tuple[str, ...]] = ()
    """What is logged through ``self.log``, each behind ``<name>/``."""

    def __init__(self, every_n_epochs: int, tags: Tags) -> None:
        super().__init__()
        self.every_n_epochs = every_n_epochs
        self._outputs = RunOutputs(tags.name, tags, self._reports)
        self._analysed_at = -1
        self._epoch = 0
        self._inputs = RegionInputs()

    def should_analyse(self, trainer: pl.Trainer) -> bool:
        """Whether to analyse at the end of this epoch. Override for another schedule."""
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require_quantization(trainer, type(self).__name__)
        self._analysed_at = -1
        self._inputs = RegionInputs()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch = trainer.current_epoch
        in_first_epoch = is_calibrated(pl_module) and self.should_analyse(trainer)
        check_early_stopping(trainer, self, self._names(), in_first_epoch)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch = trainer.current_epoch  # which is one more when training ends

    @override
    def report_without_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch = last_epoch(trainer)
        super().report_without_training(trainer, pl_module)

    def _names(self) -> list[str]:
        return [f"{self._outputs.name}/{name}" for name in self.monitored]

    def _log_numbers(self, trainer: pl.Trainer, pl_module: pl.LightningModule, numbers: Mapping[str, float]) -> None:
        """Log the numbers of an epoch, to be monitored; call it in epochs without any too."""
        named = {f"{self._outputs.name}/{name}": number for name, number in numbers.items()}
        log_numbers(trainer, pl_module, self._names(), named)

    def write(self, trainer: pl.Trainer, result: Result[Any], outputs: RunOutputs | None = None) -> None:
        """Write the files of this epoch on rank zero; call it on all ranks. A ``fast_dev_run`` leaves no files.

        At the end of training, the rows of the last epoch are replaced.
        """
        directory = run_directory(trainer)  # broadcasts: on all ranks
        if leaves_files(trainer):
            (outputs or self._outputs).write(result, directory, self._epoch)

    def log_result(self, trainer: pl.Trainer, result: Result[Any], per_point: bool = False) -> None:
        """Send numbers, table and histograms to the loggers; with ``per_point`` the numbers of every point."""
        self._outputs.log(result, trainer.loggers, _compat.steps_taken(trainer), per_point=per_point)

    @override
    def _note_failure(self, trainer: pl.Trainer, error: Exception) -> None:
        if not isinstance(error, MisconfigurationException):
            super()._note_failure(trainer, error)
            return
        # the model computes NaN: reporting that or stopping the run is up to other callbacks
        remark, left_open = self.remark(trainer, trainer.lightning_module)
        text = f"{error} {remark} {with_question(left_open)}".rstrip()
        rank_zero_warn(f"{type(self).__name__}, epoch {trainer.current_epoch}: {text}")

    def remark(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[str, OpenQuestion]:
        """What there is to know about the model before a report is read, and what that leaves open.

        Both are empty if there is nothing. Call it on all ranks.
        """
        return "", ""

    def note_analysed(self, trainer: pl.Trainer) -> None:
        """Remember that the weights of this step were analysed."""
        self._analysed_at = trainer.global_step

    def is_analysed(self, trainer: pl.Trainer) -> bool:
        """Whether the weights of this step were analysed."""
        return self._analysed_at == trainer.global_step

    @contextmanager
    def _analysed(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int, seed: int
    ) -> Iterator[tuple[dict[str, Region], Calls]]:
        """Prepare an analysis; yields the regions, and the calls that they get in the steps on some batches."""
        steps = not self._inputs.are_kept(batches)
        with undisturbed_analysis(trainer, pl_module, type(self).__name__, "off", seed, steps) as regions:
            yield regions, self._captured(trainer, pl_module, regions, batches)

    def _try_output(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, select: OutputSelector, seed: int
    ) -> None:
        """Refuse a selection that does not fit what the regions return."""
        with self._analysed(trainer, pl_module, 1, seed) as (regions, found):
            for path, calls in found.items():
                with RepeatableForward(regions[path].target, calls[0]) as forward:
                    select(forward())

    def _captured(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, regions: Mapping[str, Region], batches: int
    ) -> Calls:
        """The calls that the regions get in the steps on some sampled batches."""
        return self._inputs.of(trainer, pl_module, regions, batches)
