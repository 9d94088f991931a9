"""What QuantizationAwareTraining asks for scales."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class ScaleSource(Callback):
    """A callback that can give a model its scales, as :class:`Calibration` does."""

    def calibrate_if_needed(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give scales to a model that has none. Called on all ranks, wherever quantization would start without."""
        raise NotImplementedError
