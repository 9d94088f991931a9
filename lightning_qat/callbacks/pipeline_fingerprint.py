"""The callback that takes the fingerprint of a training pipeline, and the function behind it."""

from __future__ import annotations

import platform
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from typing_extensions import override

from lightning_qat.analysis.fingerprint.fingerprint import (
    Fingerprint,
    batch_norm_summary,
    weight_digests,
)
from lightning_qat.analysis.fingerprint.layer_calls import LayerCall
from lightning_qat.analysis.fingerprint.module_settings import (
    ModuleSettings,
    module_settings,
    steady_settings,
)
from lightning_qat.analysis.fingerprint.training_plan import TrainingPlan
from lightning_qat.callbacks.ladder.layer_recorder import layers_of_first_step
from lightning_qat.callbacks.ladder.run_description import (
    STAGES,
    described_datasets,
    described_optimizer,
    modes_in_training,
    parameter_sizes,
    run_settings,
    untrained_parameters,
    with_counts,
)
from lightning_qat.callbacks.ladder.step_summary import StageSummary, evaluates_randomly, set_modes, summarize
from lightning_qat.callbacks.ladder.training_plan import plan_of, with_updates
from lightning_qat.callbacks.passes.evaluation import evaluate
from lightning_qat.callbacks.passes.extra_batches import extra_batches
from lightning_qat.callbacks.passes.run_step import loss_of, mean_loss, run_step
from lightning_qat.callbacks.preservation.undisturbed import undisturbed
from lightning_qat.callbacks.quantized_run import quantization_of
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.messages import rank_zero_info, rank_zero_warn
from lightning_qat.callbacks.trainer.numeric_arguments import require_at_least
from lightning_qat.callbacks.trainer.output_directory import leaves_files, local_instead_of_url, run_directory
from lightning_qat.callbacks.trainer.reporting_callback import ReportingCallback
from lightning_qat.callbacks.trainer.seeding import seeded
from lightning_qat.callbacks.trainer.stored_state import read_state
from lightning_qat.quantization.modules.batch_norms import is_batch_norm
from lightning_qat.quantization.region.region import find_regions
from lightning_qat.reporting.files import write_fingerprint

_PACKAGES = ("lightning-qat", "torch", "lightning", "torchmetrics", "numpy")
FILE_NAME = "pipeline_fingerprint.json"


