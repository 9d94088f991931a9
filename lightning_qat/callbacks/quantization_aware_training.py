"""The callback that puts fake-quant into a module and drives it through all stages."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_qat.callbacks.insertion.initial_weights import InitialWeights
from lightning_qat.callbacks.insertion.insertion_hooks import InsertionHooks
from lightning_qat.callbacks.insertion.insertion_request import InsertionRequest
from lightning_qat.callbacks.insertion.plan_writer import PlanWriter
from lightning_qat.callbacks.insertion.setup_copies import load_weights_for_copies
from lightning_qat.callbacks.insertion.trainer_checks import check_averaged_copies, check_trainer, warn_about_precision
from lightning_qat.callbacks.passes.shared_evaluations import SharedEvaluations
from lightning_qat.callbacks.quantized_run import QuantizationCallback, ScaleSource
from lightning_qat.callbacks.schedule.frozen_parts import FrozenParts
from lightning_qat.callbacks.schedule.learned_scales import check_optimizers, warn_about_step_size
from lightning_qat.callbacks.schedule.rank_averaging import average_gradients, average_scales
from lightning_qat.callbacks.schedule.required_scales import require_scales
from lightning_qat.callbacks.schedule.schedule import ActivationScales, Schedule, WeightScales
from lightning_qat.callbacks.schedule.scheduled_regions import ScheduledRegions, expect_other_weights
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.callbacks.trainer.misconfiguration import misconfiguration
from lightning_qat.quantization.overrides import Override
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile
from lightning_qat.quantization.planning.plan import ScaleRole
from lightning_qat.quantization.qconfig import QConfig
from lightning_qat.quantization.region.switches import State


class QuantizationAwareTraining(QuantizationCallback):
    """Insert fake-quant before weights are loaded, and switch it on and off as training needs it.

    Fake-quant is inserted in ``configure_model``, so checkpoints written by this callback restore it with
    ``ckpt_path=`` in fit, validate and test. The plan, the scales and the statistics are part of the module's own
    ``state_dict``: nothing is lost with ``save_weights_only``. Needs :class:`Calibration` in the list of callbacks
    (anywhere in it) unless a checkpoint brings calibrated scales. A checkpoint's plan wins over ``qconfig`` and
    ``overrides``; so does that of a module calibrated before. Callbacks that average weights or prune may be listed
    before or after it. The plan is the one entry of the ``state_dict`` that is no tensor: a module that averages its
    own writes ``{k: v.clone() for k, v in self.state_dict().items() if torch.is_tensor(v)}``, loaded ``strict=False``.

    Args:
        qconfig: defaults for activations and weights; int8 if not given.
        overrides: rules for single points, from general to specific; the last match wins. See :class:`Override`.
        target: the submodule(s) to quantize, ``auto`` for what a validation step calls: the module itself if the step
            calls it, else its outermost children that were called. Children that are not trained and that no trained
            part uses (a teacher, a loss network, an average of the weights) are left out, with a warning.
        init_from: a float checkpoint whose weights are loaded, strictly, before insertion. Loops and optimizer start
            fresh: the normal way in. The checkpoint is never written to. Not used when ``ckpt_path`` is given.
        activation_scales: ``fixed``: as calibrated. ``ema``: they follow a moving average of the batches' ranges.
            ``learned``: trained by gradient (LSQ, arXiv:1902.08153), from the calibrated values on. Learned scales are
            parameters and must be in an optimizer, without weight decay: see ``lightning_qat.parameter_groups``. A
            branch that starts at zero (LoRA, ReZero) is float at first, and takes its scales from training.
        weight_scales: ``updated``: those of the present weights, at every step. ``fixed`` and ``learned`` as above. A
            run resumed with ``ckpt_path`` learns what it learned before.
        start_epoch: train in float before this epoch; :class:`Calibration` then runs at its start.
        freeze_observers_after: from this epoch on, all scales stay as they are, learned ones too.
        freeze_batch_norm_after: from this epoch on, batch norm uses and keeps its running statistics.
        profile: the hardware the plan is for: the name of a shipped profile (``generic_int8_int16``) or the path of a
            YAML file. A type that the hardware lacks is replaced by the nearest one that it has.
        freeze: parts that stay in their quantized state while the rest trains: globs over the names of modules,
            parameters and points (``["backbone.*"]``), or a dictionary from glob to the first frozen epoch
            (``{"backbone.*": 3}``). The freeze ends with the run and is not stored in the checkpoint.
        trace_batches: how many batches are traced to learn the ops of the model.
        train_mode: trace training steps (in train mode) beside evaluation steps (in eval mode). Write False if they
            cannot run before training; ops that only training reaches then stay float, each with a warning.
        compile: True, or arguments of ``torch.compile`` such as ``{mode: max-autotune}``: training and evaluation run
            compiled code, except for the first batch of each. Analyses stay in eager mode. Without it, the target is
            compiled only within a ``torch.compile`` of your own; write False to keep it in eager mode even there.

    Raises:
        MisconfigurationException: a value is not one of the choices.

    Example of another schedule::

        class LateQuantization(QuantizationAwareTraining):
            def should_quantize(self, trainer):
                return trainer.state.fn != "fit" or trainer.global_step >= 1000

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
        weight_scales: WeightScales = "updated",
        start_epoch: int = 0,
        freeze_observers_after: int | None = None,
        freeze_batch_norm_after: int | None = None,
        freeze: list[str] | dict[str, int] | None = None,
        trace_batches: int = 2,
        profile: str | None = None,
        train_mode: bool = True,
        compile: bool | dict[str, Any] | None = None,
    ) -> None:
        with misconfiguration():
            self.qconfig = QConfig.of(qconfig)
            self.overrides = Override.list_of(overrides)
            self.profile = hardware_profile(profile)
        self.schedule = Schedule(
            activation_scales, weight_scales, start_epoch, freeze_observers_after, freeze_batch_norm_after
        )
        if trace_batches < 1:
            raise MisconfigurationException(f"trace_batches={trace_batches}: must be at least 1.")
        if not target:
            raise MisconfigurationException('target is empty: write the path of a submodule, several, or "auto".')
        self.target = target
        self.init_from = init_from
        self.frozen_parts = FrozenParts(freeze)
        self.trace_batches = trace_batches
        self.train_mode = train_mode
        self.evaluations = SharedEvaluations()
        self.is_configured = qconfig is not None or bool(overrides) or profile is not None
        self._initial_weights = InitialWeights(init_from)
        self._hooks: InsertionHooks | None = None
        self._regions = ScheduledRegions(self.schedule, self.frozen_parts, compile)
        self.plan_writer = PlanWriter()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if len(listed(trainer, QuantizationAwareTraining)) > 1:
            raise MisconfigurationException(
                "there are several QuantizationAwareTraining callbacks: use one, with target: [a, b] and overrides."
            )
        check_trainer(trainer, stage)
        if stage == "fit":
            self.frozen_parts.check(trainer)
            load_weights_for_copies(self._initial_weights, trainer, pl_module, self)
        self.evaluations, self.plan_writer = SharedEvaluations(), PlanWriter()
        self._hooks = InsertionHooks(self._request(), trainer, pl_module)
        self._hooks.install()

    def _request(self) -> InsertionRequest:
        return InsertionRequest(
            qconfig=self.qconfig,
            overrides=self.overrides,
            profile=self.profile,
            is_configured=self.is_configured,
            target=self.target,
            trace_batches=self.trace_batches,
            train_mode=self.train_mode,
            learned_scales=self.schedule.learned_scales,
            initial_weights=self._initial_weights,
            frozen_parts=self.frozen_parts,
        )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._uninstall()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._uninstall()  # Lightning does not call teardown then, and the next run must not meet these hooks

    def _uninstall(self) -> None:
        if self._hooks is not None:
            self._hooks.uninstall()
            self._hooks = None
        self._regions.release()
        self.plan_writer.finish()

    @override
    def require_inserted(self) -> None:
        """Raise what kept fake-quant from being inserted, if anything did."""
        if self._hooks is not None:
            self._hooks.raise_pending_error()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": None}

    @override
    def should_quantize(self, trainer: pl.Trainer) -> bool:
        """Whether fake-quant is on now. Override for another schedule."""
        return trainer.state.fn != "fit" or self.schedule.quantizes(trainer.current_epoch)

    @override
    def scale_updates(self, trainer: pl.Trainer) -> tuple[ScaleRole, ...]:
        """Which scales follow the data in training now. Override for another schedule."""
        return self.schedule.moving_scales(trainer.current_epoch)

    @property
    @override
    def freezes_modules(self) -> bool:
        """Whether parts or batch norm are frozen in some epoch."""
        return self.schedule.freeze_batch_norm_after is not None or bool(self.frozen_parts.first_epochs)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.require_inserted()
        check_averaged_copies(trainer)
        warn_about_precision(trainer, pl_module)
        check_optimizers(trainer, pl_module)
        self._apply(trainer, pl_module)

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._require_scales(trainer, pl_module)
        self._apply(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not listed(trainer, ScaleSource):
            require_scales(trainer, pl_module)  # rather now than at start_epoch
        self.frozen_parts.start(pl_module)
        self._apply(trainer, pl_module)
        self.plan_writer.start(trainer, pl_module)
        warn_about_step_size(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # callbacks that average weights put them in place now
        expect_other_weights(pl_module, self.scale_updates(trainer))

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.plan_writer.end(trainer, pl_module)  # only now are the weights those that are kept: see on_train_end

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 or not self._regions.are_in(*self._wanted_state(trainer)):
            self._apply(trainer, pl_module)
            self._require_scales(trainer, pl_module)
        self._regions.hold(trainer.current_epoch)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            average_gradients(self._regions.regions)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size > 1:
            average_scales(self._regions.regions, self.scale_updates(trainer))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def _start_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.require_inserted()
        self._apply(trainer, pl_module)
        if _compat.averaged_copies(trainer):  # whose weights are swapped in while evaluation runs
            expect_other_weights(pl_module, self.scale_updates(trainer))

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._first_evaluation_batch(trainer, pl_module, batch_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def _first_evaluation_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Calibration may have run in another callback's start hook: only now must there be scales."""
        if batch_idx == 0 and trainer.state.fn != "fit":
            self._require_scales(trainer, pl_module)

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._regions.apply(trainer, pl_module, *self._wanted_state(trainer))

    def _wanted_state(self, trainer: pl.Trainer) -> tuple[State, frozenset[ScaleRole]]:
        return "quantize" if self.should_quantize(trainer) else "off", frozenset(self.scale_updates(trainer))

    def _require_scales(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.should_quantize(trainer):
            require_scales(trainer, pl_module)
