"""The numbers of a validation epoch, without touching the run: ``evaluate(trainer, module) -> Evaluation``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_qat.callbacks import _compat
from lightning_qat.callbacks.extra_pass import (
    ExtraBatch,
    analysis_batches,
    muted_logging,
    run_step,
    undisturbed,
)


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation pass logged.

    Args:
        metrics: every value logged on epoch level, by the name Lightning would give it.
        standard_errors: how much each would vary with other batches of the same size (where that can be told).
        batches: number of batches on this rank.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    batches: int


def evaluate(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    *,
    stage: str = "validate",
    limit: float = float("inf"),
    module: pl.LightningModule | None = None,
) -> Evaluation:
    """Run evaluation steps over fresh loaders with a recording ``self.log`` and return what they log.

    Understands ``on_step``/``on_epoch``, ``batch_size``, ``reduce_fx``, Metric objects and collections, the module's
    epoch-start and epoch-end hooks and several loaders. Values are averaged over ranks. Leaves no trace.

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
    if _compat.attached_loader(trainer, stage) is None:
        stage = next((s for s in ("validate", "test") if _compat.attached_loader(trainer, s) is not None), "train")
    recorder = _Recorder()
    prefix = {"validate": "validation", "test": "test"}.get(stage, "train")
    batches = 0
    with undisturbed(trainer, module), muted_logging(module, recorder.log):
        module.eval()
        for metric in (m for m in module.modules() if isinstance(m, Metric)):
            metric.reset()
        with _compat.running_stage(trainer, stage), torch.inference_mode(False), torch.no_grad():
            getattr(module, f"on_{prefix}_epoch_start")()
            for extra in analysis_batches(trainer, pl_module, limit, stage):  # type: ignore[arg-type]
                recorder.begin(extra)
                run_step(trainer, module, extra, "validate" if stage == "train" else stage)
                recorder.end()
                batches += 1
            recorder.begin(None)
            getattr(module, f"on_{prefix}_epoch_end")()
            metrics, errors = recorder.results(trainer)
    return Evaluation(metrics, errors, batches)


@dataclass
class _Series:
    """One logged name: plain values by batch, or the Metric that accumulates itself."""

    reduce: str | Callable[[Tensor], Tensor] = "mean"
    values: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    metric: Metric | None = None


class _Recorder:
    """Stands in for ``self.log``."""

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}
        self._extra: ExtraBatch | None = None
        self._metrics: dict[str, Metric] = {}

    def begin(self, extra: ExtraBatch | None) -> None:
        self._extra = extra

    def end(self) -> None:
        """After a step: note the batch value of metrics that compute one."""
        for name, metric in self._metrics.items():
            cache = metric._forward_cache
            if cache is not None and torch.is_tensor(cache) and cache.numel() == 1:
                self._series[name].values.append(float(cache))
                self._series[name].weights.append(1.0)
        self._metrics.clear()

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
        """Record a call of ``self.log``; values that are logged per step only are not results of an epoch."""
        if on_epoch is False and on_step:
            return
        if isinstance(value, MetricCollection):
            for key, metric in value.items():
                self.log(key, metric, add_dataloader_idx=add_dataloader_idx, reduce_fx=reduce_fx)
            return
        if add_dataloader_idx and self._extra is not None and self._extra.several_loaders:
            name = f"{name}/dataloader_idx_{self._extra.dataloader_idx}"
        series = self._series.setdefault(name, _Series(_reduction(reduce_fx)))
        if isinstance(value, Metric):
            series.metric = value
            self._metrics[name] = value
            return
        series.values.append(float(value))
        series.weights.append(float(batch_size or self._batch_size()))

    def results(self, trainer: pl.Trainer) -> tuple[dict[str, float], dict[str, float]]:
        """Reduce everything over batches and ranks."""
        metrics: dict[str, float] = {}
        errors: dict[str, float] = {}
        for name, series in self._series.items():
            if series.metric is not None:
                computed = series.metric.compute()
                if not isinstance(computed, Tensor) or computed.numel() != 1:
                    continue
                metrics[name] = float(computed)
            else:
                metrics[name] = _reduced(trainer, series)
            if len(series.values) >= 2 and (series.metric is not None or series.reduce == "mean"):
                values = torch.tensor(series.values, dtype=torch.float64)
                errors[name] = float(values.std()) / math.sqrt(len(values) * trainer.world_size)
        return metrics, errors

    def _batch_size(self) -> int:
        if self._extra is None:
            return 1
        try:
            return int(_compat.extract_batch_size(self._extra.batch))
        except Exception:  # Lightning raises for batches without tensors
            return 1


def _reduction(reduce_fx: Any) -> str | Callable[[Tensor], Tensor]:
    """Name the reduction; a custom callable is applied to the stacked values."""
    named: dict[Any, str] = {torch.mean: "mean", torch.max: "max", torch.min: "min", torch.sum: "sum"}
    named |= {max: "max", min: "min", sum: "sum"}
    if isinstance(reduce_fx, str):
        return {"avg": "mean"}.get(reduce_fx.lower(), reduce_fx.lower())
    chosen: str | Callable[[Tensor], Tensor] = named.get(reduce_fx, reduce_fx)
    return chosen


def _reduced(trainer: pl.Trainer, series: _Series) -> float:
    values = torch.tensor(series.values, dtype=torch.float64)
    weights = torch.tensor(series.weights, dtype=torch.float64)
    across: Callable[..., Any] = trainer.strategy.reduce
    device = trainer.strategy.root_device
    if series.reduce == "mean":
        # float64 is unknown to some accelerators; the sums are small
        both = torch.stack([(values * weights).sum(), weights.sum()]).to(device, torch.float32)
        if trainer.world_size == 1:
            return float((values * weights).sum() / weights.sum())
        total, weight = across(both, reduce_op="sum").tolist()
        return float(total / weight)
    if callable(series.reduce):
        return float(series.reduce(values))
    result = getattr(values, series.reduce)()
    if trainer.world_size > 1:
        result = across(result.to(device, torch.float32), reduce_op=series.reduce)
    return float(result)
