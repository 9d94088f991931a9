"""Blocks that may call the module's steps in the middle of a run, and leave no trace in it.

Lightning has no way to do this: ``trainer.validate()`` inside fit breaks the trainer state, and steps that log
overwrite ``callback_metrics``. So everything that a step can touch is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_qat.callbacks.preservation.module_state import (
    preserved_attributes,
    preserved_loader_state,
)
from lightning_qat.callbacks.preservation.optimizer_state import preserved_optimizers
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.quantization.modules.preservation import preserved, preserved_parameters, replaced_attribute
from lightning_qat.quantization.region.region import find_regions

EVALUATION_HOOKS = (
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_test_start",
    "on_test_epoch_start",
    "on_test_batch_start",
)
"""Hooks of a module that run around its evaluation steps, and may swap weights in."""


@contextmanager
def undisturbed(trainer: pl.Trainer, pl_module: pl.LightningModule, *, trains: bool | None = None) -> Iterator[None]:
    """Run a block that may call the module's steps: no logging, and nothing of the run is changed by it.

    These are put back exactly: random state, train/eval flag of every submodule, buffers, attributes (lists a step
    appends to, torchmetrics), ``log``, the trainer's stage, gradients and whether there are any, settings of
    optimizers and schedulers, attributes of the trainer (``should_stop``) and of the datamodule, the metrics that the
    trainer shows. No scale follows the data meanwhile. Not put back are objects of other classes, unless they hold only
    data, and changes outside of the run: files, servers, globals. Attributes that hold very much data are not copied:
    see :func:`~lightning_qat.callbacks.preservation.module_state.preserved_attributes`.

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
                if parameter.requires_grad != requires_grad:  # hooks freeze and unfreeze
                    parameter.requires_grad_(requires_grad)
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
