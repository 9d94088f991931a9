"""The callback that ranks the quantization points by what they do to the output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, cast, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_qat.analysis.metrics import MetricName
from lightning_qat.analysis.open_question import with_question
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.analysis.region_memory import RegionMemory
from lightning_qat.analysis.sensitivity.sensitivity import Method, sensitivity
from lightning_qat.analysis.sensitivity.sensitivity_metric import MetricLike, SensitivityMetric
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult
from lightning_qat.callbacks.analyses.epoch_share import batches_of_share, samples_of_share
from lightning_qat.callbacks.analyses.task_metric import TaskMetric
from lightning_qat.callbacks.early_analysis import EarlyAnalysis
from lightning_qat.callbacks.quantized_run import is_calibrated
from lightning_qat.callbacks.trainer.messages import rank_zero_warn
from lightning_qat.callbacks.trainer.misconfiguration import misconfiguration
from lightning_qat.callbacks.trainer.numeric_arguments import require_at_least
from lightning_qat.callbacks.trainer.output_directory import console_of
from lightning_qat.callbacks.trainer.stored_state import read_state
from lightning_qat.quantization.errors import unknown_choice
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.reading.checks import AT_LEAST_ZERO
from lightning_qat.reporting.console import show
from lightning_qat.reporting.tensorboard_tags import sensitivity_tags

_SHOWN = 10
"""Rows on the terminal."""


class SensitivityAnalysis(EarlyAnalysis):
    """Rank the quantization points, at the end of an epoch, by how much each alone changes the float model's output.

    The analysis uses the inputs that the quantized region gets in a validation step, from the same batches each time.
    If the step hands a batch to the region unchanged, the batch is kept and the step runs only once.

    There are two methods. *Isolation* quantizes one point at a time and measures the output; it is used for small
    models. A *sketch* estimates all points at once from gradients; its cost is a few forwards, whatever the number of
    points. The analysis at the end of training uses more probes, and confirms the most sensitive points by isolation.
    See :func:`lightning_qat.sensitivity`. Nothing is analysed before the scales are calibrated (``start_epoch``).
    If calibration has made a metric worse, the calibrated model is analysed too, before its first step, with the
    settings of the end of training. Training stays bit-identical.

    Goes to: ``sensitivity.csv`` in the run's ``lightning_qat`` directory, which holds the rows of every epoch (those of
    the last epoch are from the end of training), and ``sensitivity.txt|json``, the latest table;
    ``calibrated_sensitivity.csv|txt|json``, the table of a calibrated model that has lost accuracy; to the loggers
    ``sensitivity.<metric>/<point>`` and ``sensitivity.score/<point>`` of the worst points (with ``per_point`` of all);
    through ``self.log``, so that EarlyStopping and
    ModelCheckpoint can monitor it, ``sensitivity/max_score``. If the first row was measured, its metric is logged too,
    as ``sensitivity/max`` (``sensitivity/min`` for Cosine and SQNR). Columns: ``lightning_qat/reporting/README.md``.

    Args:
        every_n_epochs: number of epochs from one analysis to the next.
        batches: batches per rank. The changes on all ranks are summed.
        metric: the metric of the points that are measured: ``L1``, ``MSE``, ``Cosine``, ``SQNR`` or ``KL``, a function
            ``(float_output, output) -> float``, or a torchmetrics Metric. Any other name stands for a metric that the
            validation step logs, such as ``val_acc``. It is measured at the end of training only: each measured point
            is quantized alone in the float model, and the worst value comes first. Epochs then have scores only.
        output: path into the region's output such as ``map.layer_3``; all its tensors if not given.
        post_process: a function applied to that output in float, such as ``torch.sigmoid``.
        method: ``sketch``, ``isolation``, or ``auto``: isolation for few points and where there is no gradient.
        probes: backward passes per batch in a sketch at the end of an epoch.
        final_probes: backward passes per batch in the sketch at the end of training.
        top_k: at the end of training, how many of the most sensitive points to find. Three times as many are measured
            by isolation. A tenth of all points if not given.
        max_samples: a sketch at the end of an epoch uses the first ``max_samples`` samples of each batch, if samples
            are independent of one another; None for all. A quarter of the samples doubles the standard errors.
            ``auto`` takes all samples, but in short epochs at most a 40th of the samples that an epoch trains on (and
            at least 16), so that the analysis stays cheap.
        max_points: points per analysis by isolation; None for all. If the model has more points, they take turns in a
            fixed random order: all are measured after ``ceil(points / max_points)`` analyses.
        final_max_points: the same for the analysis at the end of training.
        evaluation_batches: validation batches per rank on which a metric of the validation step is measured, the same
            ones for each point; None for all.
        log: also send charts and tables to the loggers: curves of the worst points, counts, distributions. Files and
            monitored numbers are written in any case.
        seed: decides which batches are drawn from shuffled data, the probes, and the order in which points take turns.
        per_point: send curves of every point to the loggers.

    Raises:
        MisconfigurationException: a value is not one of the choices, QuantizationAwareTraining is missing, or (raised
            before the first training step) the region has no such output or the step logs no such metric.

    Attributes:
        result: the latest analysis; its ``rank_change`` compares it with the analysis before.

    Example::

        class LateAnalysis(SensitivityAnalysis):
            def should_analyse(self, trainer):
                return trainer.current_epoch >= 10

        trainer = Trainer(callbacks=[QuantizationAwareTraining(), Calibration(), LateAnalysis(metric="SQNR")])
    """

    monitored = ("max_score", "max", "min")

    def __init__(
        self,
        every_n_epochs: int = 1,
        batches: int = 1,
        metric: MetricName | Callable[[Any, Any], Any] | str = "MSE",
        output: str | None = None,
        post_process: Callable[[Any], Any] | None = None,
        method: Method = "auto",
        probes: int = 1,
        final_probes: int = 4,
        top_k: int | None = None,
        max_samples: int | Literal["auto"] | None = "auto",
        max_points: int | None = 64,
        final_max_points: int | None = 512,
        evaluation_batches: int | None = 8,
        log: bool = True,
        seed: int = 0,
        per_point: bool = False,
    ) -> None:
        require_at_least(
            "SensitivityAnalysis",
            every_n_epochs=every_n_epochs,
            batches=batches,
            probes=probes,
            final_probes=final_probes,
            top_k=top_k,
            max_points=max_points,
            final_max_points=final_max_points,
            evaluation_batches=evaluation_batches,
        )
        if max_samples not in (None, "auto") and not (isinstance(max_samples, int) and max_samples >= 2):
            raise MisconfigurationException(
                f"SensitivityAnalysis(max_samples={max_samples!r}): must be at least 2, 'auto', or None for all."
            )
        is_task = isinstance(metric, str) and metric not in get_args(MetricName)
        of_output = cast(MetricLike, "MSE" if is_task else metric)
        with misconfiguration():
            checked = SensitivityMetric(of_output)
            if method not in get_args(Method):
                raise unknown_choice("method", method, get_args(Method))
        self.metric_name = metric if isinstance(metric, str) else checked.name
        super().__init__(every_n_epochs, sensitivity_tags(self.metric_name))
        self.batches = batches
        self.metric = metric
        self.output = output
        self.post_process = post_process
        self.method: Method = method
        self.probes = probes
        self.final_probes = final_probes
        self.top_k = top_k
        self.max_samples = max_samples
        self.max_points = max_points
        self.final_max_points = final_max_points
        self.evaluation_batches = evaluation_batches
        self.log_points = log
        self.per_point = per_point
        self.seed = seed
        self.result: SensitivityResult | None = None
        self._task = TaskMetric(self.metric_name, evaluation_batches, seed) if is_task else None
        self._of_output = of_output
        self._turn = 0
        self._ranks = _Ranks()
        self._stored = _Ranks()
        self._memory: dict[str, RegionMemory] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        task = self._task
        if task is not None:
            self.tried(trainer, lambda: task.check(trainer, pl_module))
        if self.output is not None or self.post_process is not None:
            select = OutputSelector(self.output, self.post_process)
            self.tried(trainer, lambda: self._try_output(trainer, pl_module, select, self.seed))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.should_analyse(trainer) or not is_calibrated(pl_module):
            self._log_numbers(trainer, pl_module, {})
            return
        result = self.tried(trainer, lambda: self._analyse(trainer, pl_module))
        if result is None:
            self._log_numbers(trainer, pl_module, {"max_score": math.nan})
            return
        self._turn += 1
        self.note_analysed(trainer)
        self._report(trainer, result)
        numbers = {"max_score": max(row.score for row in result.rows)} if result.rows else {}
        worst = result.rows[0].value if result.rows else None
        if worst is not None:
            numbers["min" if result.ascending else "max"] = worst
        self._log_numbers(trainer, pl_module, numbers)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not is_calibrated(pl_module):
            rank_zero_warn("SensitivityAnalysis: training ended before there were scales; there is no sensitivity.csv.")
            return
        if self.result is not None and self.result.is_complete and self.is_analysed(trainer):  # the files hold it
            return
        result = self.tried(trainer, lambda: self._analyse(trainer, pl_module, final=True))
        if result is not None:
            self._report(trainer, result)

    @override
    def analyse_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        result = self._analyse(trainer, pl_module, final=True)
        self.write_start(trainer, result, "sensitivity", self._outputs.tags)
        if trainer.is_global_zero:
            first = replace(result, rows=result.rows[:_SHOWN])
            self._reports.attempt(lambda: show(first, console_of(trainer)), "The sensitivity was not printed")

    def _analyse(self, trainer: pl.Trainer, pl_module: pl.LightningModule, final: bool = False) -> SensitivityResult:
        with (
            self._analysed(trainer, pl_module, self.batches, self.seed) as (regions, calls),
            trainer.precision_plugin.forward_context(),
        ):
            results = {
                path: sensitivity(
                    region,
                    calls[path],
                    self.output,
                    self.post_process,
                    self._of_output,
                    method=self.method,
                    probes=self.final_probes if final else self.probes,
                    top_k=self.top_k,
                    confirm=None if final else 0,
                    max_points=self.final_max_points if final else self.max_points,
                    turn=self._turn,
                    seed=self.seed,
                    across_ranks=trainer.world_size > 1,
                    max_samples=None if final else self._samples(trainer, calls[path]),
                    memory=self._memory.setdefault(path, RegionMemory()),
                )
                for path, region in regions.items()
            }
        said, left_open = self.remark(trainer, pl_module)
        foreign = self.foreign.text if said and self.foreign is not None else ""
        remark = " ".join(part for part in (said, with_question(left_open), foreign) if part)
        result = replace(SensitivityResult.merged(results), remark=remark)
        if self._task is not None and final:
            result = self._task.measured(trainer, pl_module, result)
        elif self._task is not None:
            result = self._task.without_values(result)
        # a resumed run may analyse the weights of the checkpoint once more
        since = self._stored.before if self._stored.complete_at == trainer.global_step else self._ranks.order
        self.result = result.ranked_since(since)
        self._ranks = _Ranks(self.result.order, since, trainer.global_step if result.is_complete else -1)
        return self.result

    def _samples(self, trainer: pl.Trainer, calls: list[Call]) -> int | None:
        """How many samples of each call a sketch at the end of an epoch uses."""
        if self.max_samples != "auto":
            return self.max_samples
        return samples_of_share(batches_of_share(trainer), calls)

    def _report(self, trainer: pl.Trainer, result: SensitivityResult) -> None:
        self.write(trainer, result)
        if self.log_points:
            self.log_result(trainer, result, self.per_point)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"turn": self._turn, "ranks": asdict(self._ranks)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        stored = read_state(_Stored, state_dict, self)
        self._turn, self._ranks, self._stored = stored.turn, stored.ranks, stored.ranks


@dataclass(frozen=True)
class _Ranks:
    """The latest table's order, that of the one before, and the step whose weights it says everything about."""

    order: tuple[tuple[str, str], ...] = ()
    before: tuple[tuple[str, str], ...] = ()
    complete_at: int = -1


@dataclass(frozen=True)
class _Stored:
    turn: Annotated[int, AT_LEAST_ZERO]
    ranks: _Ranks = _Ranks()
