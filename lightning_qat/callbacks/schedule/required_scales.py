"""Making sure that a model has scales where it starts to quantize."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.callbacks.quantized_run import ScaleSource
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.quantization.region.region import find_regions


def require_scales(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Calibrate if a region has no scales, by the callbacks that give scales. Call it on all ranks.

    Raises:
        MisconfigurationException: a region still has none.
    """
    regions = find_regions(pl_module)
    if not all(region.is_calibrated for region in regions.values()):
        for source in listed(trainer, ScaleSource):  # listed later, or a schedule that starts within an epoch
            source.calibrate_if_needed(trainer, pl_module)
    for path, region in regions.items():
        if not region.is_calibrated and any(r.is_calibrated for r in regions.values()):
            raise MisconfigurationException(
                f"the calibration data never reached target {path!r}, so it has no scales: leave it out of target "
                "(if only training calls it), or give the datamodule a calibration_dataloader() that reaches it."
            )
        if not region.is_calibrated:
            raise MisconfigurationException(
                f"the fake-quants of {path or type(pl_module).__name__} have no scales: add "
                "Calibration(batches=32) to the Trainer's callbacks, or pass the checkpoint of a calibrated model "
                "as ckpt_path."
            )
