"""Finetune with learning rate 0: tells a misaligned training pipeline from real quantization error."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.rungs import FLOAT_MODEL, ZERO_LR_RUNGS
from lightning_qat.analysis.ladder.verdict import judge
from lightning_qat.callbacks.ladder.pipeline_callback import PipelineCallback, check_reference

_RUNGS = (FLOAT_MODEL, *ZERO_LR_RUNGS)


class ZeroLRFinetune(PipelineCallback):
    """Train a copy of the model with learning rate 0 and evaluate it: weights cannot change, so nothing may collapse.

    If accuracy falls all the same, the training code is not aligned with the float code and quantization is innocent.
    Three variants run, each changing one thing: fake-quant off with batch norm in eval mode; fake-quant off with batch
    norm as in training (if any moves there); quantized as in QAT. The module's hooks run on a deep copy with fresh
    loaders; the run is not disturbed. In manual optimization the calls that optimize do nothing, which is the same.
    These are rungs 0 and 2 to 4 of :class:`PipelineCheck`.

    Without batch norm the accuracy cannot show that the *training data* are wrong: only the training loss can. Give
    that of the float run as ``reference: {train_loss: ...}``.

    Args:
        batches: training batches per variant and rank.
        eval_batches: validation batches per evaluation and rank; all if not given.
        reference: the metrics of the float training run, such as ``{val_acc: 0.98}``. Without it the verdict cannot say
            whether the float model itself is right in this pipeline.
        at_epoch: before which epoch it runs.
        stop: stop training if the pipeline turns out to be misaligned.

    Raises:
        MisconfigurationException: a value is not one of the choices; before the first step also if the validation step
            logs no metric of the reference's name (in a run that has begun, the verdict says so).

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
        if reference is not None and not isinstance(reference, Mapping):
            raise MisconfigurationException(
                f"ZeroLRFinetune(reference={reference!r}): write the metrics of the float run: {{'val_acc': 0.98}}. "
                "A fingerprint file is for PipelineCheck."
            )
        check_reference("ZeroLRFinetune", reference or {})
        self.reference = reference

    @override
    def measure_rungs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> PipelineResult:
        """Measure the rungs with learning rate 0 and judge them."""
        ladder = self.measure_ladder(trainer, pl_module, _RUNGS, reference=self.reference or ())
        return judge(ladder, self.reference, rungs=_RUNGS, pipeline_only=True)
