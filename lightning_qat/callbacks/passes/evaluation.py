"""The numbers of a validation epoch, without touching the run: ``evaluate(trainer, module) -> Evaluation``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_qat.callbacks.passes.extra_batches import ExtraBatch, extra_batches
from lightning_qat.callbacks.passes.run_step import run_step
from lightning_qat.callbacks.preservation.undisturbed import muted_logging, undisturbed
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer._shown_metrics import ShownMetrics


@dataclass(frozen=True)
class Evaluation:
    """What one pass over the evaluation data logged.

    Args:
        metrics: every value logged on epoch level, by the name it has in ``trainer.callback_metrics``.
        standard_errors: standard error of each metric over the batches, where there are enough to estimate it.
        batches: number of batches on this rank.
        samples: number of samples on all ranks; None if a loader does not say.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    batches: int
    samples: int | None = None


def evaluate(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    *,
    stage: str = "validate",
    limit: float = float("inf"),
    module: pl.LightningModule | None = None,
) -> Evaluation:
    """Run evaluation steps over fresh loaders with a recording ``self.log`` and return what they log.

    The numbers are those of ``trainer.validate``: values are kept and reduced by Lightning's own code, and the
    module's hooks run (those of callbacks do not). Meanwhile ``trainer.callback_metrics`` and its siblings show them as
    they would there. Over ranks everything is averaged, as with ``sync_dist=True``.
    Leaves no trace.

    Args:
        trainer: the running trainer.
        pl_module: its module; the loaders come from it.
        stage: ``validate`` or ``test``. A module without that step is evaluated with its training step.
        limit: number of batches on this rank at most.
        module: evaluate this copy of the module instead.

    Raises:
        MisconfigurationException: there is no data.
    """
    module = module or pl_module
    with undisturbed(trainer, module), torch.no_grad():  # asking for loaders may change their owner
        if _compat.attached_loader(trainer, stage) is None:
            stage = next((s for s in ("validate", "test") if _compat.attached_loader(trainer, s) is not None), "train")
        recorder = _Recorder(trainer, module, always_epoch=stage == "train")
        with muted_logging(module, recorder.log), recorder.shown.showing():
            counts = _evaluated(trainer, pl_module, module, recorder, stage, limit)
        samples = trainer.strategy.reduce(
            torch.tensor(sum(math.nan if n is None else n for n in counts), device=trainer.strategy.root_device),
            reduce_op="sum",
        )
    total = None if samples.isnan() else int(samples)
    return Evaluation(recorder.metrics, recorder.standard_errors(), len(counts), total)


def _evaluated(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    module: pl.LightningModule,
    recorder: _Recorder,
    stage: str,
    limit: float,
) -> list[int | None]:
    """Run the steps of a stage and the hooks around them; returns the number of samples of each batch, if known."""
    prefix = {"validate": "on_validation", "test": "on_test"}.get(stage, "")
    counts = []
    module.eval()
    for metric in (m for m in module.modules() if isinstance(m, Metric)):
        metric.reset()
    if stage != "train" and _compat.is_overridden(f"{prefix}_model_eval", module):
        _compat.call_hook(module, f"{prefix}_model_eval")
    for extra in extra_batches(trainer, pl_module, limit, stage):  # type: ignore[arg-type]
        recorder.begin_batch(extra)
        run_step(trainer, module, extra, "validate" if stage == "train" else stage)
        recorder.end_batch()
        counts.append(extra.samples)
    recorder.end_loader()
    if stage != "train":  # the end of a training epoch may step schedulers
        with _compat.running_stage(trainer, stage):
            _compat.call_hook(module, f"{prefix}_epoch_end")
        recorder.end_loader()
    return counts


class _Recorder:
    """Stands in for ``self.log``: the same arithmetic in the same order, in a result collection of its own."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, always_epoch: bool) -> None:
        self._trainer = trainer
        self._module = module
        self._always_epoch = always_epoch
        self._results = _compat.ResultCollection(training=False)
        self.shown = ShownMetrics(trainer, self._results)
        self._index: int | None = None
        self._batch_values: dict[str, list[float]] = {}
        self._batch_metrics: dict[str, Metric] = {}
        self.metrics: dict[str, float] = {}

    def begin_batch(self, extra: ExtraBatch) -> None:
        index = extra.dataloader_idx if extra.several_loaders else None
        if index is not None and index != self._index:
            self.end_loader()
        self._index = index
        self._results.batch, self._results.batch_size, self._results.dataloader_idx = extra.batch, None, index
        self.shown.begin_batch()

    def end_batch(self) -> None:
        """After a step: note the batch value of metrics that compute one."""
        for name, metric in self._batch_metrics.items():
            value: Any = metric._forward_cache
            if isinstance(value, Tensor) and value.numel() == 1:
                self._batch_values.setdefault(name, []).append(float(value))
        self._batch_metrics.clear()
        self.shown.end_batch()
        self._results.batch = self._results.batch_size = None

    def end_loader(self) -> None:
        """After the last batch of a loader and after the epoch: reduce over batches and ranks."""
        self.shown.end_loader()
        reduced = self._results.metrics(on_step=False)["callback"]
        self.metrics.update({name: float(value) for name, value in reduced.items()})
        self._index = self._results.dataloader_idx = None

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[[Any], Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Record a call of ``self.log``. All ranks are averaged, whatever ``sync_dist`` says."""
        on_step, on_epoch = _compat.log_levels(self._module, on_step, on_epoch)
        index = self._index
        shown = f"{name}/dataloader_idx_{index}" if add_dataloader_idx and index is not None else name
        if isinstance(value, Metric):
            self._batch_metrics[shown] = value
        else:
            value = _compat.logged_value(self._module, name, value)
            if reduce_fx in ("mean", "avg", torch.mean) and self._results.batch is not None:
                self._batch_values.setdefault(shown, []).append(float(value))
        self._results.log(
            _compat.running_hook(self._module),
            name,
            value,
            prog_bar=prog_bar,
            logger=True if logger is None else logger,
            on_step=on_step,
            on_epoch=on_epoch or self._always_epoch,
            reduce_fx=reduce_fx,
            sync_dist=self._trainer.world_size > 1 and not rank_zero_only,
            sync_dist_fn=self._trainer.strategy.reduce,
            sync_dist_group=sync_dist_group,
            add_dataloader_idx=add_dataloader_idx,
            batch_size=batch_size,
            rank_zero_only=rank_zero_only,
        )

    def standard_errors(self) -> dict[str, float]:
        """Standard error over batches of every mean; batches are not weighted, so it is an estimate."""
        return {
            name: statistics.stdev(values) / math.sqrt(len(values) * self._trainer.world_size)
            for name, values in self._batch_values.items()
            if len(values) >= 2 and all(map(math.isfinite, values))
        }
