"""Every private name of Lightning that this package uses, in one place (lightning 2.6)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.connectors.data_connector import (
    _DataLoaderSource,
    _parse_num_batches,
    _request_dataloader,
    _resolve_overfit_batches,
)
from lightning.pytorch.trainer.connectors.logger_connector.fx_validator import _FxValidator
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.callbacks.trainer.muted_loggers import muted_loggers
from lightning_qat.callbacks.trainer.seeding import seeded
from lightning_qat.quantization.modules.preservation import preserved_random_state

STAGES = {
    "train": RunningStage.TRAINING,
    "validate": RunningStage.VALIDATING,
    "test": RunningStage.TESTING,
    "predict": RunningStage.PREDICTING,
}

ResultCollection = _ResultCollection

__all__ = ["STAGES", "ResultCollection", "RunningStage", "TrainerFn", "is_overridden"]


@contextmanager
def preserved_trainer(trainer: pl.Trainer) -> Iterator[None]:
    """Put back the attributes of the trainer, which a step may ask to stop, and the metrics that it shows."""
    connector = trainer._logger_connector
    metrics = (connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics)
    before = [(owner, dict(owner)) for owner in (*metrics, vars(trainer))]
    try:
        yield
    finally:
        for owner, content in before:
            owner.update(content)
            for name in owner.keys() - content.keys():
                del owner[name]


@contextmanager
def running_stage(trainer: pl.Trainer, stage: str) -> Iterator[None]:
    """Let ``trainer.training``, ``trainer.validating`` ... answer for the step that runs."""
    before = trainer.state.stage
    trainer.state.stage = STAGES[stage]
    try:
        yield
    finally:
        trainer.state.stage = before


def running_function(trainer: pl.Trainer) -> str:
    """Return ``train`` while fitting, else ``validate``, ``test`` or ``predict``."""
    evaluating = {TrainerFn.VALIDATING: "validate", TrainerFn.TESTING: "test", TrainerFn.PREDICTING: "predict"}
    return evaluating.get(trainer.state.fn, "train") if trainer.state.fn is not None else "train"


def attached_loader(trainer: pl.Trainer, stage: str) -> Any | None:
    """Return the loaders of a stage: fresh from their hook, or the instance given to ``fit``/``validate``/``test``."""
    loops: dict[str, list[Any]] = {
        "train": [trainer.fit_loop],
        "validate": [trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop],
        "test": [trainer.test_loop],
        "predict": [trainer.predict_loop],
    }
    for loop in loops[stage]:
        source: _DataLoaderSource = loop._data_source
        if source.instance is not None and source.is_defined():
            return _requested(source)
    return None


def hook_loader(owner: Any, name: str) -> Any | None:
    """Return a fresh loader from the hook ``name`` of a datamodule or module, or None if it has no such hook."""
    if owner is None or not callable(getattr(owner, name, None)):
        return None
    hooks = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
    if name in hooks and not is_overridden(name, owner):
        return None
    if name.startswith(("train", "val", "test", "predict")):
        return _requested(_DataLoaderSource(owner, name))
    with seeded(0):  # a hook that draws random numbers (a random split) gives the same loader each time
        return getattr(owner, name)()


def _requested(source: _DataLoaderSource) -> Any:
    with seeded(0):
        return _request_dataloader(source)


def prepared_loader(trainer: pl.Trainer, loader: Any, stage: str, shuffle: bool) -> Any:
    """Add a distributed sampler where the strategy needs one."""
    loader = trainer._data_connector._prepare_dataloader(loader, shuffle=shuffle, mode=STAGES[stage])
    return trainer.strategy.process_dataloader(loader)


def take_first_batches(combined: CombinedLoader, stage: str) -> None:
    """Turn shuffling off, as ``overfit_batches`` does (which has warned about it already)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You requested to overfit")
        _resolve_overfit_batches(combined, STAGES[stage])


def batch_limit(trainer: pl.Trainer, stage: str, length: float) -> float:
    """Number of batches after ``limit_*_batches``, ``fast_dev_run`` and ``overfit_batches``."""
    name = {"train": "train", "validate": "val", "test": "test", "predict": "predict"}[stage]
    limit = getattr(trainer, f"limit_{name}_batches")
    return float(_parse_num_batches(STAGES[stage], length, limit))


def steps_taken(trainer: pl.Trainer) -> int:
    """The step that Lightning's own loggers use as x-axis."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def call_hook(pl_module: pl.LightningModule, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a hook or step of the module, which knows which one runs (``self.log`` depends on it); loggers are mute."""
    before = pl_module._current_fx_name
    pl_module._current_fx_name = name
    try:
        with muted_loggers(trainer) if (trainer := pl_module._trainer) is not None else nullcontext():
            return getattr(pl_module, name)(*args, **kwargs)
    finally:
        pl_module._current_fx_name = before


