"""The callback that compares the quantized model with the float model, tensor by tensor, and says what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_qat.analysis.captured_calls import RepeatableForward
from lightning_qat.analysis.comparison.comparison_result import CHOSEN, LayerComparisonResult
from lightning_qat.analysis.comparison.point_inspection import inspect_point
from lightning_qat.analysis.diagnosis.diagnosis import check_declared_range
from lightning_qat.analysis.diagnosis.diagnosis_result import DiagnosisResult
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult
from lightning_qat.callbacks.analyses.diagnosed_regions import diagnosed_regions
from lightning_qat.callbacks.early_analysis import EarlyAnalysis
from lightning_qat.callbacks.quantized_run import is_calibrated
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.callbacks.trainer.messages import rank_zero_warn
from lightning_qat.callbacks.trainer.misconfiguration import misconfiguration
from lightning_qat.callbacks.trainer.numeric_arguments import require_at_least
from lightning_qat.callbacks.trainer.output_directory import console_of, leaves_files, run_directory
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.region.region import Region, find_regions
from lightning_qat.reporting.console import print_advice
from lightning_qat.reporting.figures import value_histogram
from lightning_qat.reporting.plain_text import file_name
from lightning_qat.reporting.run_outputs import RunOutputs
from lightning_qat.reporting.sensitivity_figures import (
    log_figure,
    require_matplotlib,
    sensitivity_bars,
    sensitivity_over_epochs,
    shows_figures,
    sqnr_by_depth,
    write_figure,
)
from lightning_qat.reporting.tensorboard_tags import LAYER_COMPARISON, WHAT_TO_DO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAWN_EPOCHS = 32
"""About as many epochs are in the figure of sensitivity over epochs, however many there are."""


class LayerComparison(EarlyAnalysis):
    """Compare every tensor of the quantized model with that of the float model, at the end of training, and diagnose.

    Each tensor has two errors: its *own* (the op gets the float model's inputs, and only its own fake-quants are on)
    and the *accumulated* one (everything is quantized). The diagnosis names, for each point, the kind of error
    (rounding, clipping, one step for values of very different size, a scale that does not fit, a rule that is not in
    effect, or inherited from earlier ops) and what to do, with the YAML to paste. The worst point comes first; if this
    callback is listed after ``SensitivityAnalysis``, the most sensitive one. The float model is the model with its
    present weights and quantization off. Training stays bit-identical.

    If calibration has made a metric worse, the calibrated model is diagnosed too, before its first step: training
    often destroys such a model, and then the list at the end describes the wreck.

    Goes to: ``layer_comparison.csv|txt|json`` and ``diagnosis.csv|txt|json`` in the run's ``lightning_qat`` directory
    (with ``every_n_epochs`` the csv files hold the rows of every epoch, txt and json the latest); the same with
    ``calibrated_`` before the name, about a calibrated model that has lost accuracy; to the loggers
    ``layer_comparison.<column>/<tensor>`` of the worst tensors (with ``per_point`` of all), a figure of the error along
    the depth if matplotlib is there, and the tables; to the terminal the list of what to do; through ``self.log``,
    at the end of an epoch: ``layer_comparison/min_own_sqnr`` and ``layer_comparison/output_sqnr`` (both in dB).
    Columns: ``lightning_qat/reporting/README.md``.

    Args:
        every_n_epochs: also compare at the end of every n-th epoch; None for the end of training only.
        batches: batches per rank. The errors cover the batches of all ranks.
        output: path into the region's output such as ``map.layer_3``; all its tensors if not given.
        post_process: a function applied to that output in float, such as ``torch.sigmoid``.
        ranges: physical ranges of points, by a glob over their names: ``{"*.ref_point*": [-100, 1]}``. The diagnosis
            reports a scale that does not fit the declared range.
        figures: at the end of training, draw SQNR along the depth, the worst point's histogram, and the sensitivities
            if ``SensitivityAnalysis`` ran, to ``figures/*.png`` and the loggers. Needs the ``plots`` extra.
        log: also send charts and tables to the loggers: curves of the worst tensors, counts, distributions.
        seed: decides which batches are drawn from shuffled data.
        per_point: send curves of every tensor to the loggers.

    Raises:
        MisconfigurationException: a value is not one of the choices, QuantizationAwareTraining or (for figures)
            matplotlib is missing, or the region has no such output.

    Attributes:
        result: the latest comparison; None before the first.
        diagnosis: the diagnosis made from it.

    Example::

        trainer = Trainer(
            callbacks=[QuantizationAwareTraining(), Calibration(), SensitivityAnalysis(), LayerComparison(figures=True)]
        )
    """

    monitored = ("min_own_sqnr", "output_sqnr")

    def __init__(
        self,
        every_n_epochs: int | None = None,
        batches: int = 1,
        output: str | None = None,
        post_process: Callable[[Any], Any] | None = None,
        ranges: dict[str, list[float]] | None = None,
        figures: bool = False,
        log: bool = True,
        seed: int = 0,
        per_point: bool = False,
    ) -> None:
        require_at_least("LayerComparison", every_n_epochs=every_n_epochs, batches=batches)
        super().__init__(every_n_epochs or 1, LAYER_COMPARISON)
        if figures:
            with misconfiguration():
                require_matplotlib()
        self.every_epoch = every_n_epochs is not None
        self.batches = batches
        self.output = output
        self.post_process = post_process
        self.ranges = dict(ranges or {})
        self.figures = figures
        self.log_points = log
        self.per_point = per_point
        self.seed = seed
        self._diagnosis_outputs = RunOutputs("diagnosis", WHAT_TO_DO, self._reports)
        self.result: LayerComparisonResult | None = None
        self.diagnosis: DiagnosisResult | None = None
        self._sensitivities: dict[int, SensitivityResult] = {}

    @override
    def should_analyse(self, trainer: pl.Trainer) -> bool:
        return self.every_epoch and super().should_analyse(trainer)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._sensitivities = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an output or a declared range that does not exist before anything is trained."""
        super().on_train_start(trainer, pl_module)
        points = [name for region in find_regions(pl_module).values() for name in region.points]
        with misconfiguration():
            for pattern, ends in self.ranges.items():
                check_declared_range(pattern, ends, points)
        if self.output is not None or self.post_process is not None:
            select = OutputSelector(self.output, self.post_process)
            self.tried(trainer, lambda: self._try_output(trainer, pl_module, select, self.seed))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sensitivity = _sensitivity(trainer)
        if sensitivity is not None and self.figures:
            self._sensitivities = _thinned({**self._sensitivities, trainer.current_epoch: sensitivity})
        if not self.should_analyse(trainer) or not is_calibrated(pl_module):
            self._log_numbers(trainer, pl_module, {})
            return
        result = self.tried(trainer, lambda: self._analyse(trainer, pl_module))
        if result is None:
            self._log_numbers(trainer, pl_module, {})
            return
        self.note_analysed(trainer)
        self._report(trainer, result)
        self._log_numbers(trainer, pl_module, _aggregates(result))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not is_calibrated(pl_module):
            rank_zero_warn("LayerComparison: training ended before there were scales; there is nothing to compare.")
            return
        again = self.result is not None and self.is_analysed(trainer) and not self.figures
        result = self.result if again else self.tried(trainer, lambda: self._analyse(trainer, pl_module, final=True))
        if result is None:
            return
        if not again:
            self._report(trainer, result)
        self._print(trainer)

    def _analyse(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, final: bool = False
    ) -> LayerComparisonResult:
        with self._analysed(trainer, pl_module, self.batches, self.seed) as (regions, calls):
            result, diagnosis = diagnosed_regions(
                trainer,
                regions,
                calls,
                "LayerComparison",
                output=self.output,
                post_process=self.post_process,
                ranges=self.ranges,
                sensitivity=_sensitivity(trainer),
                seed=self.seed,
            )
            if final and self.figures:
                with trainer.precision_plugin.forward_context():
                    self._draw(trainer, regions, calls, result, diagnosis)
        remark, left_open = self.remark(trainer, pl_module)
        diagnosis = replace(diagnosis, remark=remark, left_open=left_open)
        if diagnosis.remark and self.foreign is not None:
            diagnosis = self.foreign.blamed(diagnosis, find_regions(pl_module))
        self.result, self.diagnosis = replace(result, what_to_do=diagnosis.lines()), diagnosis
        return self.result

    @override
    def analyse_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        result, diagnosis = self._analyse(trainer, pl_module), self.diagnosis
        assert diagnosis is not None
        self.write_start(trainer, result, "layer_comparison", LAYER_COMPARISON)
        self.write_start(trainer, diagnosis, "diagnosis", WHAT_TO_DO)
        self._print(trainer)

    def _print(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and self.diagnosis is not None:
            lines = self.diagnosis.lines()
            self._reports.attempt(lambda: print_advice(lines, console_of(trainer)), "What to do was not printed")

    def _report(self, trainer: pl.Trainer, result: LayerComparisonResult) -> None:
        self.write(trainer, result)
        if self.diagnosis is not None:
            self.write(trainer, self.diagnosis, self._diagnosis_outputs)
        if self.diagnosis is not None and (culprits := len(self.diagnosis.culprits)):  # they come first
            step = _compat.steps_taken(trainer)
            self._diagnosis_outputs.log(self.diagnosis, trainer.loggers, step, rows=culprits)
        if self.log_points:
            self.log_result(trainer, replace(result, what_to_do=()), self.per_point)  # the list is a text of its own

            if not self.figures and find_spec("matplotlib") and any(map(shows_figures, trainer.loggers)):
                self._reports.attempt(
                    lambda: self._log_depth(trainer, result), "The error along the depth was not drawn"
                )

    def _log_depth(self, trainer: pl.Trainer, result: LayerComparisonResult) -> None:
        step, tag = _compat.steps_taken(trainer), f"{LAYER_COMPARISON.name}/sqnr_by_depth"
        self._reports.send(trainer.loggers, partial(log_figure, tag=tag, figure=sqnr_by_depth(result), step=step))

    def _draw(
        self,
        trainer: pl.Trainer,
        regions: dict[str, Region],
        calls: dict[str, list[Call]],
        result: LayerComparisonResult,
        diagnosis: DiagnosisResult,
    ) -> None:
        figures: dict[str, Figure] = {"sqnr_by_depth": sqnr_by_depth(result)}
        sensitivity = _sensitivity(trainer)
        if sensitivity is not None:
            figures["sensitivity"] = sensitivity_bars(sensitivity)
        if len(self._sensitivities) > 1:
            figures["sensitivity_over_epochs"] = sensitivity_over_epochs(self._sensitivities)
        worst = diagnosis.culprits[0] if diagnosis.culprits else None
        if worst is not None and calls[worst.region]:
            region = regions[worst.region]
            with RepeatableForward(region.target, calls[worst.region][0], self.seed) as forward:
                inspection = inspect_point(region, worst.point, forward, worst.region)
            figures[f"values_{file_name(worst.point)}"] = value_histogram(inspection)
        directory = run_directory(trainer) / "figures"
        if not leaves_files(trainer):
            return
        step = _compat.steps_taken(trainer)
        for name, figure in figures.items():
            path, tag = directory / f"{name}.png", f"{LAYER_COMPARISON.name}/{name}"
            self._reports.write(path, partial(write_figure, figure, path))
            self._reports.send(trainer.loggers, partial(log_figure, tag=tag, figure=figure, step=step))


def _thinned(results: dict[int, SensitivityResult]) -> dict[int, SensitivityResult]:
    """Keep the results of evenly spaced epochs, and the last: a long run must not fill the memory for one figure."""
    last, stride = max(results), 1
    while last // stride > _DRAWN_EPOCHS:
        stride *= 2
    return {epoch: result for epoch, result in results.items() if epoch % stride == 0 or epoch == last}


def _sensitivity(trainer: pl.Trainer) -> SensitivityResult | None:
    """The latest result of a SensitivityAnalysis among the callbacks."""
    results = [analysis.result for analysis in listed(trainer, SensitivityAnalysis) if analysis.result is not None]
    return results[-1] if results else None


def _aggregates(result: LayerComparisonResult) -> dict[str, float]:
    own = [row.own_SQNR for row in result.rows if row.own_SQNR is not None and math.isfinite(row.own_SQNR)]
    outputs = [row.SQNR for row in result.rows if row.mod_name == CHOSEN and row.SQNR is not None]
    found = {"min_own_sqnr": own, "output_sqnr": [value for value in outputs if math.isfinite(value)]}
    return {name: min(values) for name, values in found.items() if values}
