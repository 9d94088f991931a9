"""Finetune the float model with QAT's own pipeline and hyperparameters."""

from __future__ import annotations

import lightning.pytorch as pl
from typing_extensions import override

from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.rungs import FLOAT_FINETUNE, FLOAT_MODEL, Verdict
from lightning_qat.analysis.ladder.verdict import judge
from lightning_qat.callbacks.ladder.pipeline_callback import PipelineCallback
from lightning_qat.callbacks.pipeline_fingerprint import take_to_compare
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.callbacks.zero_lr_finetune import ZeroLRFinetune

_RUNGS = (FLOAT_MODEL, FLOAT_FINETUNE)


class FloatFinetune(PipelineCallback):
    """Train a copy of the model as QAT would, but with fake-quant off, and evaluate it.

    If the copy collapses too, the pipeline or the hyperparameters are to blame, not quantization. The verdict can tell
    these two apart if :class:`ZeroLRFinetune` is listed before this callback. The copy trains with fresh loaders and
    with the optimizer, schedulers, clipping, accumulation and module hooks of the run; the run is not changed. Hooks of
    callbacks do not run, and ``trainer.global_step`` does not move. Needs automatic optimization. This is rung 5 of
    :class:`PipelineCheck`, after rung 0: the float model as it is.

    A classifier that is no better than a constant guess in validation is not called healthy, unless the reference says
    that it was no better in float.

    Args:
        batches: training batches per rank.
        eval_batches: validation batches per evaluation and rank; all if not given.
        at_epoch: the epoch before which the check runs.
        stop: stop training if the float model collapses.
        reference: path of the float run's fingerprint, or its metrics such as ``{val_acc: 0.98}``. With a fingerprint
            the verdict also says what differs from the float run.

    Raises:
        MisconfigurationException: a value is not one of the choices, the reference cannot be read, or (raised before
            the first step) the validation step does not log a metric that the reference names. In a run that has begun,
            the verdict says so instead.

    Attributes:
        result: evidence table and verdict, after it ran.
    """

    name = "float_finetune"

    def __init__(
        self,
        batches: int = 100,
        eval_batches: int | None = None,
        at_epoch: int = 0,
        stop: bool = False,
        reference: str | dict[str, float] | None = None,
    ) -> None:
        super().__init__(batches, eval_batches, at_epoch, stop, reference)

    @override
    def measure_rungs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> PipelineResult:
        """Measure the float model before and after its training, and judge it."""
        ladder = self.measure_ladder(trainer, pl_module, _RUNGS)
        known = self.comparable(trainer.global_step)
        here = take_to_compare(trainer, pl_module, known)
        zero_lr = _zero_lr_verdict(trainer)
        return judge(ladder, known, here, rungs=_RUNGS, pipeline_only=True, zero_lr=zero_lr)


def _zero_lr_verdict(trainer: pl.Trainer) -> Verdict | None:
    results = [check.result for check in listed(trainer, ZeroLRFinetune) if check.result is not None]
    return results[-1].verdict if results else None
