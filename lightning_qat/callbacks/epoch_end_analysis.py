"""The base of callbacks that analyse the model at the end of epochs: their schedule."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_qat.callbacks.analysis_pass import AnalysisOutputs, require_quantization


class EpochEndAnalysis(Callback):
    """Analyses at the end of every n-th epoch, and at the end of training unless these weights were analysed already.

    Args:
        every_n_epochs: how often.
        name: first part of file names and tags.
    """

    def __init__(self, every_n_epochs: int, name: str) -> None:
        self.every_n_epochs = every_n_epochs
        self._outputs = AnalysisOutputs(name)
        self._analysed_at = -1

    def should_analyse(self, trainer: pl.Trainer) -> bool:
        """Whether to analyse at the end of this epoch. Override for another schedule."""
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require_quantization(trainer, type(self).__name__)
        self._analysed_at = -1

    def note_analysed(self, trainer: pl.Trainer) -> None:
        """Remember that the weights of this step were analysed."""
        self._analysed_at = trainer.global_step

    def is_analysed(self, trainer: pl.Trainer) -> bool:
        """Whether the weights of this step were analysed."""
        return self._analysed_at == trainer.global_step
