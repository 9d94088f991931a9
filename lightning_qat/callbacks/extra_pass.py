"""Running batches through the user's steps outside the Trainer's loops, without leaving a trace.

Lightning has no way to do this: ``trainer.validate()`` inside fit breaks the trainer state, and steps that log overwrite
``callback_metrics``. So the batches come from fresh loaders, take the way Lightning's loops send them, and everything a
step can touch is put back.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_qat.callbacks import _compat
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.preservation import preserved
from lightning_qat.quantization.region import Region, find_regions

Stage = Literal["train", "validate", "test", "predict", "calibration"]


@dataclass(frozen=True)
class ExtraBatch:
    """A batch on the device of the module, as a step receives it."""

    batch: Any
    batch_idx: int
    dataloader_idx: int
    several_loaders: bool


def require_regions(pl_module: pl.LightningModule, who: str) -> dict[str, Region]:
    """Return the regions of a module.

    Raises:
        MisconfigurationException: there are none, because QuantizationAwareTraining is missing.
    """
    regions = find_regions(pl_module)
    if not regions:
        raise MisconfigurationException(
            f"{who} needs fake-quants in the model: add QuantizationAwareTraining() to the Trainer's callbacks."
        )
    return regions


@contextmanager
def misconfiguration() -> Iterator[None]:
    """Turn the quantization layer's configuration errors into Lightning's."""
    try:
        yield
    except ConfigurationError as error:
        raise MisconfigurationException(str(error)) from error


@contextmanager
def undisturbed(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Run a block that may call the module's steps: no logging, and nothing of the run is changed by it.

    Put back exactly: random state, train/eval flag of every submodule, buffers, torchmetrics, ``log`` and ``log_dict``,
    the trainer's stage, gradients.
    """
    gradients = [(p, p.grad) for p in pl_module.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    with preserved(pl_module), preserved_metrics(pl_module), muted_logging(pl_module):
        stage = trainer.state.stage
        try:
            yield
        finally:
            trainer.state.stage = stage
            for parameter, gradient in gradients:
                parameter.grad = gradient


@contextmanager
def muted_logging(pl_module: pl.LightningModule, log: Callable[..., Any] | None = None) -> Iterator[None]:
    """Replace ``self.log`` and ``self.log_dict`` on the instance: by nothing, or by a recorder."""

    def log_dict(dictionary: Any, *args: Any, **kwargs: Any) -> None:
        if log is not None:
            for name, value in dictionary.items():
                log(name, value, *args, **kwargs)

    replaced = {"log": log or (lambda *args, **kwargs: None), "log_dict": log_dict}
    before = {name: pl_module.__dict__.get(name) for name in replaced}
    pl_module.__dict__.update(replaced)
    try:
        yield
    finally:
        for name, previous in before.items():
            if previous is None:
                pl_module.__dict__.pop(name, None)
            else:
                pl_module.__dict__[name] = previous


@contextmanager
def preserved_metrics(module: nn.Module) -> Iterator[None]:
    """Put back the state of every torchmetrics metric on exit."""
    keep = ("_update_count", "_computed", "_forward_cache", "_is_synced", "_cache", "_to_sync", "_should_unsync")
    saved = []
    for metric in (m for m in module.modules() if isinstance(m, Metric)):
        states = {name: _copied(getattr(metric, name)) for name in metric._defaults}
        saved.append((metric, states, {name: metric.__dict__.get(name) for name in keep}))
    try:
        yield
    finally:
        for metric, states, attributes in saved:
            for name, value in {**states, **attributes}.items():
                object.__setattr__(metric, name, value) if name in keep else setattr(metric, name, value)


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
    loaders, source = _loaders(trainer, pl_module, stage)
    combined = CombinedLoader(loaders, "max_size_cycle" if source == "train" else "sequential")
    with ExitStack() as stack:
        fresh = []
        for loader in combined.flattened:
            loader = _clone(loader)
            stack.enter_context(_preserved_generators(loader))
            fresh.append(_compat.prepared_loader(trainer, loader, source, shuffle=_is_shuffled(loader)))
        combined.flattened = fresh
        allowed = [_compat.batch_limit(trainer, source, _length(loader)) for loader in fresh]
        combined.limits = list(allowed)
        several = len(fresh) > 1 and source != "train"
        end = min(limit, max(allowed, default=0) if source == "train" else sum(allowed))
        for taken, (batch, batch_idx, dataloader_idx) in enumerate(combined):
            if taken >= end:
                break
            # calibration looks at what evaluation will see: no training augmentation on the way to the device
            batch = _transferred(trainer, pl_module, batch, dataloader_idx, "validate" if stage == "calibration" else stage)
            yield ExtraBatch(batch, batch_idx, dataloader_idx, several)


def run_step(trainer: pl.Trainer, pl_module: pl.LightningModule, extra: ExtraBatch, stage: str = "validate") -> Any:
    """Run the step of a stage on one batch; without a validation step, the training step runs.

    Autocast is as in the run; gradients are not tracked unless ``stage`` is ``train``.
    """
    name = {"train": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}[
        stage
    ]
    if not _compat.is_overridden(name, pl_module):
        name = next(
            (n for n in ("validation_step", "test_step", "training_step") if _compat.is_overridden(n, pl_module)), name
        )
    step = getattr(pl_module, name)
    accepted = inspect.signature(step).parameters
    open_ended = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in accepted.values())
    args = [extra.batch]
    if "batch_idx" in accepted or len(accepted) >= 2 or open_ended:
        args.append(extra.batch_idx)
    kwargs = {"dataloader_idx": extra.dataloader_idx} if "dataloader_idx" in accepted and extra.several_loaders else {}
    plugin = trainer.precision_plugin
    context = plugin.train_step_context() if name == "training_step" else plugin.val_step_context()
    tracked = torch.enable_grad() if stage == "train" else torch.no_grad()
    with _compat.running_stage(trainer, stage), torch.inference_mode(False), tracked, context:
        return step(*args, **kwargs)