def start_hooks(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
    """Return the module's hooks around the start of training that may not have run yet, as no epoch has begun."""
    if trainer.state.fn != TrainerFn.FITTING or trainer.fit_loop.epoch_progress.total.ready:
        return []
    return [name for name in ("on_fit_start", "on_train_start") if is_overridden(name, pl_module)]


def log_levels(pl_module: pl.LightningModule, on_step: bool | None, on_epoch: bool | None) -> tuple[bool, bool]:
    """Return ``on_step`` and ``on_epoch`` as ``self.log`` would take them in the hook that runs."""
    name = running_hook(pl_module)
    return _FxValidator.check_logging_and_get_default_levels(name, on_step=on_step, on_epoch=on_epoch)


def logged_value(pl_module: pl.LightningModule, name: str, value: Any) -> Tensor:
    """Return a logged number as ``self.log`` would keep it."""
    tensor: Tensor = pl_module._LightningModule__to_tensor(value, name)  # type: ignore[operator]
    return tensor


def convert_early(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Convert the module to the dtype of a ``*-true`` precision: batches have it already, Lightning does it later."""
    if isinstance(trainer.precision_plugin, (HalfPrecision, DoublePrecision)):
        trainer.precision_plugin.convert_module(pl_module)


def replaces_batch_norm(trainer: pl.Trainer) -> bool:
    """Whether ``Trainer(sync_batchnorm=True)`` will replace batch norm modules after insertion."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def optimizer_counts(trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[int, int]:
    """How many optimizers and schedulers the module has; they do not exist yet while it is traced."""
    if trainer.optimizers:
        return len(trainer.optimizers), len(trainer.lr_scheduler_configs)
    optimizers, schedulers = _created_optimizers(trainer, pl_module)
    return len(optimizers), len(schedulers)


def optimized_parameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> set[int] | None:
    """Return the identities of the parameters in the module's optimizers; None if they cannot be known yet."""
    optimizers = trainer.optimizers
    if not optimizers and lacks_optimizers(trainer):
        try:
            optimizers, _ = _created_optimizers(trainer, pl_module)
        except Exception:  # it may need what hooks of training prepare
            return None
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def lacks_optimizers(trainer: pl.Trainer) -> bool:
    """Whether this is a fit that has not set up its optimizers yet."""
    return running_function(trainer) == "train" and not trainer.optimizers


@contextmanager
def stand_in_optimizers(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Give the trainer optimizers and schedulers before it has its own, for steps and hooks that look at them."""
    with replaced_optimizers(trainer, *_created_optimizers(trainer, pl_module)):
        yield


@contextmanager
def replaced_optimizers(
    trainer: pl.Trainer, optimizers: list[Optimizer], schedulers: list[LRSchedulerConfig]
) -> Iterator[None]:
    """Replace the trainer's optimizers and schedulers in a block."""
    strategy = trainer.strategy
    names = ("_optimizers", "_lightning_optimizers", "lr_scheduler_configs")
    before = {name: getattr(strategy, name) for name in names}
    strategy.optimizers, strategy.lr_scheduler_configs = optimizers, schedulers
    try:
        yield
    finally:
        vars(strategy).update(before)


def _created_optimizers(
    trainer: pl.Trainer, pl_module: pl.LightningModule
) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """What ``configure_optimizers`` returns. Loaders are set up, as it may ask for the length of the training."""
    loop = trainer.fit_loop
    before = [(owner, dict(vars(owner))) for owner in (trainer, loop, loop.epoch_loop)]
    fetcher = loop._data_fetcher
    try:
        with preserved_random_state():
            return _init_optimizers_and_lr_schedulers(pl_module)
    finally:
        if loop._data_fetcher is not None and loop._data_fetcher is not fetcher:
            loop._data_fetcher.teardown()  # ends its workers
        for owner, attributes in before:
            owner.__dict__.clear()
            owner.__dict__.update(attributes)


def looks_after_each_epoch(stopping: EarlyStopping) -> bool:
    """Whether an EarlyStopping checks its metric when a training epoch ends, not validation. Known after ``setup``."""
    return bool(stopping._check_on_train_epoch_end)


def runs_in_child_processes(trainer: pl.Trainer) -> bool:
    """Whether the strategy trains a copy of the module in other processes (spawn, fork, notebook)."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def bare(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside Lightning's wrapper, whose step would go through the strategy."""
    return cast(Optimizer, getattr(optimizer, "_optimizer", optimizer))


def finds_unused_parameters(strategy: DDPStrategy) -> bool:
    """Whether DistributedDataParallel was told that parameters may get no gradient."""
    return bool(strategy._ddp_kwargs.get("find_unused_parameters"))


def before_transfer(pl_module: pl.LightningModule, batch: Any, dataloader_idx: int) -> Any:
    """Run the module's hook ahead of the transfer to the device."""
    return pl_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)


def transferred_example(pl_module: pl.LightningModule) -> Any:
    """Return ``example_input_array`` with the module's transfer hooks applied."""
    return pl_module._apply_batch_transfer_handler(pl_module.example_input_array)


def mode_of(loader: CombinedLoader) -> str:
    """How the batches of several loaders are put together."""
    return str(loader._mode)


def running_hook(pl_module: pl.LightningModule) -> str:
    """Return the hook or step that :func:`call_hook` runs."""
    return pl_module._current_fx_name or "validation_step"


def averaged_copies(trainer: pl.Trainer) -> list[nn.Module]:
    """Return the modules in which WeightAveraging callbacks keep their averages."""
    return [kept.module for each in listed(trainer, WeightAveraging) if (kept := each._average_model) is not None]


def callbacks_with_model_copies(trainer: pl.Trainer) -> list[WeightAveraging | StochasticWeightAveraging]:
    """Return the callbacks that copy the module in their ``setup``."""
    return [*listed(trainer, WeightAveraging), *listed(trainer, StochasticWeightAveraging)]


def model_copy(callback: WeightAveraging | StochasticWeightAveraging) -> nn.Module | None:
    """Return the copy of the module that a callback has made, if it has made one."""
    return callback._average_model


def drop_model_copy(callback: WeightAveraging | StochasticWeightAveraging) -> None:
    """Let a callback forget its copy of the module."""
    callback._average_model = None
