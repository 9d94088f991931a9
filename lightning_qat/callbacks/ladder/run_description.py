"""What a run is beside its data and weights, as plain data: modes, optimizers, settings, datasets."""

from __future__ import annotations

import re
from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn.parameter import is_lazy

from lightning_qat.analysis.fingerprint.fingerprint import deviating_modes
from lightning_qat.analysis.fingerprint.module_settings import plain_path
from lightning_qat.callbacks.passes.fresh_loaders import Stage
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.quantization.modules.module_walk import is_in_region
from lightning_qat.quantization.modules.preservation import preserved_modes

STAGES: tuple[Stage, ...] = ("train", "validate")


def modes_in_training(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, list[str]]:
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


def untrained_parameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str] | None:
    """Parameters that training does not update; None without optimizers."""
    if not trainer.optimizers:
        return None
    stepped = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    return [
        plain_path(name)
        for name, p in pl_module.named_parameters()
        if not is_in_region(name) and not (p.requires_grad and id(p) in stepped)
    ]


def parameter_sizes(pl_module: pl.LightningModule) -> dict[str, int]:
    """Number of values of every parameter; lazy ones have none yet."""
    return {
        plain_path(name): p.numel()
        for name, p in pl_module.named_parameters()
        if not (is_in_region(name) or is_lazy(p))
    }


def described_optimizer(optimizer: Any, pl_module: pl.LightningModule) -> dict[str, Any]:
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


def with_counts(at_start: list[dict[str, Any]], at_end: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the optimizers of the start of training; lazy layers get their number of parameters only later."""
    counted = []
    for optimizer, later in zip(at_start, at_end, strict=False):
        groups = [
            {**group, "parameters": now["parameters"]} if group["parameters"] is None else group
            for group, now in zip(optimizer["groups"], later["groups"], strict=False)
        ]
        counted.append({**optimizer, "groups": groups + optimizer["groups"][len(groups) :]})
    return counted + at_start[len(counted) :]


def run_settings(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Return precision, batch size, accumulation, clipping and the like."""
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


def described_datasets(trainer: pl.Trainer) -> dict[str, str]:
    """Representation of the datasets with their transforms, without memory addresses, which differ in every run."""
    found: dict[str, str] = {}
    for stage in STAGES:
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
