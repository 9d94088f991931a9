"""The callback that finds the scales before training starts."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_qat.callbacks.passes.extra_batches import extra_batches
from lightning_qat.callbacks.passes.run_step import run_step
from lightning_qat.callbacks.preservation.undisturbed import undisturbed
from lightning_qat.callbacks.quantized_run import ScaleSource, is_calibrated, require_quantization, require_regions
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.after_hook import AfterHook
from lightning_qat.callbacks.trainer.messages import rank_zero_info, rank_zero_warn
from lightning_qat.callbacks.trainer.misconfiguration import misconfiguration
from lightning_qat.callbacks.trainer.numeric_arguments import require_at_least
from lightning_qat.callbacks.trainer.progress import progress
from lightning_qat.quantization.counts import number_of
from lightning_qat.quantization.region.calibration import CalibrationPass, CalibrationResult
from lightning_qat.quantization.region.region import find_regions


class Calibration(ScaleSource):
    """Run a pass over calibration data before quantization starts, and derive all scales from it.

    In a fit this is behind the module's own ``on_fit_start`` and before the sanity check, or at the start of
    QuantizationAwareTraining's ``start_epoch``: the scales are those of the weights that quantization starts with. Also
    runs ahead of ``trainer.validate``, ``test`` and ``predict`` alone, so that post-training quantization is a Trainer
    call. Skipped when a restored checkpoint brings calibrated scales, and in a second fit. Data come from
    ``calibration_dataloader()`` of the datamodule or module if there is one, else from the training data; they go
    through the validation step in eval mode, in float.

    Args:
        batches: number of batches, over all ranks together; 32 if neither argument is given.
        epochs: number of full passes over the loader, in place of ``batches``.

    Raises:
        MisconfigurationException: both arguments are given, or one is not a positive integer;
            QuantizationAwareTraining is missing; there are no data.

    Attributes:
        result: counts and warnings of the last calibration; None before.

    Example of another schedule::

        class EveryRun(Calibration):
            def should_calibrate(self, trainer, pl_module):
                return trainer.current_epoch == 0 or super().should_calibrate(trainer, pl_module)
    """

    def __init__(self, batches: int | None = None, epochs: int | None = None) -> None:
        if batches is not None and epochs is not None:
            raise MisconfigurationException(
                "Calibration takes batches or epochs, not both: write Calibration(batches=32)."
            )
        for name, value in (("batches", batches), ("epochs", epochs)):
            if value is not None and not isinstance(value, int):
                raise MisconfigurationException(
                    f"Calibration({name}={value!r}): write a number, such as batches=32; epochs=1 takes all batches."
                )
        require_at_least("Calibration", batches=batches, epochs=epochs)
        self.batches = 32 if batches is None and epochs is None else batches
        self.epochs = epochs
        self.result: CalibrationResult | None = None
        self._later: AfterHook | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require_quantization(trainer, "Calibration")

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _compat.is_overridden("on_fit_start", pl_module):  # it may prepare what the steps compute with
            calibrate = partial(self.calibrate_if_needed, trainer, pl_module)
            self._later = AfterHook(pl_module, "on_fit_start", calibrate)
        else:
            self.calibrate_if_needed(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._later is not None:
            self._later.cancel()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_later": None}

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.calibrate_if_needed(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.calibrate_if_needed(trainer, pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.calibrate_if_needed(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.calibrate_if_needed(trainer, pl_module)

    def should_calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether quantization is on and a region has no scales yet. Override to calibrate again."""
        require_regions(trainer, pl_module, "Calibration")
        return require_quantization(trainer, "Calibration").should_quantize(trainer) and not is_calibrated(pl_module)

    @override
    def calibrate_if_needed(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate if there are no scales. QuantizationAwareTraining calls this where it needs scales and has none."""
        if not self.should_calibrate(trainer, pl_module):
            return
        with misconfiguration():
            self.result = self._calibrate(trainer, pl_module)
        for copy in _compat.averaged_copies(trainer):  # made before there were scales
            for path, region in find_regions(pl_module).items():
                find_regions(copy)[path].load_state_dict(region.state_dict())
        points, batches = self.result.points, self.result.batches * trainer.world_size
        rank_zero_info(f"Calibration: {number_of(points, 'point')} from {number_of(batches, 'batch')}.")
        for message in self.result.messages:
            rank_zero_warn(f"Calibration: {message}")

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> CalibrationResult:
        regions = require_regions(trainer, pl_module, "Calibration")
        per_rank = math.ceil(self.batches / trainer.world_size) if self.batches is not None else math.inf
        with (
            undisturbed(trainer, pl_module),
            torch.no_grad(),
            CalibrationPass(regions) as calibration,
            progress(trainer, "Calibrating", None if per_rank == math.inf else int(per_rank)) as advance,
        ):
            pl_module.eval()
            for _ in range(self.epochs or 1):
                for extra in extra_batches(trainer, pl_module, per_rank, "calibration"):
                    run_step(trainer, pl_module, extra, "validate")
                    calibration.batch_done()
                    advance()
        with torch.inference_mode(False):
            return calibration.finish()
