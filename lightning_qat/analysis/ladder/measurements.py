"""What is measured on the ladder that tells the pipeline from quantization: one change per rung."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_qat.analysis.ladder.rungs import (
    BATCH_NORM_FIXED,
    BATCH_NORM_MOVING,
    FLOAT_FINETUNE,
    QAT,
    QUANTIZED,
)


@dataclass(frozen=True)
class Measurement:
    """One evaluation.

    Args:
        metrics: values by name.
        standard_errors: their variation over batches, where known.
    """

    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finetune:
    """What a finetune on a copy of the model did.

    Args:
        after: the evaluation after it.
        batches: training batches run.
        train_loss: mean training loss over them, None if the step returns none.
        train_loss_error: its standard error over batches.
        changed_parameters: names of the parameters that are not bit-identical to before.
        changed_by_optimizer: those of them that the optimizer's own step changed (looked at only with lr 0).
        moved_buffers: relative change of the buffers that moved (batch norm statistics), the largest first.
        moved_scales: the same for the scales of quantization points.
        learning_rates: the smallest and the largest that was used.
        losses: training losses by batch, of this rank.
        gradient_kept: share of the gradient's length that clipping leaves, in the median step (1: nothing is cut off).
        step_size: the largest change of a weight in one step, relative to the largest weight of its tensor and without
            that by weight decay; mean over the first steps.
    """

    after: Measurement
    batches: int
    train_loss: float | None = None
    train_loss_error: float | None = None
    changed_parameters: tuple[str, ...] = ()
    changed_by_optimizer: tuple[str, ...] = ()
    moved_buffers: Mapping[str, float] = field(default_factory=dict)
    moved_scales: Mapping[str, float] = field(default_factory=dict)
    learning_rates: tuple[float, float] | None = None
    losses: tuple[float, ...] = ()
    gradient_kept: float | None = None
    step_size: float | None = None


@dataclass(frozen=True)
class OffComparison:
    """The module with fake-quant inserted and off, against a copy from which it was removed (rung 1).

    Args:
        compared: number of tensors compared: outputs of the steps and gradients.
        differing: names of those that are not bit-identical.
        repeatable: whether the float module gives the same bits when it is run again.
    """

    compared: int
    differing: tuple[str, ...] = ()
    repeatable: bool = True


@dataclass(frozen=True)
class Ladder:
    """What was measured on the rungs; None where a rung was not measured.

    Args:
        float_model: evaluation with fake-quant off, before.
        off: rung 1.
        batch_norm_fixed: rung 2, fake-quant off, lr 0, batch norm in eval mode.
        batch_norm_moving: rung 3, the same with batch norm as in training; None if none moves there.
        calibrated: evaluation of the quantized model, before; None without calibrated scales.
        quantized: rung 4, quantized, lr 0, as in QAT.
        float_finetune: rung 5, fake-quant off, trained as QAT would.
        qat: rung 6, quantized, trained.
        missing: why a rung that was asked for was not measured.
        points: the points that lose most, in words, the worst first.
        calibration: why the calibration data are not those the model is for, in words; empty if they are.
        total_steps: optimizer steps that this training will have.
    """

    float_model: Measurement
    off: OffComparison | None = None
    batch_norm_fixed: Finetune | None = None
    batch_norm_moving: Finetune | None = None
    calibrated: Measurement | None = None
    quantized: Finetune | None = None
    float_finetune: Finetune | None = None
    qat: Finetune | None = None
    missing: Mapping[int, str] = field(default_factory=dict)
    points: tuple[str, ...] = ()
    calibration: str = ""
    total_steps: int = 0

    @property
    def finetunes(self) -> dict[int, Finetune]:
        """The finetunes that were run, by the number of their rung."""
        every = {
            BATCH_NORM_FIXED: self.batch_norm_fixed,
            BATCH_NORM_MOVING: self.batch_norm_moving,
            QUANTIZED: self.quantized,
            FLOAT_FINETUNE: self.float_finetune,
            QAT: self.qat,
        }
        return {rung: finetune for rung, finetune in every.items() if finetune is not None}
