"""Refuse, before training, what cannot work together with QuantizationAwareTraining."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.callbacks.trainer.messages import rank_zero_warn
from lightning_qat.callbacks.trainer.output_directory import local_instead_of_url
from lightning_qat.quantization.numerics.dtypes import quant_dtype
from lightning_qat.quantization.region.region import find_regions

_TRUE_HALF = {"bf16-true": ("bfloat16", 9), "16-true": ("float16", 12)}
"""Type of the weights, and binary digits behind which a step is lost: half of the last digit."""


def check_trainer(trainer: pl.Trainer, stage: str) -> None:
    """Look at the strategy and the other callbacks.

    Args:
        trainer: the running trainer.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        MisconfigurationException: one of them cannot work with fake-quant.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            f"QuantizationAwareTraining does not work with {type(trainer.strategy).__name__} yet: it shards parameters "
            "before fake-quant can be inserted, and keeps them so in checkpoints and for analyses. Use "
            'Trainer(strategy="ddp") or one device. Without a Trainer, call lightning_qat.insert before fully_shard.'
        )
    if stage == "fit" and _compat.replaces_batch_norm(trainer):
        raise MisconfigurationException(
            "Trainer(sync_batchnorm=True) replaces batch norm by other ops after fake-quant was inserted. Write "
            "sync_batchnorm=False; if the batches of one rank are too small for their own statistics, also "
            "QuantizationAwareTraining(freeze_batch_norm_after=0), which keeps those of the float model."
        )
    if stage == "fit" and _compat.runs_in_child_processes(trainer):
        rank_zero_warn(
            "this strategy trains in child processes: afterwards the module of this process has the new weights, but "
            "no fake-quants. Add ModelCheckpoint, and go on with ckpt_path= or lightning_qat.load_quantized.",
            category=PossibleUserWarning,
        )
    if elsewhere := local_instead_of_url(trainer):
        rank_zero_warn(elsewhere, category=PossibleUserWarning)
    for other in listed(trainer, Callback):
        if stage == "fit" and isinstance(other, (LearningRateFinder, BatchSizeFinder)):
            rank_zero_warn(
                f"{type(other).__name__} runs before calibration: what it finds is for the float model. "
                + (
                    "QAT usually wants a smaller learning rate."
                    if isinstance(other, LearningRateFinder)
                    else "Fake-quant needs more memory than that: leave a margin."
                ),
                category=PossibleUserWarning,
            )


def check_averaged_copies(trainer: pl.Trainer) -> None:
    """Check the copies that WeightAveraging made.

    Raises:
        MisconfigurationException: one has no fake-quants.
    """
    for copy in _compat.averaged_copies(trainer):
        if not find_regions(copy):
            raise MisconfigurationException(
                "WeightAveraging copied the model before fake-quant was inserted: build the layers in __init__ or "
                "configure_model, not in setup."
            )


def warn_about_precision(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Warn if half precision has fewer digits than the wide types of some points, or than the steps of weights need."""
    precision = str(trainer.precision)
    if precision in _TRUE_HALF:
        dtype, digits = _TRUE_HALF[precision]
        rank_zero_warn(
            f"Trainer(precision={precision!r}) keeps the weights in {dtype}: a step that is smaller than 1/{2**digits} "
            "of a weight changes nothing, and steps of QAT are small. Scales and codes are computed in float32 all the "
            f"same. Write precision={precision.replace('true', 'mixed')!r}, which keeps the weights in float32.",
            category=PossibleUserWarning,
        )
    digits = 8 if "bf16" in precision else 11 if "16" in precision else 24
    wide = [
        point.name
        for region in find_regions(pl_module).values()
        for point in region.plan.points
        if quant_dtype(point.dtype).bits > digits
    ]
    if wide:
        rank_zero_warn(
            f"Trainer(precision={precision!r}) computes with {digits} binary digits, fewer than the type of "
            f"{len(wide)} points has (such as {wide[0]}): they lose what it would keep. Use precision=32 for them.",
            category=PossibleUserWarning,
        )
