"""The base of callbacks that analyse the model at the end of epochs: their schedule, and the inputs they look at."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_qat.analysis.captured_calls import capture_calls
from lightning_qat.callbacks.analysis_pass import AnalysisOutputs, require_quantization, sampled_steps
from lightning_qat.quantization.region import Region
from lightning_qat.quantization.tracing import Call


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

    def _captured(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, regions: Mapping[str, Region], batches: int
    ) -> dict[str, list[Call]]:
        """What the regions are called with in the steps on some sampled batches."""
        calls: dict[str, list[Call]] = {path: [] for path in regions}
        for step in sampled_steps(trainer, pl_module, batches):
            for path, region in regions.items():
                calls[path] += capture_calls(region, step)
        return calls
