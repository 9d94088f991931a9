"""The data of calibration. Tracing, and analyses without data of their own, use them too."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.messages import rank_zero_warn


def calibration_loaders(trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[Any, str]:
    """Return the loaders for calibration: the first of these that exists.

    1. ``calibration_dataloader()`` of the datamodule, then that of the module;
    2. the training data, also in a run that does not train;
    3. the data of validation, test or prediction, with a warning.

    :class:`~lightning_qat.callbacks.calibration.Calibration` decides how many batches are taken from them.

    Args:
        trainer: the running trainer.
        pl_module: its module.

    Returns:
        The loaders, and the stage whose limits and samplers apply to them.

    Raises:
        MisconfigurationException: none of them exists.
    """
    running = _compat.running_function(trainer)
    for owner in (trainer.datamodule, pl_module):  # type: ignore[attr-defined]
        loader = _compat.hook_loader(owner, "calibration_dataloader")
        if loader is not None:
            return loader, running
    if running == "train":
        loader = _compat.attached_loader(trainer, "train")
        if loader is not None:
            return loader, "train"
    for owner in (trainer.datamodule, pl_module):  # type: ignore[attr-defined]
        try:
            loader = _compat.hook_loader(owner, "train_dataloader")
        except Exception:  # its setup(stage="fit") has not run
            loader = None
        if loader is not None:
            return loader, "train"
    for name in ("validate", "test", "predict"):
        loader = _compat.attached_loader(trainer, name)
        if loader is not None:
            rank_zero_warn(
                f"There is no training data in this {running} run, so calibration uses the {name} data: the result is "
                "optimistic. Give the datamodule (or the module) a calibration_dataloader()."
            )
            return loader, name
    raise MisconfigurationException(
        "there is no data to trace or calibrate with: pass dataloaders or a datamodule to the Trainer, or give the "
        "datamodule a calibration_dataloader()."
    )


def calibration_owner(trainer: pl.Trainer) -> Any | None:
    """Return the datamodule or the module, whichever defines ``calibration_dataloader()``; None if neither does."""
    owners = (trainer.datamodule, trainer.lightning_module)  # type: ignore[attr-defined]
    return next((owner for owner in owners if callable(getattr(owner, "calibration_dataloader", None))), None)
