"""How callbacks find one another in a quantized run: which quantizes, which gives scales, which regions there are.

:class:`~lightning_qat.callbacks.quantization_aware_training.QuantizationAwareTraining` and
:class:`~lightning_qat.callbacks.calibration.Calibration` derive from the classes here, so that the
folders beneath can use them without importing them.
"""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from lightning_qat.callbacks.passes.shared_evaluations import SharedEvaluations
from lightning_qat.callbacks.trainer.final_report import FinalReport
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.plan import ScaleRole
from lightning_qat.quantization.region.region import Region, find_regions


class QuantizationCallback(FinalReport):
    """The callback that quantizes the module of a run; a Trainer has one at most.

    Attributes:
        init_from: the float checkpoint whose weights the run starts from, if one was given.
        profile: the hardware that the model is for, if it was given.
        evaluations: evaluations of the present model, shared by all callbacks.
    """

    init_from: str | None
    profile: HardwareProfile | None
    evaluations: SharedEvaluations

    def should_quantize(self, trainer: pl.Trainer) -> bool:
        """Whether fake-quant is on now."""
        raise NotImplementedError

    def scale_updates(self, trainer: pl.Trainer) -> tuple[ScaleRole, ...]:
        """Which scales follow the data in training now."""
        raise NotImplementedError

    @property
    def freezes_modules(self) -> bool:
        """Whether the run keeps some modules in eval mode while it trains."""
        raise NotImplementedError

    def require_inserted(self) -> None:
        """Raise what kept fake-quant from being inserted, if anything did."""
        raise NotImplementedError


class ScaleSource(Callback):
    """A callback that can give a model its scales, as :class:`Calibration` does."""

    def calibrate_if_needed(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give scales to a model that has none. Called on all ranks, before quantization starts."""
        raise NotImplementedError


def quantization_of(trainer: pl.Trainer) -> QuantizationCallback | None:
    """Return the callback that quantizes a run."""
    return next(iter(listed(trainer, QuantizationCallback)), None)


def require_quantization(trainer: pl.Trainer, who: str) -> QuantizationCallback:
    """Return the callback that quantizes a run.

    Args:
        trainer: the running trainer.
        who: the callback that needs it, for the message.

    Raises:
        MisconfigurationException: no callback quantizes the run.
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
        raise MisconfigurationException(f"{who} needs fake-quants in the model, but the model has none.")
    return regions


def is_calibrated(pl_module: pl.LightningModule) -> bool:
    """Whether all regions of a module have scales."""
    regions = find_regions(pl_module)
    return bool(regions) and all(region.is_calibrated for region in regions.values())


def evaluations_of(trainer: pl.Trainer) -> SharedEvaluations:
    """Return the evaluations that the callbacks of a run share; new, empty ones in a run that does not quantize."""
    found = quantization_of(trainer)
    return found.evaluations if found is not None else SharedEvaluations()
