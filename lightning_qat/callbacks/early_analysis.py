"""The base of the analyses that say what to do: they also look at a calibrated model that is not good, in time."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from lightning_qat.analysis.ladder.measurements import Measurement
from lightning_qat.analysis.ladder.rows import breaks, compare, format_falls, judged
from lightning_qat.analysis.open_question import OpenQuestion
from lightning_qat.analysis.results import Result
from lightning_qat.callbacks.analyses.calibration_data import ForeignData, foreign_data
from lightning_qat.callbacks.analyses.epoch_end_analysis import EpochEndAnalysis
from lightning_qat.callbacks.analyses.region_inputs import RegionInputs
from lightning_qat.callbacks.convergence_monitor import ConvergenceMonitor
from lightning_qat.callbacks.ladder.finetune_copy import measure_in_state
from lightning_qat.callbacks.quantized_run import is_calibrated
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.callbacks.trainer.messages import rank_zero_info
from lightning_qat.callbacks.trainer.output_directory import leaves_files, run_directory
from lightning_qat.quantization.modules.module_walk import is_in_region
from lightning_qat.reporting.loggers import log_table
from lightning_qat.reporting.tensorboard_tags import Tags

CALIBRATED = "calibrated_"
"""Begins the names of the files about the calibrated model."""
_DIVERGED = ("not finite", "metric collapsed", "diverging")
"""Verdicts of the ConvergenceMonitor that leave nothing of the model to analyse."""
_BATCHES_WITHOUT_VALIDATION = 32


class EarlyAnalysis(EpochEndAnalysis):
    """Also analyses the calibrated model before its first step, if calibration has lost accuracy.

    Training often destroys a model that calibration has harmed. An analysis at the end then describes the wreck, and
    not what harmed it. To know whether accuracy was lost, the float and the calibrated model are evaluated once;
    ConvergenceMonitor, AccuracyTable and PipelineCheck share these evaluations.

    Attributes:
        calibration_loss: the metrics that calibration made worse, in words; empty if it made none worse.
        foreign: what is known of calibration data that are not those the model is for.
    """

    calibration_loss: str = ""
    foreign: ForeignData | None = None
    _awaits_start: bool = False
    _is_start: bool = False
    _float: Measurement | None = None
    _calibrated: Measurement | None = None

    def should_analyse_start(self, trainer: pl.Trainer) -> bool:
        """Whether to look at the calibrated model at all. Override to leave that out."""
        return True

    def analyse_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Analyse and report the calibrated model, which has lost accuracy."""
        raise NotImplementedError

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.calibration_loss, self._awaits_start = "", False
        self._float = self._calibrated = self.foreign = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # a run that is resumed, and a second fit, have trained these weights with these scales
        self._awaits_start = trainer.global_step == 0 or not is_calibrated(pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if not self._awaits_start or not is_calibrated(pl_module):  # start_epoch
            return
        self._awaits_start = False
        if not self.should_analyse_start(trainer):
            return
        try:
            self.tried(trainer, partial(self._look_at_start, trainer, pl_module), refuses=False)
        finally:
            self._is_start = False

    def _look_at_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.calibration_loss = trainer.strategy.broadcast(self._measure_loss(trainer, pl_module))
        if not self.calibration_loss:
            return
        rank_zero_info(f"{type(self).__name__}: {self._start_remark}")
        self.foreign = foreign_data(trainer, pl_module, type(self).__name__)
        if self.foreign is not None:  # there is nothing to learn from what calibration saw
            self._inputs = RegionInputs(self.foreign.stage)
        self._is_start = True
        self.analyse_start(trainer, pl_module)

    def _measure_loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """Evaluate the float and the calibrated model, and say what is worse; callbacks share these evaluations."""
        has_validation = _compat.attached_loader(trainer, "validate") is not None
        limit = math.inf if has_validation else _BATCHES_WITHOUT_VALIDATION
        self._float = before = measure_in_state(trainer, pl_module, "off", limit)
        self._calibrated = measure_in_state(trainer, pl_module, "quantize", limit)
        return format_falls(judged(compare(before.metrics, self._calibrated, before)))

    @property
    def _start_remark(self) -> str:
        return f"Calibration alone loses accuracy ({self.calibration_loss}). This is about the calibrated model."

    def write_start(self, trainer: pl.Trainer, result: Result[Any], name: str, tags: Tags) -> None:
        """Keep a report about the calibrated model: files that nothing replaces later, and a table in the loggers.

        Args:
            trainer: the running trainer.
            result: what was found.
            name: of the files, behind ``calibrated_``.
            tags: with the columns of the table.
        """
        directory = run_directory(trainer)  # broadcasts: on all ranks
        if leaves_files(trainer):
            self._reports.write_result(result, directory, f"{CALIBRATED}{name}")
        step, columns = _compat.steps_taken(trainer), tags.table or None
        send = partial(log_table, tag=f"{CALIBRATED}{name}", result=result, step=step, columns=columns)
        self._reports.send(trainer.loggers, send)

    @override
    def remark(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[str, OpenQuestion]:
        """Say that the model is no longer one that shows the cause, if so, and where to look. Call it on all ranks."""
        if self._is_start:
            return self._start_remark, ""
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}  # reduces over ranks
        file = run_directory(trainer) / f"{CALIBRATED}diagnosis.txt"  # broadcasts
        is_there = os.path.exists(file)  # unlike file.exists(), it never raises
        first = f"Look at {file} first: it is about the model that training started from." if is_there else ""
        why = trainer.strategy.broadcast(self._why_diverged(trainer, pl_module, logged))
        if why:
            text = f"This is about a model that has diverged ({why}), and does not show the cause. {first}".rstrip()
            return text, "" if first else "quantization"
        if self.calibration_loss and trainer.strategy.broadcast(_falls(self._float, logged)):
            return f"Training has not won back what calibration lost ({self.calibration_loss}). {first}".rstrip(), ""
        return "", ""

    def _why_diverged(self, trainer: pl.Trainer, pl_module: pl.LightningModule, logged: dict[str, float]) -> str:
        weights = {name: p for name, p in pl_module.named_parameters() if not is_in_region(name)}
        device = trainer.strategy.root_device
        finite = torch.stack([p.detach().isfinite().all().to(device) for p in weights.values()]) if weights else None
        if finite is not None and not bool(finite.all()):  # one look at the device for all of them
            bad = next(name for name, ok in zip(weights, finite.tolist(), strict=True) if not ok)
            return f"{bad} is not finite"
        for monitor in listed(trainer, ConvergenceMonitor):
            if monitor.result is not None and monitor.result.verdict in _DIVERGED:
                return f"ConvergenceMonitor: {monitor.result.verdict}"
        return _falls(self._calibrated, logged)


def _falls(before: Measurement | None, logged: dict[str, float]) -> str:
    """Say which logged metrics have collapsed since a measurement at the start; empty if none has."""
    if before is None:
        return ""
    rows = compare(before.metrics, Measurement({k: v for k, v in logged.items() if k in before.metrics}), before)
    return format_falls(judged(rows)) if breaks(rows) else ""
