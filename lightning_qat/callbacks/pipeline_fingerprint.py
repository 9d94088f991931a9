"""The callback that takes the fingerprint of a training pipeline, and the function behind it."""

from __future__ import annotations

import platform
import re
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_qat.analysis.fingerprint.fingerprint import (
    Fingerprint,
    batch_norm_summary,
    deviating_modes,
    weight_digests,
)
from lightning_qat.analysis.fingerprint.layer_calls import LayerCall
from lightning_qat.analysis.fingerprint.module_settings import (
    ModuleSettings,
    module_settings,
    plain_path,
    steady_settings,
)
from lightning_qat.callbacks.ladder.layer_recorder import layers_of_first_step
from lightning_qat.callbacks.ladder.step_summary import StageSummary, evaluates_randomly, set_modes, summarize
from lightning_qat.callbacks.passes.evaluation import evaluate
from lightning_qat.callbacks.passes.extra_batches import extra_batches
from lightning_qat.callbacks.passes.fresh_loaders import Stage
from lightning_qat.callbacks.passes.run_step import loss_of, mean_loss, run_step
from lightning_qat.callbacks.preservation.undisturbed import undisturbed
from lightning_qat.callbacks.quantized_run import quantization_of
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.messages import rank_zero_info, rank_zero_warn
from lightning_qat.callbacks.trainer.numeric_arguments import require_at_least
from lightning_qat.callbacks.trainer.output_directory import leaves_files, local_instead_of_url, run_directory
from lightning_qat.callbacks.trainer.reporting_callback import ReportingCallback
from lightning_qat.callbacks.trainer.seeding import seeded
from lightning_qat.quantization.modules.batch_norms import is_batch_norm
from lightning_qat.quantization.modules.module_walk import is_in_region
from lightning_qat.quantization.modules.preservation import preserved_modes
from lightning_qat.quantization.region.regions import find_regions
from lightning_qat.reporting.files import write_fingerprint

_PACKAGES = ("lightning-qat", "torch", "lightning", "torchmetrics", "numpy")
_STAGES: tuple[Stage, ...] = ("train", "validate")
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

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": self._optimizers}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._optimizers = state_dict["optimizers"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settings = module_settings(pl_module)
        if quantization_of(trainer) is None and (elsewhere := local_instead_of_url(trainer)):
            rank_zero_warn(elsewhere, category=PossibleUserWarning)
        if trainer.global_step == 0:  # at the end the schedule has brought the learning rate down
            self._optimizers = [_optimizer(optimizer, pl_module) for optimizer in trainer.optimizers]

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fingerprint = take_fingerprint(trainer, pl_module, self.batches, self.seed)
        at_start = _counted(self._optimizers, fingerprint.optimizers)
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


