"""The callback that watches whether quantization-aware training converges."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_qat.analysis.convergence.convergence import FIRST_LOOK, ConvergenceResult, judge_convergence
from lightning_qat.analysis.convergence.point_history import health_of_points
from lightning_qat.analysis.convergence.training_series import LossHistory, StoredSeries, TrainingSeries
from lightning_qat.analysis.ladder.measurements import Measurement
from lightning_qat.analysis.statistics.statistics import WeightCodes
from lightning_qat.callbacks.ladder.finetune_copy import finetune_copy, measure_in_state
from lightning_qat.callbacks.layer_statistics import LayerStatistics
from lightning_qat.callbacks.non_finite import as_all_ranks_found, first_bad_op, non_finite_buffers, with_bad_values
from lightning_qat.callbacks.preservation.rebinding import NotACopyError
from lightning_qat.callbacks.quantized_run import is_calibrated, require_quantization
from lightning_qat.callbacks.trainer._compat import bare, steps_taken
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.callbacks.trainer.messages import rank_zero_info, rank_zero_warn
from lightning_qat.callbacks.trainer.numeric_arguments import require_at_least, require_batches
from lightning_qat.callbacks.trainer.output_directory import leaves_files, run_directory
from lightning_qat.callbacks.trainer.reporting_callback import ReportingCallback
from lightning_qat.callbacks.trainer.stored_state import read_state
from lightning_qat.quantization.modules.module_walk import is_in_region
from lightning_qat.quantization.region.region import find_regions
from lightning_qat.reporting.loggers import log_table

GRADIENT_STEPS = 4
"""Number of steps per epoch at which gradients are checked."""


class ConvergenceMonitor(ReportingCallback):
    """Flag quantization-aware training that does not converge, with the evidence and the next step.

    The monitor checks the training loss after 32, 64, 128 ... steps and at the end of every epoch. It compares
    validation metrics with those of the calibrated model. It also checks gradients, and the scales, clipping and weight
    codes of every point. It gives no warning about a healthy run. Training stays bit-identical.

    Goes to: a warning per verdict; ``convergence.json|txt`` in the run's ``lightning_qat`` directory; the table to
    TensorBoard; ``convergence/flagged`` (0 or 1) through ``self.log`` at the end of every epoch, so that EarlyStopping
    and ModelCheckpoint can monitor it.

    Args:
        stop: stop training, on all ranks, as soon as something is flagged.
        float_batches: training batches on which the loss of the float model is measured before the first step.
        statistics_batches: batches per epoch on which the points are measured. ``auto`` takes one; in epochs of fewer
            than 40 batches at most a 40th of the samples that an epoch trains on (and at least 16). If
            :class:`LayerStatistics` measures the points at the end of every epoch, its measurement (and its batches)
            is used instead.
        seed: decides which batches are drawn from shuffled data.

    Raises:
        MisconfigurationException: a value is not one of the choices, or QuantizationAwareTraining is missing.

    Attributes:
        series: the losses, metrics and points recorded so far.
        result: the latest verdict with its evidence; None before the first.

    Example::

        trainer = Trainer(callbacks=[QuantizationAwareTraining(), Calibration(), ConvergenceMonitor(stop=True)])
    """

    def __init__(
        self,
        stop: bool = False,
        float_batches: int = 16,
        statistics_batches: int | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_at_least("ConvergenceMonitor", float_batches=float_batches)
        require_batches("ConvergenceMonitor", statistics_batches=statistics_batches)
        self.stop = stop
        self.float_batches = float_batches
        self.statistics_batches = statistics_batches
        self.seed = seed
        self.series = TrainingSeries()
        self.result: ConvergenceResult | None = None
        self._reset()

    def _reset(self) -> None:
        self._losses = LossHistory()
        self._is_finite = True
        self._own_statistics = LayerStatistics(batches=self.statistics_batches, log=False, seed=self.seed)
        self._own_statistics.auto_batches = 1
        self._statistics = self._own_statistics
        self._codes: tuple[dict[str, WeightCodes], dict[str, WeightCodes]] = {}, {}  # the latest, those before
        self._zero: dict[int, set[str]] = {}
        self._gradient_steps = 0
        self._next_look = FIRST_LOOK
        self._started = False
        self._bad_at_start: frozenset[str] = frozenset()
        self._warned: set[str] = set()
        self._batch: tuple[Any, int] | None = None

    # -- recording

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require_quantization(trainer, "ConvergenceMonitor")
        if stage == "fit":
            self.series, self.result = TrainingSeries(), None
            self._reset()
            of_every_epoch = (c for c in listed(trainer, LayerStatistics) if c.is_every_epoch)
            self._statistics = next(of_every_epoch, self._own_statistics)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._started and is_calibrated(pl_module) and _quantizes(pl_module):
            self._started = True
            self.tried(trainer, lambda: self._start(trainer, pl_module), refuses=False)
        self._batch = (batch, batch_idx)

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the start of QAT: the float model's loss and metrics, the calibrated metrics, scales, codes."""
        self._bad_at_start = frozenset(non_finite_buffers(pl_module))  # masks hold infinities
        self._statistics.note_start(trainer, pl_module)
        self._codes = self._statistics.codes, {}
        if trainer.global_step > 0 and self.series.calibrated is not None:
            return  # resumed: the checkpoint has these measurements
        self.series = replace(
            self.series,
            float_model=measure_in_state(trainer, pl_module, "off", math.inf),
            calibrated=measure_in_state(trainer, pl_module, "quantize", math.inf),
        )
        # last: this copies the module, which is not possible for all
        self.series = replace(self.series, float_loss=self._float_loss(trainer, pl_module))

    def _float_loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[float, float] | None:
        try:
            finetune = finetune_copy(
                trainer, pl_module, batches=self.float_batches, eval_batches=1, state="off", zero_lr=True
            )
        except NotACopyError:  # the checks do without this loss
            return None
        loss, error = finetune.train_loss, finetune.train_loss_error
        return (loss, error) if loss is not None and error is not None else None

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if not self._started or self.series.first_bad:
            return
        if not (math.isfinite(loss.item()) if loss.numel() == 1 else bool(loss.isfinite().all())):
            # now: after the step, every weight may be NaN
            found = self.tried(trainer, lambda: first_bad_op(trainer, pl_module, self._batch), refuses=False)
            self.series = replace(self.series, first_bad=found or "")

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self._started and self._gradient_steps < GRADIENT_STEPS * max(1, len(trainer.optimizers)):
            self._gradient_steps += 1
            number = next((i for i, o in enumerate(trainer.optimizers) if bare(o) is bare(optimizer)), 0)
            before = self._zero.get(number)
            if before is not None and not before:
                return  # every parameter has had a gradient in this epoch
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._zero[number] = {
                name
                for name, p in pl_module.named_parameters()
                if (before is None or name in before)
                and id(p) in own
                and p.grad is not None
                and not bool(p.grad.any())
                and not is_in_region(name)  # a learned scale of values that are all zero has none
            }

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = None
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        is_skipped = loss is None and pl_module.automatic_optimization  # as scripts do with losses that are nan
        if not self._started:
            return
        number = float(loss) if isinstance(loss, Tensor) and loss.numel() == 1 else None  # one read of the device
        if number is None:
            is_bad = isinstance(loss, Tensor) and not bool(torch.isfinite(loss).all())
        else:
            is_bad = not math.isfinite(number)
        if is_skipped or is_bad:
            self._look_for_bad_values(pl_module, f"batch {batch_idx} of epoch {trainer.current_epoch}", batch)
        if number is None:
            return
        # Lightning divides by the number of accumulated batches
        value = number * max(1, trainer.accumulate_grad_batches)
        self._losses.append(value)
        self._is_finite = self._is_finite and math.isfinite(value)
        if self._losses.steps >= self._next_look or self._broke(trainer):
            self._next_look = 2 * self._losses.steps
            self._judge(trainer, pl_module)

    def _look_for_bad_values(self, pl_module: pl.LightningModule, at: str, batch: Any = None) -> None:
        self.series = with_bad_values(self.series, pl_module, self._bad_at_start, batch, at)

    def _broke(self, trainer: pl.Trainer) -> bool:
        """Whether a loss has just become NaN or infinite. Ranks agree on it only every few steps: it costs a sync."""
        if self.result is not None and self.result.verdict == "not finite":
            return False
        if trainer.world_size == 1:
            return not self._is_finite
        if self._losses.steps % max(1, trainer.log_every_n_steps):  # type: ignore[attr-defined]
            return False
        finite = torch.tensor(float(self._is_finite), device=trainer.strategy.root_device)
        return float(trainer.strategy.reduce(finite, reduce_op="mean")) < 1

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        calibrated = self.series.calibrated
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self._started or calibrated is None:
            return
        logged = {name: float(v) for name, v in trainer.callback_metrics.items() if name in calibrated.metrics}
        self.series = replace(self.series, metrics=Measurement(logged), evaluations=self.series.evaluations + 1)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._started:
            self._look_for_bad_values(pl_module, f"the end of epoch {trainer.current_epoch}")
        if self._started or self.series.steps:  # a run that resumes at the end of an epoch has no batch before this
            self.tried(trainer, lambda: self._measure_points(trainer, pl_module), refuses=False)
            zero = tuple(sorted(set().union(*self._zero.values())))
            self.series = replace(self.series, zero_gradients=zero)
            self._zero, self._gradient_steps = {}, 0
            self._judge(trainer, pl_module)
        flagged = self.result is not None and self.result.is_bad
        pl_module.log("convergence/flagged", float(flagged), sync_dist=False)

    def _measure_points(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        measured = self._statistics.measure_once(trainer, pl_module)
        codes, (before, earlier) = self._statistics.codes, self._codes
        self._codes = codes, before
        health = health_of_points(measured, codes, before, earlier)
        self.series = replace(self.series, points=self.series.points.after(health))

    # -- judging

    def _judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        series = replace(self.series, losses=tuple(self._losses.values), steps=self._losses.steps)
        self.series = as_all_ranks_found(series)
        # rank zero decides for all: its losses are its own, and no rank may stop alone
        result: ConvergenceResult = trainer.strategy.broadcast(judge_convergence(self.series))
        self.result = result
        directory = run_directory(trainer)  # broadcasts: on all ranks
        if leaves_files(trainer):
            self._reports.write_result(result, directory, "convergence", formats=("txt", "json"))
        if result.is_bad and result.verdict not in self._warned:
            self._warned.add(result.verdict)
            send = partial(log_table, tag="convergence", result=result, step=steps_taken(trainer))
            self._reports.send(trainer.loggers, send)
            rank_zero_warn(f"ConvergenceMonitor, epoch {trainer.current_epoch}: {result.note}")
            if self.stop:
                rank_zero_info("ConvergenceMonitor stops the training (stop=True).")
        if result.is_bad and self.stop:
            trainer.should_stop = True

    @override
    def report_without_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.series.steps:
            self._judge(trainer, pl_module)

    # -- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **self.series.state_dict(),
            "losses": list(self._losses.values),
            "stride": self._losses.stride,
            "statistics": self._own_statistics.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        stored = read_state(StoredSeries, state_dict, self)
        self._losses = LossHistory(stored.losses, stored.stride)
        self._next_look = max(FIRST_LOOK, 2 * self._losses.steps)
        self.series = TrainingSeries.of_state(stored, self._losses)
        self.result = judge_convergence(self.series) if self.series.steps else None
        self._own_statistics.take_state(state_dict.get("statistics"), self)


def _quantizes(pl_module: pl.LightningModule) -> bool:
    return any(region.current_state == "quantize" for region in find_regions(pl_module).values())
