"""The callback that reports, before training, what is wrong with the quantized model."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from typing_extensions import override

from lightning_qat.analysis.model_check.model_check import check
from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult
from lightning_qat.callbacks.quantized_run import (
    ScaleSource,
    is_calibrated,
    quantization_of,
    require_quantization,
    require_regions,
)
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.callbacks.trainer.messages import rank_zero_warn
from lightning_qat.callbacks.trainer.misconfiguration import misconfiguration
from lightning_qat.callbacks.trainer.output_directory import console_of, leaves_files, run_directory
from lightning_qat.callbacks.trainer.reporting_callback import ReportingCallback
from lightning_qat.callbacks.trainer_findings import trainer_findings, training_batch_size
from lightning_qat.quantization.errors import unknown_choice
from lightning_qat.reporting.console import show
from lightning_qat.reporting.loggers import log_text
from lightning_qat.reporting.model_check_file import FILE_NAME
from lightning_qat.reporting.reports import markdown_report
from lightning_qat.reporting.tensorboard_tags import MODEL_CHECK

FailOn = Literal["error", "warning", "never"]
_ROWS = 30
"""Rows per table, and names per finding, in the report for the loggers."""


class ModelCheck(ReportingCallback):
    """Check the quantized model once, before training: what is not fused, not quantized, shared, or not as configured.

    The check runs after calibration and before the sanity check, whatever its place in the list of callbacks. It also
    runs before ``trainer.validate``, ``test`` and ``predict``. With QuantizationAwareTraining's ``start_epoch`` it runs
    twice: before training, when the ranges of calibration are not known, and again as soon as there are scales. The
    check does not run the model; training stays bit-identical.

    Goes to: ``model_check_result.txt|json`` in the run's ``lightning_qat`` directory, a summary on the terminal, and as
    text to the loggers that show text (``model_check``). What is in them: ``lightning_qat/reporting/README.md``.

    Args:
        fail_on: raise an error if a finding is at least this severe, for continuous integration.
        show: print the summary.
        log: send the report to the loggers.

    Raises:
        MisconfigurationException: a value is not one of the choices, QuantizationAwareTraining is missing, or there is
            a finding at least as severe as ``fail_on``.

    Attributes:
        result: findings and tables, after it ran.

    Example::

        trainer = Trainer(callbacks=[QuantizationAwareTraining(), Calibration(), ModelCheck(fail_on="error")])
    """

    def __init__(self, fail_on: FailOn = "never", show: bool = True, log: bool = True) -> None:
        super().__init__()
        if fail_on not in get_args(FailOn):
            raise MisconfigurationException(str(unknown_choice("fail_on", fail_on, get_args(FailOn))))
        self.fail_on = fail_on
        self.show = show
        self.log_text = log  # Lightning puts a method called log on every callback
        self.result: ModelCheckResult | None = None
        self._waits = True
        self._waits_for_scales = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require_quantization(trainer, "ModelCheck")
        self._waits = True
        self._waits_for_scales = False

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_once(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_once(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._waits_for_scales and is_calibrated(pl_module):
            self._report(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_before_evaluation(trainer, pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_before_evaluation(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_before_evaluation(trainer, pl_module)

    @override
    def report_without_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_once(trainer, pl_module)

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> ModelCheckResult:
        """Check the model as it is now; nothing is written or printed. All ranks get the result of rank zero."""
        regions = require_regions(trainer, pl_module, "ModelCheck")
        quantization = quantization_of(trainer)
        batch_size = training_batch_size(trainer, pl_module)
        with misconfiguration(), torch.inference_mode(False), torch.no_grad():
            result = check(
                regions,
                optimizers=trainer.optimizers,
                precision=str(trainer.precision),
                batch_size=batch_size,
                profile=quantization.profile if quantization is not None else None,
                extra_findings=trainer_findings(trainer, pl_module),
            )
        self.result = trainer.strategy.broadcast(result)
        return self.result

    def _check_before_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":  # the validation of a fit
            return
        for source in listed(trainer, ScaleSource):  # perhaps listed behind this
            source.calibrate_if_needed(trainer, pl_module)
        self._check_once(trainer, pl_module)

    def _check_once(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._waits:
            self._waits = False
            self._report(trainer, pl_module)

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._waits_for_scales = not is_calibrated(pl_module)
        result = self.tried(trainer, lambda: self.check(trainer, pl_module))
        if result is None:
            return
        directory = run_directory(trainer)  # broadcasts: on all ranks
        file = ""
        if leaves_files(trainer):
            file = self._reports.write_result(result, directory, FILE_NAME, formats=("txt", "json"))
        if self.show and trainer.is_global_zero:
            self._reports.attempt(
                lambda: show(result, console_of(trainer), file=file), "The model check was not printed"
            )
        if self.log_text:
            report = markdown_report(result.full_blocks(), _ROWS, f"{FILE_NAME}.txt")
            send = partial(log_text, tag=MODEL_CHECK, text=report, step=_compat.steps_taken(trainer))
            without = self._reports.send(trainer.loggers, send)
            if without:
                rank_zero_warn(
                    f"{', '.join(without)} shows no text: the model check is only in {FILE_NAME}.txt.",
                    category=PossibleUserWarning,
                )
        self._stop_if_asked_to(result, file)

    def _stop_if_asked_to(self, result: ModelCheckResult, file: str) -> None:
        if self.fail_on == "never" or not (found := result.at_least(self.fail_on)):
            return
        first = found[0]
        more = f" There are {len(found) - 1} more." if len(found) > 1 else ""
        raise MisconfigurationException(
            f"ModelCheck(fail_on={self.fail_on!r}): {first.severity}: {first.what} {first.action}{more}"
            + (f" See {file}." if file else "")
        )
