"""Float, calibrated and QAT accuracy side by side, across runs, with pass or fail."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_qat.analysis.accuracy import AccuracyResult, ResultTable, target_value
from lightning_qat.analysis.results import write_atomically
from lightning_qat.callbacks._compat import steps_taken
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.evaluation import evaluate
from lightning_qat.callbacks.extra_pass import misconfiguration, require_regions
from lightning_qat.callbacks.output_directory import console_of, shared_directory
from lightning_qat.quantization.errors import unknown_choice
from lightning_qat.quantization.region import State
from lightning_qat.reporting.console import show
from lightning_qat.reporting.loggers import log_table
from lightning_qat.reporting.tables import markdown


class AccuracyTable(Callback):
    """Evaluate the float, the calibrated and the trained model, and keep the values of all runs in one table (D7).

    The float model is the module with fake-quant off, before training. Values are kept in ``result_table.json`` under
    ``default_root_dir/lightning_qat`` (also as ``.md`` and ``.csv``), keyed by run; the table is printed at the end.

    Args:
        metrics: which logged metrics; all if not given.
        target: the loss allowed against float, ``"1%"``, or a value to reach; or one of these by metric.
        name: the run's name; the logger's version directory if not given.
        batches: evaluation batches per stage and rank; all if not given.

    Raises:
        MisconfigurationException: a metric is not logged, or the target cannot be read.
    """

    def __init__(
        self,
        metrics: list[str] | None = None,
        target: str | float | dict[str, str | float] | None = "1%",
        name: str | None = None,
        batches: int | None = None,
    ) -> None:
        with misconfiguration():
            for one in target.values() if isinstance(target, dict) else [target]:
                if one is not None:
                    target_value("", 1.0, one)
        self.metrics = metrics
        self.target = target
        self.name = name
        self.batches = batches
        self.result: AccuracyResult | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(c, Calibration) for c in callbacks[callbacks.index(self) :]):
            raise MisconfigurationException(
                "AccuracyTable is listed before Calibration, so it would evaluate before there are scales. List it "
                "after."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:  # later the weights are no longer those of the float model
            self._measure(trainer, pl_module, "float", "off")
            self._measure(trainer, pl_module, "calibrated", "quantize")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure(trainer, pl_module, "QAT", "quantize")
        self._report(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._measure_without_training(trainer, pl_module, "validate")

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure_without_training(trainer, pl_module, "test")

    def _measure_without_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._measure(trainer, pl_module, "float", "off", stage)
        self._measure(trainer, pl_module, "quantized", "quantize", stage)
        self._report(trainer)

    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, column: str, state: State, stage: str = "validate"
    ) -> None:
        regions = require_regions(pl_module, "AccuracyTable")
        before = {path: region.current_state for path, region in regions.items()}
        for region in regions.values():
            region.set_state(state)
        try:
            limit = math.inf if self.batches is None else self.batches
            metrics = evaluate(trainer, pl_module, stage=stage, limit=limit).metrics
        finally:
            for path, region in regions.items():
                region.set_state(before[path])
        for name in self.metrics or ():
            if name not in metrics:
                raise MisconfigurationException(f"AccuracyTable: {unknown_choice('metric', name, metrics)}")
        chosen = {name: metrics[name] for name in self.metrics} if self.metrics else metrics
        run, path = self._run_name(trainer), self._path(trainer)
        with misconfiguration():
            table = ResultTable.read(path)
            table.record(run, column, chosen)
            self.result = table.result(run, list(chosen), self.target)
            if trainer.is_global_zero:
                table.write(path)
        trainer.strategy.barrier("lightning_qat.accuracy_table")

    def _report(self, trainer: pl.Trainer) -> None:
        if self.result is None or not trainer.is_global_zero:
            return
        path = self._path(trainer)
        self.result.to_csv(path.with_suffix(".csv"))
        text = markdown(self.result.columns(), self.result.to_dicts())
        write_atomically(path.with_suffix(".md"), f"{text}\n\n{self.result.note}\n")
        log_table(trainer.loggers, "lightning_qat/result_table", self.result, steps_taken(trainer))
        show(self.result, console_of(trainer))

    def _path(self, trainer: pl.Trainer) -> Path:
        return shared_directory(trainer) / "result_table.json"

    def _run_name(self, trainer: pl.Trainer) -> str:
        """The log directory below the root directory tells runs apart."""
        directory = trainer.log_dir  # broadcasts: on all ranks
        if self.name is not None:
            return self.name
        if directory is None:
            return "run"
        relative = os.path.relpath(directory, trainer.default_root_dir)
        return "run" if relative == "." else relative.replace(os.sep, "/")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}
