"""Finetune with learning rate 0: tells a misaligned training pipeline from real quantization error."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_qat.analysis.pipeline import Measurement, PipelineResult, judge_zero_lr
from lightning_qat.callbacks.calibration import progress
from lightning_qat.callbacks.extra_pass import require_regions
from lightning_qat.callbacks.finetune_copy import finetune_copy
from lightning_qat.callbacks.pipeline_rung import PipelineRung
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.region import Updates


class ZeroLRFinetune(PipelineRung):
    """Train a copy of the model with learning rate 0 and evaluate it (C4): weights cannot change, so nothing may
    collapse.

    If accuracy falls all the same, the training code is not aligned with the float code and quantization is innocent.
    Three variants run, each changing one thing: fake-quant off with batch norm in eval mode; fake-quant off with batch
    norm as in training; quantized as in QAT. Works on a deep copy with fresh loaders; the run is not disturbed.

    Args:
        batches: training batches per variant and rank.
        eval_batches: validation batches per evaluation and rank; all if not given.
        reference: the metrics of the float training run, such as ``{val_acc: 0.98}``. Without it the verdict cannot say
            whether the float model itself is right in this pipeline.
        at_epoch: before which epoch it runs.
        stop: stop training if the pipeline turns out to be misaligned.

    Attributes:
        result: evidence table and verdict, after it ran.
    """

    name = "zero_lr_finetune"

    def __init__(
        self,
        batches: int = 50,
        eval_batches: int | None = None,
        reference: dict[str, float] | None = None,
        at_epoch: int = 0,
        stop: bool = False,
    ) -> None:
        super().__init__(batches, eval_batches, at_epoch, stop)
        self.reference = reference

    def measure_rungs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> PipelineResult:
        """Run the rungs; every one starts from the same state."""
        regions = require_regions(pl_module, "ZeroLRFinetune")
        calibrated = all(region.is_calibrated for region in regions.values())
        float_model = self.measured_as(trainer, pl_module, "off")
        quantized_model: Measurement | None = None
        if calibrated:
            quantized_model = self.measured_as(trainer, pl_module, "quantize")
        total = self.batches * (3 if calibrated else 2)
        with progress(trainer, "lr = 0 finetune", total) as advance:
            frozen, moving = (
                finetune_copy(
                    trainer,
                    pl_module,
                    batches=self.batches,
                    eval_batches=self.eval_limit,
                    state="off",
                    zero_lr=True,
                    freeze_batch_norm=freeze,
                    advance=advance,
                )
                for freeze in (True, False)
            )
            quantized = None
            if calibrated:
                qat = _quantization_callback(trainer)
                updates: tuple[Updates, ...] = qat.scale_updates(trainer) if qat is not None else ("weight",)
                quantized = finetune_copy(
                    trainer,
                    pl_module,
                    batches=self.batches,
                    eval_batches=self.eval_limit,
                    state="quantize",
                    zero_lr=True,
                    freeze_batch_norm=qat is not None and qat.freeze_batch_norm_after == 0,
                    updates=updates,
                    advance=advance,
                )
        return judge_zero_lr(float_model, frozen, moving, quantized_model, quantized, self.reference)


def _quantization_callback(trainer: pl.Trainer) -> QuantizationAwareTraining | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, QuantizationAwareTraining)), None)
