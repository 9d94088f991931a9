"""The callback that puts fake-quant into a module and drives it through all stages."""

from __future__ import annotations

from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from typing_extensions import override

from lightning_qat.callbacks.extra_pass import misconfiguration
from lightning_qat.callbacks.float_checkpoint import load_float_weights
from lightning_qat.callbacks.insertion_hooks import InsertionHooks
from lightning_qat.quantization.errors import unknown_choice
from lightning_qat.quantization.qconfig import Override, QConfig
from lightning_qat.quantization.region import Updates, find_regions

ActivationScales = Literal["fixed", "ema"]
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


class QuantizationAwareTraining(Callback):
    """Insert fake-quant before weights are loaded, and switch it on and off as training needs it.

    Fake-quant is inserted in ``configure_model``, so checkpoints written by this callback restore it with
    ``ckpt_path=`` in fit, validate and test. The plan, the scales and the statistics are part of the module's own
    ``state_dict``: nothing is lost with ``save_weights_only``. Needs :class:`Calibration` in the list of callbacks unless a
    checkpoint brings calibrated scales.

    Args:
        qconfig: defaults for activations and weights; int8 if not given.
        overrides: rules for single points, from general to specific; the last match wins.
        target: the submodule(s) to quantize, ``auto`` for what a validation step calls: the module itself if the step
            calls it, else its outermost children that were called.
        init_from: a float checkpoint whose weights are loaded, strictly, before insertion. Loops and optimizer start
            fresh: the normal way in. The checkpoint is never written to.
        activation_scales: ``fixed``: as calibrated. ``ema``: they follow a moving average of the batches' ranges.
        start_epoch: train in float before this epoch.
        freeze_observers_after: from this epoch on, no scale moves (weights' and ``ema`` scales).
        freeze_batch_norm_after: from this epoch on, batch norm uses and keeps its running statistics.
        trace_batches: how many batches are looked at to learn the ops of the model.

    Raises:
        MisconfigurationException: a value is not one of the choices.

    Example::

        trainer = Trainer(callbacks=[QuantizationAwareTraining(init_from="float.ckpt"), Calibration(batches=32)])
        trainer.fit(model, datamodule=data)
    """

    def __init__(
        self,
        qconfig: QConfig | None = None,
        overrides: list[Override] | None = None,
        target: str | list[str] = "auto",
        init_from: str | None = None,
        activation_scales: ActivationScales = "fixed",
        start_epoch: int = 0,
        freeze_observers_after: int | None = None,
        freeze_batch_norm_after: int | None = None,
        trace_batches: int = 2,
    ) -> None:
        with misconfiguration():
            self.qconfig = QConfig.of(qconfig)
            self.overrides = Override.list_of(overrides)
            if activation_scales not in get_args(ActivationScales):
                raise unknown_choice("activation_scales", activation_scales, get_args(ActivationScales))
        for name, value in (("start_epoch", start_epoch), ("trace_batches", trace_batches - 1)):
            if value < 0:
                raise MisconfigurationException(f"{name} must be {'at least 1' if name[0] == 't' else '0 or more'}.")
        self.target = target
        self.init_from = init_from
        self.activation_scales = activation_scales
        self.start_epoch = start_epoch
        self.freeze_observers_after = freeze_observers_after
        self.freeze_batch_norm_after = freeze_batch_norm_after
        self.trace_batches = trace_batches
        self._hooks: InsertionHooks | None = None

    # -- insertion

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._check_trainer(trainer)
        self._hooks = InsertionHooks(self, trainer, pl_module)
        self._hooks.install()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._hooks is not None:
            self._hooks.uninstall()
            self._hooks = None

    def load_initial_weights(self, pl_module: pl.LightningModule) -> None:
        """Load ``init_from`` into the float module; called right before insertion."""
        if self.init_from is not None:
            load_float_weights(pl_module, self.init_from)

    # -- state

    def should_quantize(self, trainer: pl.Trainer) -> bool:
        """Whether fake-quant is on now. Override for another schedule."""
        return not trainer.state.fn == "fit" or trainer.current_epoch >= self.start_epoch

    def scale_updates(self, trainer: pl.Trainer) -> tuple[Updates, ...]:
        """Which scales follow the data in training now. Override for another schedule."""
        frozen = self.freeze_observers_after is not None and trainer.current_epoch >= self.freeze_observers_after
        if frozen:
            return ()
        return ("weight", "activation") if self.activation_scales == "ema" else ("weight",)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._require_inserted()
        self._apply(trainer, pl_module)

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._require_scales(pl_module)
        self._apply(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._require_scales(pl_module)
        self._apply(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._freeze_batch_norm(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size > 1 and "activation" in self.scale_updates(trainer):
            for region in find_regions(pl_module).values():
                region.synchronize_scales()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation(trainer, pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation(trainer, pl_module)

    def _start_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._require_inserted()
        self._apply(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._first_evaluation_batch(trainer, pl_module, batch_idx)

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._first_evaluation_batch(trainer, pl_module, batch_idx)

    @override
    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._first_evaluation_batch(trainer, pl_module, batch_idx)

    def _first_evaluation_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Calibration may have run in another callback's start hook: only now must there be scales."""
        if batch_idx == 0 and trainer.state.fn != "fit":
            self._require_scales(pl_module)

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        quantize = self.should_quantize(trainer)
        for region in find_regions(pl_module).values():
            region.set_state("quantize" if quantize else "off", self.scale_updates(trainer))
        self._freeze_batch_norm(trainer, pl_module)

    def _freeze_batch_norm(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.freeze_batch_norm_after is None or trainer.current_epoch < self.freeze_batch_norm_after:
            return
        for region in find_regions(pl_module).values():
            for module in region.target.modules():
                if isinstance(module, _BATCH_NORMS) and module.training:
                    module.eval()

    # -- checks

    def _check_trainer(self, trainer: pl.Trainer) -> None:
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise MisconfigurationException(
                f"QuantizationAwareTraining does not work with {type(trainer.strategy).__name__} yet: it shards the "
                'parameters that fake-quant has to see whole. Use Trainer(strategy="ddp") or a single device.'
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        same = [c for c in callbacks if isinstance(c, QuantizationAwareTraining)]
        if len(same) > 1:
            raise MisconfigurationException(
                "there are several QuantizationAwareTraining callbacks: use one, with target: [a, b] and overrides."
            )
        for callback in callbacks[: callbacks.index(self)]:
            if type(callback).__name__ in ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"):
                raise MisconfigurationException(
                    f"{type(callback).__name__} is listed before QuantizationAwareTraining: it copies the model before "
                    "fake-quant is inserted. List QuantizationAwareTraining first."
                )

    def _require_inserted(self) -> None:
        if self._hooks is not None:
            self._hooks.raise_pending_error()

    def _require_scales(self, pl_module: pl.LightningModule) -> None:
        for path, region in find_regions(pl_module).items():
            if not region.is_calibrated:
                raise MisconfigurationException(
                    f"the fake-quants of {path or type(pl_module).__name__} have no scales: add Calibration(batches=32) to "
                    "the Trainer's callbacks, or pass the checkpoint of a calibrated model as ckpt_path."
                )
