"""Findings of the model check that only the Trainer can give: how the model will be trained."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from lightning_qat.analysis.model_check.finding import Finding
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.passes.fresh_loaders import fresh_loaders
from lightning_qat.callbacks.preservation.undisturbed import undisturbed
from lightning_qat.callbacks.quantized_run import quantization_of
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.quantization.modules.batch_norms import is_batch_norm
from lightning_qat.quantization.region.region import find_regions


def trainer_findings(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Finding]:
    """Return findings about the callbacks of a run. What cannot work at all has been refused before.

    Args:
        trainer: the running trainer.
        pl_module: its module.
    """
    return [*_tuners(trainer), *_initial_weights(trainer), *_calibration(trainer)]


def training_batch_size(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int | None:
    """Return the samples per training batch and rank; None without batch norm, or if the loader does not say."""
    targets = [region.target for region in find_regions(pl_module).values()]
    if trainer.state.fn != "fit" or not any(is_batch_norm(m) for t in targets for m in t.modules()):
        return None
    try:
        with undisturbed(trainer, pl_module), fresh_loaders(trainer, pl_module, "train") as (loaders, _):
            sizes = [size for loader in loaders.flattened if (size := _batch_size(loader)) is not None]
    except MisconfigurationException:  # no training data
        return None
    return min(sizes, default=None)


def _batch_size(loader: object) -> int | None:
    for owner in (getattr(loader, "batch_sampler", None), loader):
        size = getattr(owner, "batch_size", None)
        if isinstance(size, int):
            return size
    return None


def _tuners(trainer: pl.Trainer) -> Iterator[Finding]:
    tuners = [type(c).__name__ for kind in (LearningRateFinder, BatchSizeFinder) for c in listed(trainer, kind)]
    if tuners and trainer.state.fn == "fit":
        yield Finding(
            severity="warning",
            kind="tuner before calibration",
            names=tuple(tuners),
            what=f"{' and '.join(tuners)} ran on the float model, before calibration.",
            why="QAT usually wants a tenth of the float learning rate, and fake-quant needs more memory.",
            action="Leave the callback out, and write the learning rate and the batch size down.",
        )


def _initial_weights(trainer: pl.Trainer) -> Iterator[Finding]:
    quantization = quantization_of(trainer)
    if quantization is None or trainer.state.fn != "fit":
        return
    if quantization.init_from is None and trainer.ckpt_path is None:
        yield Finding(
            severity="info",
            kind="initial weights",
            names=(),
            what="Training starts from the weights that the module was created with.",
            why="QAT is a finetuning of a trained float model; from random weights it rarely gets there.",
            action="Give the float checkpoint, unless the module loads pretrained weights itself.",
            yaml="- class_path: QuantizationAwareTraining\n  init_args:\n    init_from: float.ckpt",
        )


def _calibration(trainer: pl.Trainer) -> Iterator[Finding]:
    """Findings about the data that this run was calibrated with."""
    results = [calibration.result for calibration in listed(trainer, Calibration) if calibration.result is not None]
    for kind, (what, why, action) in _CALIBRATION.items():
        found = [finding for result in results for finding in result.findings if finding.kind == kind]
        if found:
            yield Finding(
                severity="warning",
                kind=f"{kind} in calibration",
                names=tuple(finding.point for finding in found),
                what=what.format(n=len(found), first=found[0].point, batch=found[0].batch),
                why=why,
                action=action,
            )


_CALIBRATION = {
    "nan": (
        "NaN in calibration at {n} points, first at {first} in batch {batch}.",
        "The float model computes NaN there; no scale can help.",
        "Correct the inputs of the op (division by zero, log of a negative number) before quantizing.",
    ),
    "inf": (
        "Infinite values in calibration at {n} points, first at {first} in batch {batch}.",
        "Infinities were left out of the range and will be clipped to it.",
        "If it is a mask, keep the point in float32; otherwise correct the inputs of the op.",
    ),
}
"""What only calibration can find, by kind: what, why, what to do."""