class PipelineFingerprint(ReportingCallback):
    """Write the fingerprint of a float training pipeline, for a later comparison with the QAT pipeline.

    Add this callback to the float run. At the end of training it runs the trained model on the first batches of the
    training and validation data, and writes ``pipeline_fingerprint.json`` to the run's ``lightning_qat`` directory.
    Give that file to ``PipelineCheck(reference=...)`` in the QAT run. The float run stays bit-identical. If the float
    model has been trained already, use ``python -m lightning_qat fingerprint``.

    Args:
        batches: batches per stage and rank.
        seed: decides which batches are drawn from shuffled data.

    Attributes:
        fingerprint: the fingerprint, after training; None before.

    Example::

        trainer = Trainer(callbacks=[PipelineFingerprint()])
    """

    def __init__(self, batches: int = 8, seed: int = 0) -> None:
        super().__init__()
        require_at_least("PipelineFingerprint", batches=batches)
        self.batches = batches
        self.seed = seed
        self.fingerprint: Fingerprint | None = None
        self._optimizers: list[dict[str, Any]] = []
        self._settings: dict[str, ModuleSettings] = {}
        self._plan: TrainingPlan | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": self._optimizers, "plan": None if self._plan is None else asdict(self._plan)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        stored = read_state(_Stored, state_dict, self)
        self._optimizers, self._plan = stored.optimizers, stored.plan

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settings = module_settings(pl_module)
        if quantization_of(trainer) is None and (elsewhere := local_instead_of_url(trainer)):
            rank_zero_warn(elsewhere, category=PossibleUserWarning)
        if trainer.global_step == 0:  # at the end the schedule has brought the learning rate down
            self._optimizers = [described_optimizer(optimizer, pl_module) for optimizer in trainer.optimizers]
            self._plan = plan_of(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.tried(trainer, lambda: self._take(trainer, pl_module))

    def _take(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fingerprint = take_fingerprint(trainer, pl_module, self.batches, self.seed, self._plan)
        at_start = with_counts(self._optimizers, fingerprint.optimizers)
        self.fingerprint = replace(
            fingerprint,
            optimizers=at_start or fingerprint.optimizers,
            modules=steady_settings(fingerprint.modules or {}, self._settings),
        )
        directory = run_directory(trainer)  # broadcasts: on all ranks
        if leaves_files(trainer):
            path = directory / FILE_NAME
            if self._reports.write(path, partial(write_fingerprint, self.fingerprint, path)):
                rank_zero_info(f"Fingerprint of this pipeline: {path}. In QAT: PipelineCheck(reference={str(path)!r}).")


@dataclass(frozen=True)
class _Stored:
    optimizers: list[dict[str, Any]]
    plan: TrainingPlan | None = None


def take_fingerprint(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batches: int = 8,
    seed: int = 0,
    plan: TrainingPlan | None = None,
    steps: int | None = None,
) -> Fingerprint:
    """Take the fingerprint of a pipeline with the present weights and fake-quant off. The run is not changed.

    Args:
        trainer: the running trainer, with optimizers if it trains.
        pl_module: its module.
        batches: batches per stage and rank.
        seed: seed of the random state meanwhile; each rank adds its number.
        plan: what the training planned when it began. By default it is simulated if the training begins now; later the
            schedules no longer show how they began, and the fingerprint has no plan.
        steps: how many steps the present weights and schedules have been trained; by default those of the trainer.

    Raises:
        MisconfigurationException: there is no data at all.
    """
    stages: dict[str, StageSummary] = {}
    layers: dict[str, tuple[LayerCall, ...]] = {}
    with ExitStack() as stack:
        stack.enter_context(undisturbed(trainer, pl_module))  # asking for loaders may change the datamodule
        for region in find_regions(pl_module).values():
            stack.enter_context(region.state("off", updates=()))
        modules = module_settings(pl_module)
        for stage in STAGES:
            if _compat.attached_loader(trainer, stage) is None:
                continue
            with undisturbed(trainer, pl_module, trains=True), seeded(seed + trainer.global_rank):
                stages[stage] = summarize(trainer, pl_module, stage, batches)
                modules = steady_settings(modules, module_settings(pl_module))  # a step may count its calls
            with undisturbed(trainer, pl_module, trains=True):
                first = seed + trainer.global_rank
                layers[stage] = layers_of_first_step(trainer, pl_module, stage, first, set_modes)
        losses, errors = _training_losses(trainer, pl_module, batches, seed + trainer.global_rank)
        with seeded(seed + trainer.global_rank):
            evaluation = evaluate(trainer, pl_module, limit=batches)
        with undisturbed(trainer, pl_module, trains=True):
            is_random = evaluates_randomly(trainer, pl_module, seed + trainer.global_rank)
        if plan is None and (trainer.global_step if steps is None else steps) == 0:
            plan = plan_of(trainer, pl_module)
        plan = with_updates(trainer, pl_module, plan, seed + trainer.global_rank)
        return Fingerprint(
            data={stage: summary.data for stage, summary in stages.items()},
            model_inputs={stage: summary.inputs for stage, summary in stages.items()},
            losses=losses,
            metrics=evaluation.metrics,
            standard_errors={**evaluation.standard_errors, **errors},
            modes=modes_in_training(trainer, pl_module),
            batch_norm=batch_norm_summary(pl_module),
            optimizers=[described_optimizer(optimizer, pl_module) for optimizer in trainer.optimizers],
            schedulers=[
                {"class": type(config.scheduler).__name__, "interval": config.interval, "frequency": config.frequency}
                for config in trainer.lr_scheduler_configs
            ],
            settings=run_settings(trainer, pl_module),
            datasets=described_datasets(trainer),
            weights=weight_digests(pl_module),
            versions={"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
            agreement={stage: summary.agreement for stage, summary in stages.items()},
            constant_guess={stage: summary.constant_guess for stage, summary in stages.items()},
            random_evaluation=is_random,
            swapped=stages["validate"].swapped if "validate" in stages else [],
            modules=modules,
            layers=layers,
            untrained=untrained_parameters(trainer, pl_module),
            sizes=parameter_sizes(pl_module),
            plan=plan,
            batches=batches,
        )


def take_comparable(trainer: pl.Trainer, pl_module: pl.LightningModule, known: Fingerprint) -> Fingerprint:
    """Take the fingerprint on as many batches as that of the float run, of weights that were not trained since then.

    Modules that QuantizationAwareTraining freezes, as the user asked, are not told as a difference.
    """
    here = (
        take_fingerprint(trainer, pl_module, known.batches, steps=0)
        if known.batches
        else take_fingerprint(trainer, pl_module, steps=0)
    )
    quantization = quantization_of(trainer)
    if quantization is None or not quantization.freezes_modules:
        return here
    frozen = [name for name in here.modes.get("eval", ()) if name in known.modes.get("eval", ())]
    modes = {mode: names for mode, names in here.modes.items() if mode != "eval"} | ({"eval": frozen} if frozen else {})
    untrained = [name for name in here.untrained or () if name in (known.untrained or ())]
    return replace(here, modes=modes, untrained=None if here.untrained is None else untrained)


def take_to_compare(trainer: pl.Trainer, pl_module: pl.LightningModule, known: object) -> Fingerprint:
    """Take what can be compared with a reference: as much as its fingerprint has; else the answers in validation."""
    if isinstance(known, Fingerprint):
        return take_comparable(trainer, pl_module, known)
    return take_answers(trainer, pl_module)


def take_answers(trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int = 8, seed: int = 0) -> Fingerprint:
    """Take the part of a fingerprint that tells a trained float model from one that guesses: its answers in validation.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        batches: batches per rank.
        seed: seed of the random state meanwhile; each rank adds its number.
    """
    if _compat.attached_loader(trainer, "validate") is None:
        return Fingerprint()
    with ExitStack() as stack:
        stack.enter_context(undisturbed(trainer, pl_module, trains=True))
        stack.enter_context(seeded(seed + trainer.global_rank))
        for region in find_regions(pl_module).values():
            stack.enter_context(region.state("off", updates=()))
        found = summarize(trainer, pl_module, "validate", batches)
    return Fingerprint(
        data={"validate": found.data},
        agreement={"validate": found.agreement},
        constant_guess={"validate": found.constant_guess},
    )


def _training_losses(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Training losses with batch norm in both modes, and their standard errors."""
    losses: dict[str, float] = {}
    errors: dict[str, float] = {}
    for mode in ("eval", "train") if _compat.attached_loader(trainer, "train") is not None else ():
        with undisturbed(trainer, pl_module, trains=True), seeded(seed):
            loss = _training_loss(trainer, pl_module, batches, mode)
        if loss is not None:
            name = f"train_loss (batch norm in {mode})"
            losses[name] = loss[0]
            errors |= {name: loss[1]} if loss[1] is not None else {}
    return losses, errors


def _training_loss(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int, mode: str
) -> tuple[float, float | None] | None:
    """Mean training loss and its standard error, with everything as in training but batch norm in the given mode."""
    losses = []
    for extra in extra_batches(trainer, pl_module, batches, "train"):
        pl_module.train()
        for module in pl_module.modules():
            if is_batch_norm(module):
                module.train(mode == "train")
        with torch.no_grad():
            loss = loss_of(run_step(trainer, pl_module, extra, "train"))
        if loss is not None and loss.numel() == 1:
            losses.append(float(loss.detach()))
    mean, error = mean_loss(trainer, losses)
    return None if mean is None else (mean, error)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
