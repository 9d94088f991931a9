"""Running a step of the user's module on one batch, outside of the Trainer's loops."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_debug  # type: ignore[attr-defined]
from torch import Tensor

from lightning_qat.callbacks.passes.extra_batches import ExtraBatch
from lightning_qat.callbacks.passes.manual_optimization import inert_optimization
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.quantization.errors import ConfigurationError

_STEPS = {
    "train": "training_step",
    "validate": "validation_step",
    "test": "test_step",
    "predict": "predict_step",
}
_HOOKS = {  # before the first batch, before and after every batch
    "training_step": (("on_train_epoch_start",), None, None),
    "validation_step": (
        ("on_validation_start", "on_validation_epoch_start"),
        "on_validation_batch_start",
        "on_validation_batch_end",
    ),
    "test_step": (("on_test_start", "on_test_epoch_start"), "on_test_batch_start", "on_test_batch_end"),
    "predict_step": (
        ("on_predict_start", "on_predict_epoch_start"),
        "on_predict_batch_start",
        "on_predict_batch_end",
    ),
}


def run_step(trainer: pl.Trainer, pl_module: pl.LightningModule, extra: ExtraBatch, stage: str = "validate") -> Any:
    """Run the step of a stage on one batch. Fall back to another step if this one is missing or cannot read the batch.

    The module's hooks around evaluation steps run too, as steps depend on what they prepare (callbacks' hooks do not).
    Autocast is as in the run; gradients are not tracked unless ``stage`` is ``train``. Calls that only manual
    optimization makes (``self.optimizers()``, ``self.manual_backward()``) do nothing.

    A step that fails ahead of training may need what the module's own ``on_fit_start`` or ``on_train_start`` will set:
    they are run, and the step is run again. Use it in a block that puts back what steps and hooks change.

    What the user has compiled runs as it is written, because the pass may look at every op, and so that code is not
    compiled again for every state of a region.
    """
    with torch.compiler.set_stance("force_eager"):
        return _run_with_start_hooks(trainer, pl_module, extra, stage)


def _run_with_start_hooks(trainer: pl.Trainer, pl_module: pl.LightningModule, extra: ExtraBatch, stage: str) -> Any:
    try:
        return _run_fitting_step(trainer, pl_module, extra, stage)
    except Exception:
        hooks = _compat.start_hooks(trainer, pl_module)
        if not hooks:
            raise
        try:
            with _compat.running_stage(trainer, "train"), torch.inference_mode(False):
                for hook in hooks:
                    _compat.call_hook(pl_module, hook)
            return _run_fitting_step(trainer, pl_module, extra, stage)
        except Exception as error:
            rank_zero_debug(f"running {' and '.join(hooks)} ahead of the {stage} step did not help: {error!r}")
        raise


def loss_of(output: Any) -> Tensor | None:
    """Return the loss in what a training step returned."""
    loss = output.get("loss") if isinstance(output, dict) else output
    return loss if isinstance(loss, Tensor) else None


def mean_loss(trainer: pl.Trainer, losses: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean of the losses of some batches over all ranks, and its standard error, where these are known.

    Args:
        trainer: the running trainer; all ranks call this.
        losses: those of this rank, one per batch.
    """
    if not losses:
        return None, None
    mean = torch.tensor(statistics.fmean(losses), device=trainer.strategy.root_device)
    over_ranks = float(trainer.strategy.reduce(mean, reduce_op="mean"))
    if len(losses) < 2 or not all(map(math.isfinite, losses)):
        return over_ranks, None
    return over_ranks, statistics.stdev(losses) / math.sqrt(len(losses) * trainer.world_size)


def _run_fitting_step(trainer: pl.Trainer, pl_module: pl.LightningModule, extra: ExtraBatch, stage: str) -> Any:
    """Run the step of a stage; training batches that evaluation cannot read go to the training step."""
    name = _step_name(pl_module, extra, stage)
    if name != "validation_step" or extra.source != "train" or not _compat.is_overridden("training_step", pl_module):
        return _run(trainer, pl_module, extra, stage, name)
    try:
        return _run(trainer, pl_module, extra, stage, name)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigurationError):
            raise
        try:  # batches of training that evaluation cannot read, such as those of several loaders
            return _run(trainer, pl_module, extra, stage, "training_step")
        except Exception as second:
            raise MisconfigurationException(
                f"training batches do not fit the validation step of {type(pl_module).__name__} ({error!r}), and its "
                f"training step fails outside of training ({second!r}): give the datamodule (or the module) a "
                "calibration_dataloader() whose batches look like those of validation."
            ) from error


def _run(trainer: pl.Trainer, pl_module: pl.LightningModule, extra: ExtraBatch, stage: str, name: str) -> Any:
    start_hooks, before, after = _HOOKS[name]
    plugin = trainer.precision_plugin
    tracked = torch.enable_grad() if stage == "train" else torch.no_grad()
    position = (extra.batch, extra.batch_idx, extra.dataloader_idx)[: 3 if extra.several_loaders else 2]
    with _compat.running_stage(trainer, stage), torch.inference_mode(False), tracked:
        if extra.batch_idx == 0 and extra.dataloader_idx == 0:
            for hook in start_hooks:
                if _compat.is_overridden(hook, pl_module):
                    _compat.call_hook(pl_module, hook)
        if before is not None:
            _compat.call_hook(pl_module, before, *position)
        with (
            inert_optimization(trainer, pl_module) if name == "training_step" else nullcontext(),
            plugin.train_step_context() if name == "training_step" else plugin.val_step_context(),
        ):
            output = _compat.call_hook(pl_module, name, *_arguments(getattr(pl_module, name), extra))
        if after is not None:
            _compat.call_hook(pl_module, after, output, *position)
        return output


def _arguments(step: Callable[..., Any], extra: ExtraBatch) -> list[Any]:
    """As many of batch, batch_idx and dataloader_idx as a step takes."""
    accepted = inspect.signature(step).parameters
    open_ended = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in accepted.values())
    arguments = [extra.batch]
    if "batch_idx" in accepted or len(accepted) >= 2 or open_ended:
        arguments.append(extra.batch_idx)
    if extra.several_loaders and ("dataloader_idx" in accepted or open_ended or len(accepted) >= 3):
        arguments.append(extra.dataloader_idx)
    return arguments


def _step_name(pl_module: pl.LightningModule, extra: ExtraBatch, stage: str) -> str:
    """The step to run: the one asked for if the batch fits it, else the one the batch was made for."""
    if extra.source == "predict":
        return "predict_step"  # always there: by default it calls the module
    wanted = (_STEPS[stage], _STEPS[extra.source])
    for name in wanted[::-1] if extra.source == "test" else wanted:
        if _compat.is_overridden(name, pl_module):
            return name
    others = (name for name in ("validation_step", "test_step", "training_step"))
    return next((name for name in others if _compat.is_overridden(name, pl_module)), "predict_step")
