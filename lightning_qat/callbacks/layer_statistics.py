"""The callback that measures the values and the quantization error of every point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_qat.analysis.statistics.statistics import (
    LayerStatisticsResult,
    LayerStatisticsRow,
    ScaleSnapshot,
    WeightCodes,
    scale_snapshot,
)
from lightning_qat.callbacks.analyses.epoch_end_analysis import EpochEndAnalysis
from lightning_qat.callbacks.analyses.epoch_share import batches_of_share
from lightning_qat.callbacks.analyses.layer_measurement import measure_layers
from lightning_qat.callbacks.passes.shared_evaluations import ModelKey, model_key
from lightning_qat.callbacks.quantized_run import is_calibrated
from lightning_qat.callbacks.trainer.numeric_arguments import require_at_least, require_batches
from lightning_qat.callbacks.trainer.output_directory import run_directory
from lightning_qat.callbacks.trainer.stored_state import read_state
from lightning_qat.quantization.numerics.dtypes import QuantizedDtypeName
from lightning_qat.quantization.reading.checks import one_of
from lightning_qat.quantization.region.region import find_regions
from lightning_qat.reporting.tensorboard_tags import LAYER_STATISTICS


class LayerStatistics(EpochEndAnalysis):
    """Measure, at the end of an epoch, the values of every quantization point and the error of quantizing them.

    The validation step runs on a few batches (the same ones each time) in eval mode with quantization on. In short
    epochs only the quantized regions run, on the first samples of what the step hands to them. Before the scales are
    calibrated (``start_epoch``), only the statistics of the values are filled in. Training stays bit-identical.

    Goes to: ``layer_statistics.csv`` in the run's ``lightning_qat`` directory, which holds the rows of every epoch, and
    ``layer_statistics.txt|json``, the latest table; to the loggers ``layer_statistics.<column>/<point>`` of the worst
    points (with ``per_point`` of all), counts, and histograms of codes; through
    ``self.log``, for callbacks that monitor: ``layer_statistics/max_clipped_share``, ``.../min_sqnr`` (dB),
    ``.../max_scale_drift`` (absolute) and ``.../max_flip_rate``. Columns: ``lightning_qat/reporting/README.md``.

    The flip rate counts from the last measurement (at first, from the first quantized step). Scale drift counts from
    calibration, also after a resume.

    Args:
        every_n_epochs: number of epochs from one measurement to the next.
        batches: batches per rank. Statistics of all ranks are merged. ``auto`` takes two. In epochs of fewer than 80
            batches it takes less, so that the measurement stays cheap: one batch, and of that at most a 40th of the
            samples that an epoch trains on (and at least 16).
        log: also send charts and tables to the loggers: curves of the worst points, counts, distributions. Files and
            monitored numbers are written in any case.
        columns: the columns of which every point has a curve, as with ``per_point``; all numeric ones if not given.
        seed: decides which batches are drawn from shuffled data.
        per_point: send curves of every point to the loggers.

    Raises:
        MisconfigurationException: a value is not one of the choices, or QuantizationAwareTraining is missing.

    Attributes:
        result: the latest statistics.
        codes: integer codes of the weights at the last measurement, by region and point.

    Example::

        class LateStatistics(LayerStatistics):
            def should_analyse(self, trainer):
                return trainer.current_epoch >= 10

        trainer = Trainer(callbacks=[QuantizationAwareTraining(), Calibration(), LateStatistics()])
    """

    monitored = ("max_clipped_share", "min_sqnr", "max_scale_drift", "max_flip_rate")

    def __init__(
        self,
        every_n_epochs: int = 1,
        batches: int | Literal["auto"] = "auto",
        log: bool = True,
        columns: list[str] | None = None,
        seed: int = 0,
        per_point: bool = False,
    ) -> None:
        require_at_least("LayerStatistics", every_n_epochs=every_n_epochs)
        require_batches("LayerStatistics", batches=batches)
        for column in columns or ():
            if column not in LAYER_STATISTICS.curves:
                raise MisconfigurationException(
                    f"LayerStatistics(columns=...): there is no column {column!r}. Choices: "
                    f"{', '.join(LAYER_STATISTICS.curves)}."
                )
        self.columns = tuple(columns) if columns is not None else LAYER_STATISTICS.curves
        super().__init__(every_n_epochs, LAYER_STATISTICS.with_curves(self.columns))
        self.batches = batches
        self.auto_batches = 2  # what "auto" takes in epochs of usual length
        self.log_points = log
        self.per_point = per_point or columns is not None
        self.seed = seed
        self.result: LayerStatisticsResult | None = None
        self.codes: dict[str, WeightCodes] = {}
        self._noted_start = False
        self._calibrated: dict[str, ScaleSnapshot] = {}
        self._measured: tuple[ModelKey, LayerStatisticsResult] | None = None
        self._compared: dict[str, WeightCodes] = {}
        self._reported = ""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.codes, self._compared, self._calibrated, self._measured = {}, {}, {}, None
            self._noted_start = False

    @property
    def is_every_epoch(self) -> bool:
        """Whether every epoch is certain to be measured: a subclass with its own schedule may leave some out."""
        return self.every_n_epochs == 1 and type(self).should_analyse is EpochEndAnalysis.should_analyse

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._noted_start:
            self.tried(trainer, lambda: self.note_start(trainer, pl_module))

    def note_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the calibrated scales and the first codes of the weights, as soon as there are scales."""
        if not self._noted_start and is_calibrated(pl_module):  # only now: calibration may wait for start_epoch
            self._noted_start = True
            for path, region in find_regions(pl_module).items():
                self._calibrated.setdefault(path, scale_snapshot(region))
            # for the codes of the weights before the first step
            self.measure(trainer, pl_module, "auto" if self.batches == "auto" else 1)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.should_analyse(trainer):
            self._log_numbers(trainer, pl_module, {})
            return
        result = self.tried(trainer, lambda: self._report(trainer, pl_module))
        self._log_numbers(trainer, pl_module, _aggregates(result.rows) if result is not None else {})

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.is_analysed(trainer):
            self.tried(trainer, lambda: self._report(trainer, pl_module))

    @override
    def report_without_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave a report of the same weights as it is: only the run that trained them knows their flip rates."""
        if self._reported != self._report_id(trainer):
            super().report_without_training(trainer, pl_module)

    def _report_id(self, trainer: pl.Trainer) -> str:
        return f"{trainer.global_step} {run_directory(trainer)}"  # broadcasts: on all ranks

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> LayerStatisticsResult:
        self.result = result = self.measure_once(trainer, pl_module)
        self.note_analysed(trainer)
        self._reported = self._report_id(trainer)
        self.write(trainer, result)
        if self.log_points:
            self.log_result(trainer, result, self.per_point)
        return result

    def measure_once(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> LayerStatisticsResult:
        """Return the statistics of the present model; measure them unless that was done already."""
        model, measured = model_key(trainer, pl_module), self._measured
        known = measured is not None and measured[0] == model
        if trainer.strategy.reduce_boolean_decision(known, all=True) and measured is not None:
            return measured[1]
        if measured is not None and measured[0][0] == model[0]:  # something has changed the model after the step
            self.codes = self._compared
        self._compared = self.codes
        result = self.measure(trainer, pl_module, self.batches)
        # scales that were about to follow their weights have followed them now
        self._measured = model_key(trainer, pl_module) if model[-1] else model, result
        return result

    def measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int | Literal["auto"]
    ) -> LayerStatisticsResult:
        """Measure now, on ``batches`` batches per rank; nothing is written or logged."""
        inputs = None
        if batches == "auto":
            share = trainer.strategy.broadcast(batches_of_share(trainer))  # all ranks go the same way
            inputs = self._inputs if share < self.auto_batches else None
            batches = int(min(self.auto_batches, max(1, share)))
        measured = measure_layers(trainer, pl_module, batches, self.seed, self._calibrated, self.codes, inputs)
        self.codes = {**self.codes, **measured.codes}  # a new one: others may keep the one before, to compare
        return measured.result

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"calibrated": self._calibrated, "reported": self._reported}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.take_state(state_dict, self)

    def take_state(self, state: Any, owner: pl.Callback) -> None:
        """Load a state that the checkpoint holds as part of another callback's, which errors name."""
        stored = read_state(_Stored, state, owner)
        self._calibrated = {
            path: {name: {"dtype": point.dtype, "scale": point.scale} for name, point in points.items()}
            for path, points in stored.calibrated.items()
        }
        self._reported = stored.reported


@dataclass(frozen=True)
class _StoredScale:
    dtype: Annotated[str, one_of(QuantizedDtypeName)]
    scale: Tensor


@dataclass(frozen=True)
class _Stored:
    calibrated: dict[str, dict[str, _StoredScale]]
    reported: str = ""


def _aggregates(rows: tuple[LayerStatisticsRow, ...]) -> dict[str, float]:
    """The few numbers to monitor, each about the worst point."""
    largest: dict[str, list[float]] = {
        "max_clipped_share": [row.clipped_share for row in rows if row.clipped_share is not None],
        "max_scale_drift": [abs(row.scale_drift) for row in rows if row.scale_drift is not None],
        "max_flip_rate": [row.flip_rate for row in rows if row.flip_rate is not None],
    }
    ratios = [row.sqnr for row in rows if row.sqnr is not None and math.isfinite(row.sqnr)]
    result = {name: max(values) for name, values in largest.items() if values}
    return {**result, "min_sqnr": min(ratios)} if ratios else result