def take_fingerprint(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int = 8, seed: int = 0
) -> Fingerprint:
    """Take the fingerprint of a pipeline with the present weights and fake-quant off. The run is not changed.

    Args:
        trainer: the running trainer, with optimizers if it trains.
        pl_module: its module.
        batches: batches per stage and rank.
        seed: seed of the random state meanwhile; each rank adds its number.

    Raises:
        MisconfigurationException: there is no data at all.
    """
    stages: dict[str, StageSummary] = {}
    losses: dict[str, float] = {}
    errors: dict[str, float] = {}
    layers: dict[str, tuple[LayerCall, ...]] = {}
    with ExitStack() as stack:
        stack.enter_context(undisturbed(trainer, pl_module))  # asking for loaders may change the datamodule
        for region in find_regions(pl_module).values():
            stack.enter_context(region.state("off", updates=()))
        modules = module_settings(pl_module)
        for stage in _STAGES:
            if _compat.attached_loader(trainer, stage) is None:
                continue
            with undisturbed(trainer, pl_module, trains=True), seeded(seed + trainer.global_rank):
                stages[stage] = summarize(trainer, pl_module, stage, batches)
                modules = steady_settings(modules, module_settings(pl_module))  # a step may count its calls
            with undisturbed(trainer, pl_module, trains=True):
                first = seed + trainer.global_rank
                layers[stage] = layers_of_first_step(trainer, pl_module, stage, first, set_modes)
        if _compat.attached_loader(trainer, "train") is not None:
            for mode in ("eval", "train"):
                with undisturbed(trainer, pl_module, trains=True), seeded(seed + trainer.global_rank):
                    loss = _training_loss(trainer, pl_module, batches, mode)
                if loss is not None:
                    name = f"train_loss (batch norm in {mode})"
                    losses[name] = loss[0]
                    errors |= {name: loss[1]} if loss[1] is not None else {}
        with seeded(seed + trainer.global_rank):
            evaluation = evaluate(trainer, pl_module, limit=batches)
        with undisturbed(trainer, pl_module, trains=True):
            is_random = evaluates_randomly(trainer, pl_module, seed + trainer.global_rank)
        return Fingerprint(
            data={stage: summary.data for stage, summary in stages.items()},
            model_inputs={stage: summary.inputs for stage, summary in stages.items()},
            losses=losses,
            metrics=evaluation.metrics,
            standard_errors={**evaluation.standard_errors, **errors},
            modes=_modes(trainer, pl_module),
            batch_norm=batch_norm_summary(pl_module),
            optimizers=[_optimizer(optimizer, pl_module) for optimizer in trainer.optimizers],
            schedulers=[
                {"class": type(config.scheduler).__name__, "interval": config.interval, "frequency": config.frequency}
                for config in trainer.lr_scheduler_configs
            ],
            settings=_settings(trainer, pl_module),
            datasets=_datasets(trainer),
            weights=weight_digests(pl_module),
            versions={"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
            agreement={stage: summary.agreement for stage, summary in stages.items()},
            constant_guess={stage: summary.constant_guess for stage, summary in stages.items()},
            random_evaluation=is_random,
            swapped=stages["validate"].swapped if "validate" in stages else [],
            modules=modules,
            layers=layers,
            untrained=_untrained(trainer, pl_module),
            batches=batches,
        )


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


def _modes(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, list[str]]:
    """Submodules that are not in the mode of the module, in training and while it is evaluated."""
    with preserved_modes(pl_module):
        trains = _compat.attached_loader(trainer, "train") is not None
        if trains and _compat.is_overridden("on_train_epoch_start", pl_module):  # it may freeze parts
            with _compat.running_stage(trainer, "train"):
                _compat.call_hook(pl_module, "on_train_epoch_start")
        modes = deviating_modes(pl_module)
        pl_module.eval()
        if _compat.is_overridden("on_validation_model_eval", pl_module):
            _compat.call_hook(pl_module, "on_validation_model_eval")
        training = deviating_modes(pl_module).get("train")
    return {**modes, "train in evaluation": training} if training else modes


def _untrained(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str] | None:
    """Parameters that training does not update; None without optimizers."""
    if not trainer.optimizers:
        return None
    stepped = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    return [
        plain_path(name)
        for name, p in pl_module.named_parameters()
        if not is_in_region(name) and not (p.requires_grad and id(p) in stepped)
    ]


def _optimizer(optimizer: Any, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Class and settings of an optimizer, without learned scales, which a float run does not have."""
    scales = {id(p) for name, p in pl_module.named_parameters() if is_in_region(name)}
    groups = []
    for group in optimizer.param_groups:
        weights = [p for p in group["params"] if id(p) not in scales]
        if group["params"] and not weights:
            continue
        settings = {k: _primitive(v) for k, v in group.items() if k != "params"}
        number = None if any(map(is_lazy, weights)) else sum(p.numel() for p in weights)
        groups.append({**settings, "parameters": number})
    return {"class": type(_compat.bare(optimizer)).__name__, "groups": groups}


def _counted(at_start: list[dict[str, Any]], at_end: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the optimizers of the start of training; lazy layers get their number of parameters only later."""
    counted = []
    for optimizer, later in zip(at_start, at_end, strict=False):
        groups = [
            {**group, "parameters": now["parameters"]} if group["parameters"] is None else group
            for group, now in zip(optimizer["groups"], later["groups"], strict=False)
        ]
        counted.append({**optimizer, "groups": groups + optimizer["groups"][len(groups) :]})
    return counted + at_start[len(counted) :]


def _settings(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    loader = _compat.attached_loader(trainer, "train")
    return {
        "precision": str(trainer.precision),
        "batch_size": getattr(loader, "batch_size", None),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": _primitive(trainer.gradient_clip_val),
        "gradient_clip_algorithm": str(trainer.gradient_clip_algorithm),
        "world_size": trainer.world_size,
        "max_epochs": trainer.max_epochs,
        "automatic_optimization": pl_module.automatic_optimization,
    }


def _datasets(trainer: pl.Trainer) -> dict[str, str]:
    """Representation of the datasets with their transforms, without memory addresses, which differ in every run."""
    found: dict[str, str] = {}
    for stage in _STAGES:
        dataset = getattr(_compat.attached_loader(trainer, stage), "dataset", None)
        if dataset is None:
            continue
        attributes = getattr(dataset, "__dict__", {})
        transforms = [value for name, value in attributes.items() if "transform" in name and value is not None]
        found[str(stage)] = "; ".join(re.sub(r" (object )?at 0x[0-9a-f]+", "", repr(v)) for v in (dataset, *transforms))
    return found


def _primitive(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, (tuple, list)):
        return [_primitive(v) for v in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
