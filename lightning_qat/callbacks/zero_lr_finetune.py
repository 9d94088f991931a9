"""Finetune with learning rate 0: tells a misaligned training pipeline from real quantization error."""

from __future__ import annotations

import lightning.pytorch as pl
from typing_extensions import override

from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.rungs import FLOAT_MODEL, ZERO_LR_RUNGS
from lightning_qat.analysis.ladder.verdict import judge
from lightning_qat.callbacks.ladder.pipeline_callback import PipelineCallback
from lightning_qat.callbacks.pipeline_fingerprint import take_to_compare

_RUNGS = (FLOAT_MODEL, *ZERO_LR_RUNGS)


class ZeroLRFinetune(PipelineCallback):
    """Train a copy of the model with learning rate 0 and evaluate it: the weights cannot change.

    If accuracy falls nevertheless, the training code is not aligned with the float code, and quantization is not the
    cause. Three variants run; each changes one thing: fake-quant off with batch norm in eval mode; fake-quant off with
    batch norm as in training (if any batch norm moves there); quantized as in QAT. The module's hooks run on a deep
    copy with fresh loaders, and the run is not changed. In manual optimization, the calls that optimize do nothing;
    this has the same effect as learning rate 0. The variants are rungs 0 and 2 to 4 of :class:`PipelineCheck`.

    In a model without batch norm, accuracy cannot show that the *training data* are wrong; only the training loss can.
    Give the training loss of the float run as ``reference: {train_loss: ...}``. A classifier that is no better than a
    constant guess in validation is not called healthy, unless the reference says that it was no better in float.

    Args:
        batches: training batches per variant and rank.
        eval_batches: validation batches per evaluation and rank; all if not given.
        reference: path of the float run's fingerprint, or its metrics such as ``{val_acc: 0.98}``. Without it the
            verdict cannot say whether the float model itself reaches its accuracy in this pipeline.
        at_epoch: the epoch before which the check runs.
        stop: stop training if the pipeline turns out to be misaligned.

    Raises:
        MisconfigurationException: a value is not one of the choices, the reference cannot be read, or (raised before
            the first step) the validation step does not log a metric that the reference names. In a run that has begun,
            the verdict says so instead.

    Attributes:
        result: evidence table and verdict, after it ran.
    """

    name = "zero_lr_finetune"

    def __init__(
        self,
        batches: int = 50,
        eval_batches: int | None = None,
        reference: str | dict[str, float] | None = None,
        at_epoch: int = 0,
        stop: bool = False,
    ) -> None:
        super().__init__(batches, eval_batches, at_epoch, stop, reference)

    @override
    def measure_rungs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> PipelineResult:
        """Measure the rungs with learning rate 0 and judge them."""
        ladder = self.measure_ladder(trainer, pl_module, _RUNGS)
        known = self.comparable(trainer.global_step)
        here = take_to_compare(trainer, pl_module, known)
        return judge(ladder, known, here, rungs=_RUNGS, pipeline_only=True)
