"""Finetune with learning rate 0: tells a misaligned training pipeline from real quantization error."""

from __future__ import annotations

import lightning.pytorch as pl
from typing_extensions import override

from lightning_qat.analysis.pipeline import PipelineResult, judge_zero_lr
from lightning_qat.analysis.pipeline_rows import Finetune
from lightning_qat.callbacks.extra_pass import require_regions
from lightning_qat.callbacks.finetune_copy import finetune_copy, moves_batch_norm
from lightning_qat.callbacks.pipeline_rung import PipelineRung
from lightning_qat.callbacks.progress import progress
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.region import State, Updates


class ZeroLRFinetune(PipelineRung):
    """Train a copy of the model with learning rate 0 and evaluate it (C4): weights cannot change, so nothing may
    collapse.

    If accuracy falls all the same, the training code is not aligned with the float code and quantization is innocent.
    Three variants run, each changing one thing: fake-quant off with batch norm in eval mode; fake-quant off with batch
    norm as in training (if any moves there); quantized as in QAT. The module's hooks run on a deep copy with fresh
    loaders; the run is not disturbed. In manual optimization the calls that optimize do nothing, which is the same.

    Without batch norm the accuracy cannot show that the *training data* are wrong: only the training loss can. Give
    that of the float run as ``reference: {train_loss: ...}``.

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

    @override
    def measure_rungs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> PipelineResult:
        """Run the rungs; every one starts from the same state and sees the same batches."""
        regions = require_regions(pl_module, "ZeroLRFinetune")
        calibrated = all(region.is_calibrated for region in regions.values())
        moving = moves_batch_norm(pl_module)
        before = self.measured_as(trainer, pl_module, "off")
        quantized_before = self.measured_as(trainer, pl_module, "quantize") if calibrated else None
        with progress(trainer, "lr = 0 finetune", self.batches * (1 + moving + calibrated)) as advance:

            def finetune(state: State, freeze: bool, updates: tuple[Updates, ...] = ()) -> Finetune:
                return finetune_copy(
                    trainer,
                    pl_module,
                    batches=self.batches,
                    eval_batches=self.eval_limit,
                    state=state,
                    zero_lr=True,
                    freeze_batch_norm=freeze,
                    updates=updates,
                    advance=advance,
                )

            frozen = finetune("off", freeze=True)
            moved = finetune("off", freeze=False) if moving else None
            quantized = finetune("quantize", freeze=False, updates=_scale_updates(trainer)) if calibrated else None
        return judge_zero_lr(before, frozen, moved, quantized_before, quantized, self.reference)


def _scale_updates(trainer: pl.Trainer) -> tuple[Updates, ...]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    qat = next((c for c in callbacks if isinstance(c, QuantizationAwareTraining)), None)
    return qat.scale_updates(trainer) if qat is not None else ("weight",)
