"""Running batches through the user's steps outside the Trainer's loops, without leaving a trace.

Lightning has no way to do this: ``trainer.validate()`` inside fit breaks the trainer state, and steps that log
overwrite ``callback_metrics``. So the batches come from fresh loaders, take the way Lightning's loops send them, and
everything a step can touch is put back.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]

from lightning_qat.callbacks.passes.analysis_loaders import Stage, fresh_loaders
from lightning_qat.callbacks.passes.manual_optimization import inert_optimization
from lightning_qat.callbacks.passes.module_state import (
    preserved_attributes,
    preserved_loader_state,
    preserved_parameters,
)
from lightning_qat.callbacks.passes.optimizer_state import preserved_optimizers
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.preservation import preserved, replaced_attribute
from lightning_qat.quantization.region.regions import find_regions

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

EVALUATION_HOOKS = (
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_test_start",
    "on_test_epoch_start",
    "on_test_batch_start",
)
"""Hooks of a module that run around its evaluation steps, and may swap weights in."""


@dataclass(frozen=True)
class ExtraBatch:
    """A batch on the device of the module, as a step receives it.

    Args:
        batch: what the step gets.
        batch_idx: its number in its loader.
        dataloader_idx: number of the loader.
        several_loaders: whether the step is told the number of the loader.
        source: the stage the batch was made for; a test or predict batch need not fit a validation step.
    """

    batch: Any
    batch_idx: int
    dataloader_idx: int
    several_loaders: bool
    source: str = "train"


@contextmanager
def undisturbed(trainer: pl.Trainer, pl_module: pl.LightningModule, *, trains: bool | None = None) -> Iterator[None]:
    """Run a block that may call the module's steps: no logging, and nothing of the run is changed by it.

    Put back exactly: random state, train/eval flag of every submodule, buffers, attributes (lists a step appends to,
    torchmetrics), ``log``, the trainer's stage, gradients and whether there are any, settings of optimizers and
    schedulers, attributes of the trainer (``should_stop``) and of the datamodule, the metrics that the trainer shows.
    No scale follows the data meanwhile. Not known are objects of other classes that a step changes, unless they hold
    nothing but data, and what a step changes outside of the run: files, servers, globals. Attributes that hold very
    much data are not copied: see :func:`~lightning_qat.callbacks.passes.module_state.preserved_attributes`.

    Args:
        trainer: the running trainer.
        pl_module: its module, or a copy of it.
        trains: put back the parameters too, because training steps run (they may update a momentum encoder). By
            default only for modules that have no other step, or hooks that may swap weights in for evaluation.
    """
    if trains is None:  # hooks may swap averaged weights in, and those that swap them out do not run
        trains = not any(_compat.is_overridden(name, pl_module) for name in ("validation_step", "test_step")) or any(
            _compat.is_overridden(hook, pl_module) for hook in EVALUATION_HOOKS
        )
    gradients = [(p, p.grad, p.requires_grad) for p in pl_module.parameters()]
    stage = trainer.state.stage
    with torch.inference_mode(False), ExitStack() as stack:  # what is saved here outlives a test run
        stack.enter_context(undisturbed_forwards(pl_module))
        stack.enter_context(preserved(pl_module))
        stack.enter_context(preserved_parameters(pl_module) if trains else nullcontext())
        stack.enter_context(_compat.preserved_trainer(trainer))
        stack.enter_context(preserved_optimizers(trainer))
        stack.enter_context(preserved_loader_state([trainer.datamodule]))  # type: ignore[attr-defined]
        for region in find_regions(pl_module).values():
            stack.enter_context(region.state(region.current_state, updates=()))
        for parameter, *_ in gradients:
            parameter.grad = None
        try:
            yield
        finally:
            trainer.state.stage = stage
            for parameter, gradient, requires_grad in gradients:
                parameter.requires_grad_(requires_grad)  # hooks freeze and unfreeze
                parameter.grad = gradient


@contextmanager
def undisturbed_forwards(pl_module: pl.LightningModule) -> Iterator[None]:
    """Run a block that calls only forwards, which the analysis functions repeat and undo: no logging, and attributes
    are put back."""
    with preserved_attributes(pl_module), muted_logging(pl_module):
        yield


@contextmanager
def muted_logging(pl_module: pl.LightningModule, log: Callable[..., Any] | None = None) -> Iterator[None]:
    """Replace ``self.log`` on the instance, and with it ``self.log_dict``: by nothing, or by a recorder."""
    with replaced_attribute(pl_module, "log", log or (lambda *args, **kwargs: None)):
        yield


def analysis_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, limit: float, stage: Stage = "calibration"
) -> Iterator[ExtraBatch]:
    """Yield batches of a stage from a fresh loader, on the device and in the precision the steps expect.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        limit: number of batches on this rank at most; the trainer's ``limit_*_batches`` hold too.
        stage: ``calibration``: ``calibration_dataloader()`` of the datamodule or module if there is one, else the
            training data, else the data of the stage that runs. Otherwise the loaders of that stage.

    Raises:
        MisconfigurationException: there is no loader to take batches from.
    """
    with fresh_loaders(trainer, pl_module, stage) as (combined, source):
        allowed = combined.limits
        several = len(allowed) > 1 and source != "train"
        _warn_about_one_shot_loaders(combined.flattened, source)
        end = min(limit, max(allowed, default=0) if source == "train" else sum(allowed))
        # calibration looks at what evaluation will see: no training augmentation on the way to the device
        shown = "validate" if stage == "calibration" else stage
        # islice: a batch too many would be lost to a loader that cannot start again
        for batch, batch_idx, dataloader_idx in itertools.islice(combined, None if end == float("inf") else int(end)):
            batch = transferred(trainer, pl_module, batch, dataloader_idx, shown)
            yield ExtraBatch(batch, batch_idx, dataloader_idx, several, source)


def _warn_about_one_shot_loaders(loaders: Iterable[Any], source: str) -> None:
    """Say that the run goes without the batches that an extra pass takes from a loader that cannot start again."""
    for kind in {type(loader).__name__ for loader in loaders if isinstance(loader, Iterator)}:
        rank_zero_warn(
            f"the {source} data come from an iterator ({kind}), which gives every batch once: tracing, calibration and "
            "analyses take batches that are missing in the run then. Give the Trainer a DataLoader, or an object whose "
            "__iter__ starts again."
        )


def run_step(trainer: pl.Trainer, pl_module: pl.LightningModule, extra: ExtraBatch, stage: str = "validate") -> Any:
    """Run the step of a stage on one batch; without that step, or if it cannot read the batch, another one.

    The module's hooks around evaluation steps run too, as steps depend on what they prepare (callbacks' hooks do not).
    Autocast is as in the run; gradients are not tracked unless ``stage`` is ``train``. Calls that only manual
    optimization makes (``self.optimizers()``, ``self.manual_backward()``) do nothing.
    """
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


def transferred(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, dataloader_idx: int, stage: str) -> Any:
    """Send a batch the way Lightning's loops do: precision, hooks, device."""
    with _compat.running_stage(trainer, stage):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = _compat.before_transfer(pl_module, batch, dataloader_idx)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
