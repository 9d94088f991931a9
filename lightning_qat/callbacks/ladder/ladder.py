"""Measuring the rungs of the pipeline ladder: every one starts from the same state and sees the same batches."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_debug  # type: ignore[attr-defined]

from lightning_qat.analysis.diagnosis.diagnosis_result import Diagnosis
from lightning_qat.analysis.ladder.measurements import Finetune, Ladder, Measurement
from lightning_qat.analysis.ladder.rows import TRAIN_LOSS, compare, format_falls, judged
from lightning_qat.analysis.ladder.rungs import (
    BATCH_NORM_FIXED,
    BATCH_NORM_MOVING,
    FLOAT_FINETUNE,
    OFF,
    QAT,
    QUANTIZED,
    TRAINING_RUNGS,
)
from lightning_qat.callbacks.analyses.calibration_data import foreign_data
from lightning_qat.callbacks.analyses.diagnosed_regions import diagnosed_module
from lightning_qat.callbacks.ladder.finetune_copy import finetune_copy, measure_in_state, moves_batch_norm
from lightning_qat.callbacks.ladder.off_comparison import compare_off
from lightning_qat.callbacks.ladder.training_plan import planned_steps
from lightning_qat.callbacks.quantized_run import is_calibrated, quantization_of, require_regions
from lightning_qat.callbacks.trainer.progress import progress
from lightning_qat.quantization.errors import unknown_choice
from lightning_qat.quantization.planning.plan import ScaleRole
from lightning_qat.quantization.region.switches import State

_OFF_BATCHES = 2
_MANUAL = (
    "{module} optimizes manually, and a copy of it would step the optimizers of the run. Train the float model "
    "yourself, with the same script and without QuantizationAwareTraining: if it collapses too, quantization is not "
    "the cause. ZeroLRFinetune works here."
)


def measure_ladder(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    rungs: Collection[int],
    batches: int,
    eval_batches: float,
    who: str,
    reference: Collection[str] = (),
) -> Ladder:
    """Measure some rungs. The reason why a rung could not be measured is in ``missing``.

    Args:
        trainer: the running trainer.
        pl_module: its module, which is not changed.
        rungs: numbers of those wanted; the float model is evaluated in any case.
        batches: training batches per rung and rank.
        eval_batches: validation batches per evaluation and rank.
        who: the callback, for messages and the progress bar.
        reference: names of metrics that the evaluation has to log.

    Raises:
        MisconfigurationException: the evaluation does not log one of them; raised before anything is trained.
    """
    require_regions(trainer, pl_module, who)
    calibrated, moving = is_calibrated(pl_module), moves_batch_norm(pl_module)
    trains = pl_module.automatic_optimization
    manual = _MANUAL.format(module=type(pl_module).__name__)
    missing = {} if trains else {rung: manual for rung in TRAINING_RUNGS if rung in rungs}
    if QAT in rungs and not calibrated:
        missing.setdefault(QAT, "no calibrated scales")
    possible = {
        BATCH_NORM_FIXED: True,
        BATCH_NORM_MOVING: moving,
        QUANTIZED: calibrated,
        FLOAT_FINETUNE: trains,
        QAT: trains and calibrated,
    }
    wanted = [rung for rung in possible if possible[rung] and rung in rungs]
    total = batches * len(wanted) + (2 * _OFF_BATCHES if OFF in rungs else 0)
    with progress(trainer, who, total) as advance:
        run = _Rungs(trainer, pl_module, batches, eval_batches, advance)
        float_model = measure_in_state(trainer, pl_module, "off", eval_batches)
        _require_logged(reference, float_model, who)
        needs_calibrated = calibrated and (QUANTIZED in rungs or QAT in rungs)
        calibrated_model = measure_in_state(trainer, pl_module, "quantize", eval_batches) if needs_calibrated else None
        rows = compare(float_model.metrics, calibrated_model, float_model) if calibrated_model is not None else []
        foreign = foreign_data(trainer, pl_module, who) if format_falls(judged(rows)) else None
        asks_points = foreign is None and needs_calibrated and QAT in rungs
        return Ladder(
            float_model=float_model,
            off=compare_off(trainer, pl_module, _OFF_BATCHES, advance) if OFF in rungs else None,
            batch_norm_fixed=run.zero_lr("off", freeze=True) if BATCH_NORM_FIXED in wanted else None,
            batch_norm_moving=run.zero_lr("off") if BATCH_NORM_MOVING in wanted else None,
            calibrated=calibrated_model,
            quantized=run.zero_lr("quantize") if QUANTIZED in wanted else None,
            float_finetune=run.trained("off") if FLOAT_FINETUNE in wanted else None,
            qat=run.trained("quantize") if QAT in wanted else None,
            missing=missing,
            points=worst_points(trainer, pl_module, who) if asks_points else (),
            calibration=foreign.text if foreign is not None else "",
            total_steps=planned_steps(trainer),
        )


def _require_logged(reference: Collection[str], float_model: Measurement, who: str) -> None:
    logged = [*float_model.metrics, TRAIN_LOSS]
    unknown = [name for name in reference if name not in logged]
    if unknown and float_model.metrics:  # an evaluation that logs nothing has a verdict of its own
        raise MisconfigurationException(
            f"{who}(reference=...) has what the evaluation does not log: {unknown_choice('metric', unknown[0], logged)}"
        )


class _Rungs:
    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batches: int,
        eval_batches: float,
        advance: Callable[[], Any],
    ) -> None:
        self._trainer, self._module = trainer, pl_module
        self._settings: dict[str, Any] = {"batches": batches, "eval_batches": eval_batches, "advance": advance}

    def zero_lr(self, state: State, freeze: bool = False) -> Finetune:
        return self._finetune(state, zero_lr=True, freeze_batch_norm=freeze)

    def trained(self, state: State) -> Finetune:
        return self._finetune(state, zero_lr=False)

    def _finetune(self, state: State, **kwargs: Any) -> Finetune:
        updates: tuple[ScaleRole, ...] = _scale_updates(self._trainer) if state == "quantize" else ()
        return finetune_copy(self._trainer, self._module, state=state, updates=updates, **self._settings, **kwargs)


def worst_points(trainer: pl.Trainer, pl_module: pl.LightningModule, who: str, count: int = 3) -> tuple[str, ...]:
    """Describe the points that lose most on the float model's own values, with the reason for each.

    These are causes: what an op makes of inputs that are off already counts for none of its own points. Empty if the
    diagnosis fails.
    """
    try:
        diagnosis = diagnosed_module(trainer, pl_module, who)
    except Exception as error:  # a float model that computes NaN has a verdict of its own
        if trainer.world_size > 1 and not isinstance(error, MisconfigurationException):
            raise  # other ranks would wait for this one forever
        rank_zero_debug(f"{who} does not name the worst points: {error!r}")
        return ()
    return tuple(_format_point(row) for row in (diagnosis.culprits or diagnosis.rows)[:count])


def _format_point(row: Diagnosis) -> str:
    name = f"{row.region}:{row.point}" if row.region else row.point
    return f"{name} ({row.verdict}: {row.evidence.rstrip('.')})"


def _scale_updates(trainer: pl.Trainer) -> tuple[ScaleRole, ...]:
    quantization = quantization_of(trainer)
    return quantization.scale_updates(trainer) if quantization is not None else ("weight",)
