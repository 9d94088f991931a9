"""The callback that lists float, calibrated and QAT accuracy of all runs, and says whether the target is met."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, WeightAveraging
from typing_extensions import override

from lightning_qat.analysis.runs.accuracy import AccuracyResult, ResultTable, target_value
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.quantized_run import evaluations_of, is_calibrated, require_regions
from lightning_qat.callbacks.trainer._compat import steps_taken
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.callbacks.trainer.messages import rank_zero_info, rank_zero_warn
from lightning_qat.callbacks.trainer.misconfiguration import misconfiguration
from lightning_qat.callbacks.trainer.numeric_arguments import require_at_least
from lightning_qat.callbacks.trainer.output_directory import (
    console_of,
    leaves_files,
    run_directory,
    shared_directory,
)
from lightning_qat.callbacks.trainer.reporting_callback import ReportingCallback
from lightning_qat.callbacks.trainer.stored_state import read_state
from lightning_qat.quantization.errors import ConfigurationError, unknown_choice
from lightning_qat.quantization.reading.checks import AT_LEAST_ZERO
from lightning_qat.quantization.region.switches import State
from lightning_qat.reporting.accuracy_table_files import OWN_TABLE, RunEntry, read_result_table, write_accuracy
from lightning_qat.reporting.console import show
from lightning_qat.reporting.files import write_json
from lightning_qat.reporting.loggers import log_table
from lightning_qat.reporting.tensorboard_tags import RESULT_TABLE


class AccuracyTable(ReportingCallback):
    """Evaluate the float, the calibrated and the trained model, and keep the values of all runs in one table.

    The float model is the module before training, with fake-quant off. If the weights are already trained, only
    ``QAT`` is evaluated. The callback also runs in ``trainer.validate`` and ``trainer.test``.

    The values of all runs are kept in ``result_table.json`` (also ``.md`` and ``.csv``) in
    ``<default_root_dir>/lightning_qat``; the table is printed at the end. ``accuracy.json`` in the run's own
    ``lightning_qat`` folder holds it as seen from this run, with the target. A new run whose name is taken becomes
    ``name (2)``. A resumed run, and an evaluation of its checkpoint, continue the entry of that run. Several processes
    may write the table at the same time. ``fast_dev_run`` leaves no files.

    Args:
        metrics: names of the logged metrics to keep; all if not given.
        target: how much worse than float a metric may be (``"1%"``), or the value to reach (``0.97``); or a dictionary
            from metric to one of these. None for no target.
        name: the run's name; by default the log directory, relative to the root directory.
        batches: evaluation batches per stage and rank; all if not given.

    Raises:
        MisconfigurationException: a metric is not logged, or the target or the table's file cannot be read.

    Attributes:
        result: the table with the values so far; None before the first.
    """

    def __init__(
        self,
        metrics: list[str] | None = None,
        target: str | float | dict[str, str | float] | None = "1%",
        name: str | None = None,
        batches: int | None = None,
    ) -> None:
        super().__init__()
        with misconfiguration():
            for one in target.values() if isinstance(target, dict) else [target]:
                if one is not None:
                    target_value("", 1.0, one)
        require_at_least("AccuracyTable", batches=batches)
        self.metrics = metrics
        self.target = target
        self.name = name
        self.batches = batches
        self.result: AccuracyResult | None = None
        self._run: str | None = None
        self._entry: RunEntry | None = None
        self._loaded_step: int | None = None
        self._awaits_scales = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks = listed(trainer, Callback)
        behind = callbacks[callbacks.index(self) :]
        if any(isinstance(c, Calibration) for c in behind):
            raise MisconfigurationException(
                "AccuracyTable is listed before Calibration, so it would evaluate before there are scales. List it "
                "after Calibration."
            )
        averaging = [c for c in behind if isinstance(c, WeightAveraging)]
        if stage == "fit" and averaging:
            raise MisconfigurationException(
                f"AccuracyTable is listed before {type(averaging[0]).__name__}, so at the end of training it would "
                "evaluate the last weights and not the average that is kept. List it after that callback."
            )
        with misconfiguration(), suppress(OSError):
            read_result_table(self._path(trainer))  # rather now than at the end of training
        self._loaded_step = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:  # later the weights are no longer those of the float model
            self._run, self._entry = None, None
            self._awaits_scales = True
            self._try_to_measure(trainer, pl_module, "float", "off")
            self._measure_calibrated(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure_calibrated(trainer, pl_module)  # QuantizationAwareTraining(start_epoch=...)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > 0 and is_calibrated(pl_module):  # else it ended before start_epoch
            self._try_to_measure(trainer, pl_module, "QAT", "quantize")
        self._report(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._measure_without_training(trainer, pl_module, "validate")

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure_without_training(trainer, pl_module, "test")

    def _measure_calibrated(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        regions = require_regions(trainer, pl_module, "AccuracyTable")
        if self._awaits_scales and all(region.is_calibrated for region in regions.values()):
            self._awaits_scales = False
            self._try_to_measure(trainer, pl_module, "calibrated", "quantize")

    def _measure_without_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._is_trained(trainer):
            self._measure(trainer, pl_module, "QAT", "quantize", stage)
        else:
            self._measure(trainer, pl_module, "float", "off", stage)
            self._measure(trainer, pl_module, "calibrated", "quantize", stage)
        self._report(trainer)

    def _is_trained(self, trainer: pl.Trainer) -> bool:
        """Whether QAT has changed the weights. Assumed of a checkpoint that does not say."""
        if self._loaded_step is not None:
            return self._loaded_step > 0
        return trainer.global_step > 0 or trainer.ckpt_path is not None

    def _try_to_measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, column: str, state: State) -> None:
        """Measure in a fit, which goes on if that fails."""
        self.tried(trainer, lambda: self._measure(trainer, pl_module, column, state))

    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, column: str, state: State, stage: str = "validate"
    ) -> None:
        for path, region in require_regions(trainer, pl_module, "AccuracyTable").items():
            if state == "quantize" and not region.is_calibrated:
                raise MisconfigurationException(
                    f"AccuracyTable: the fake-quants of {path or type(pl_module).__name__} have no scales: add "
                    "Calibration(batches=32) before it, or pass the checkpoint of a calibrated model as ckpt_path."
                )
        limit = math.inf if self.batches is None else self.batches
        evaluation = evaluations_of(trainer).evaluate(trainer, pl_module, state, stage=stage, limit=limit)
        chosen = self._chosen(evaluation.metrics, stage)
        if chosen:
            self.result = self._recorded(trainer, column, chosen, evaluation.samples)

    def _chosen(self, metrics: dict[str, float], stage: str) -> dict[str, float]:
        """Pick the metrics asked for. None may be left in a test, which often logs other metrics than validation."""
        names = [*(self.metrics or ()), *(self.target if isinstance(self.target, dict) else ())]
        missing = [name for name in names if name not in metrics]
        if missing and stage != "test":
            raise MisconfigurationException(f"AccuracyTable: {unknown_choice('metric', missing[0], metrics)}")
        chosen = metrics if self.metrics is None else {name: metrics[name] for name in self.metrics if name in metrics}
        if not chosen:
            rank_zero_warn(
                f"AccuracyTable: the {stage} step logs none of the metrics asked for ({', '.join(names) or 'any'}). It "
                f"logs: {', '.join(metrics) or 'nothing'}. The table is not changed."
            )
        return chosen

    def _recorded(
        self, trainer: pl.Trainer, column: str, metrics: dict[str, float], samples: int | None
    ) -> AccuracyResult:
        """Add the values to the table and return it on all ranks. Only rank zero reads and writes files."""
        name, directory = self._name(trainer), run_directory(trainer)  # broadcast: on all ranks
        outcome: Any = None
        if trainer.is_global_zero:
            try:
                run, result = self._noted(trainer, name, column, metrics)
                outcome = run, replace(result, samples=samples)
                if leaves_files(trainer):
                    self._reports.write(directory / OWN_TABLE, partial(write_json, outcome[1], directory / OWN_TABLE))
            except ConfigurationError as error:
                outcome = str(error)
        outcome = trainer.strategy.broadcast(outcome)
        if isinstance(outcome, str):
            raise MisconfigurationException(f"AccuracyTable: {outcome}")
        self._run, result = outcome
        return result  # type: ignore[no-any-return]

    def _noted(
        self, trainer: pl.Trainer, name: str, column: str, metrics: dict[str, float]
    ) -> tuple[str, AccuracyResult]:
        path, entry = self._path(trainer), self._entry
        if entry is None or entry.path != path:
            self._entry = entry = RunEntry(path, name, self._run)
        before = self._run or name
        entry.note(column, metrics)
        if leaves_files(trainer):
            self._reports.write(path, entry.save)
        table = self._reports.attempt(entry.table, "The accuracy table shows this run alone") or entry.alone()
        if entry.run != before:
            rank_zero_info(f"AccuracyTable: there is already a run called {name!r}; this one is called {entry.run!r}.")
        return entry.run, table.result(entry.run, list(metrics), self.target)

    def _report(self, trainer: pl.Trainer) -> None:
        result, entry = self.result, self._entry
        if result is None or entry is None:  # of another rank
            return
        if leaves_files(trainer):
            self._reports.write(entry.path.with_suffix(".md"), partial(self._write_whole, entry, result.note))
        step, columns = steps_taken(trainer), result.columns()
        self._reports.send(trainer.loggers, lambda loggers: log_table(loggers, RESULT_TABLE, result, step, columns))
        self._reports.attempt(lambda: show(result, console_of(trainer)), "The accuracy table was not printed")

    def _write_whole(self, entry: RunEntry, note: str) -> None:
        """Write the table with the run's own metrics and all others."""

        def write(table: ResultTable) -> None:
            write_accuracy(table.result(entry.run, table.metrics(), self.target), entry.path, note)

        entry.publish(write)

    def _path(self, trainer: pl.Trainer) -> Path:
        return shared_directory(trainer) / "result_table.json"

    def _name(self, trainer: pl.Trainer) -> str:
        """The log directory below the root directory tells runs apart."""
        directory = trainer.log_dir  # broadcasts: on all ranks
        if self.name is not None:
            return self.name
        if directory is None:
            return "run"
        relative = os.path.relpath(directory, trainer.default_root_dir)
        return "run" if relative == "." else relative.replace(os.sep, "/")

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded_step = read_state(_StoredRun, checkpoint, self).global_step

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, "run": self._run if self._entry is None else self._entry.run}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        stored = read_state(_Stored, state_dict, self)
        if stored.name == self.name:
            self._run, self._entry = stored.run, None


@dataclass(frozen=True)
class _Stored:
    name: str | None = None
    run: str | None = None


@dataclass(frozen=True)
class _StoredRun:
    global_step: Annotated[int, AT_LEAST_ZERO] = 0
