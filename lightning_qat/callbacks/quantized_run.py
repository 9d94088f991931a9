"""What other callbacks want to know of QuantizationAwareTraining and of the model that it has quantized."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.callbacks.passes.shared_evaluations import SharedEvaluations
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.region.regions import find_regions


def quantization_of(trainer: pl.Trainer) -> QuantizationAwareTraining | None:
    """Return the QuantizationAwareTraining of a run; a Trainer has one at most."""
    return next(iter(listed(trainer, QuantizationAwareTraining)), None)


def require_quantization(trainer: pl.Trainer, who: str) -> QuantizationAwareTraining:
    """Return the QuantizationAwareTraining of a run.

    Args:
        trainer: the running trainer.
        who: the callback that needs it, for the message.

    Raises:
        MisconfigurationException: it is not among the callbacks.
    """
    found = quantization_of(trainer)
    if found is None:
        raise MisconfigurationException(
            f"{who} needs fake-quants in the model: add QuantizationAwareTraining() to the Trainer's callbacks."
        )
    return found


def require_regions(trainer: pl.Trainer, pl_module: pl.LightningModule, who: str) -> dict[str, Region]:
    """Return the regions of a module, by the path of their target.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        who: the callback that needs them, for the message.

    Raises:
        MisconfigurationException: there are none: they could not be inserted, or QuantizationAwareTraining is missing.
    """
    regions = find_regions(pl_module)
    if not regions:
        require_quantization(trainer, who).require_inserted()
        raise MisconfigurationException(f"{who} needs fake-quants in the model, and it has none.")
    return regions


def is_calibrated(pl_module: pl.LightningModule) -> bool:
    """Whether all regions of a module have scales."""
    regions = find_regions(pl_module)
    return bool(regions) and all(region.is_calibrated for region in regions.values())


def evaluations_of(trainer: pl.Trainer) -> SharedEvaluations:
    """Return what is kept of the evaluations of a run; without QuantizationAwareTraining nothing is shared."""
    found = quantization_of(trainer)
    return found.evaluations if found is not None else SharedEvaluations()