def _loaders(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> tuple[Any, str]:
    """Return loaders and the stage whose limits and samplers apply to them."""
    functions = {_compat.TrainerFn.VALIDATING: "validate", _compat.TrainerFn.TESTING: "test"}
    running = functions.get(trainer.state.fn, "train") if trainer.state.fn is not None else "train"
    if stage != "calibration":
        loader = _compat.attached_loader(trainer, stage)
        if loader is None:
            raise MisconfigurationException(f"there is no {stage} dataloader to take batches from.")
        return loader, stage
    for owner in (trainer.datamodule, pl_module):  # type: ignore[attr-defined]
        loader = _compat.hook_loader(owner, "calibration_dataloader")
        if loader is not None:
            return loader, running
    if running == "train":
        loader = _compat.attached_loader(trainer, "train")
        if loader is not None:
            return loader, "train"
    for owner in (trainer.datamodule, pl_module):  # type: ignore[attr-defined]
        try:
            loader = _compat.hook_loader(owner, "train_dataloader")
        except Exception:  # its setup(stage="fit") has not run
            loader = None
        if loader is not None:
            return loader, "train"
    for name in ("validate", "test", "predict"):
        loader = _compat.attached_loader(trainer, name)
        if loader is not None:
            rank_zero_warn(
                f"There is no training data in this {running} run, so calibration uses the {name} data: the result is "
                "optimistic. Give the datamodule a calibration_dataloader()."
            )
            return loader, name
    raise MisconfigurationException(
        "there is no data to trace or calibrate with: pass dataloaders or a datamodule to the Trainer, or give the "
        "datamodule a calibration_dataloader()."
    )


def _transferred(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, dataloader_idx: int, stage: str
) -> Any:
    with _compat.running_stage(trainer, stage):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def _clone(loader: Any) -> Any:
    """A loader of our own: iterating the user's would end the persistent workers of the epoch that uses it."""
    if not isinstance(loader, DataLoader):
        return loader
    clone = copy.copy(loader)
    clone.__dict__["_iterator"] = None
    return clone


@contextmanager
def _preserved_generators(loader: Any) -> Iterator[None]:
    samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
    found = {id(g): g for g in (getattr(o, "generator", None) for o in (loader, *samplers)) if g is not None}
    states = [(g, g.get_state()) for g in found.values() if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _is_shuffled(loader: Any) -> bool:
    return isinstance(getattr(loader, "sampler", None), torch.utils.data.RandomSampler)


def _length(loader: Any) -> float:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return float("inf")


def _copied(state: Any) -> Any:
    return [t.clone() for t in state] if isinstance(state, list) else copy.deepcopy(state)
