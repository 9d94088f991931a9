"""Training a copy of the module for a few batches, with the run's own loaders, optimizer and clipping.

The copy shares nothing with the run, so there is nothing to put back but the random state and the metrics.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_qat.analysis.pipeline import Finetune, Measurement
from lightning_qat.callbacks.evaluation import evaluate
from lightning_qat.callbacks.extra_pass import ExtraBatch, analysis_batches, muted_logging, run_step, undisturbed
from lightning_qat.quantization.region import REGION_NAME, State, Updates, find_regions


def measure(
    trainer: pl.Trainer, pl_module: pl.LightningModule, limit: float, module: pl.LightningModule | None = None
) -> Measurement:
    """Evaluate as validation does."""
    evaluation = evaluate(trainer, pl_module, limit=limit, module=module)
    return Measurement(evaluation.metrics, evaluation.standard_errors)


def finetune_copy(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    *,
    batches: int,
    eval_batches: float,
    state: State,
    zero_lr: bool,
    freeze_batch_norm: bool = False,
    updates: tuple[Updates, ...] = (),
    advance: Callable[[], Any] = lambda: None,
) -> Finetune:
    """Finetune a copy and evaluate it.

    Args:
        trainer: the running trainer, after its optimizers were set up.
        pl_module: its module, which is not changed.
        batches: training batches on this rank.
        eval_batches: validation batches on this rank.
        state: state of the copy's fake-quants.
        zero_lr: set every learning rate to 0; schedulers are not stepped, so none can raise it.
        freeze_batch_norm: batch norm in eval mode while training.
        updates: which scales follow the data.
        advance: called after each batch.

    Raises:
        MisconfigurationException: the module uses manual optimization, whose steps would reach the run's optimizers.
    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} uses manual optimization: its training step would step the optimizers of the "
            "run, "
            "not those of a copy. This check needs automatic optimization."
        )
    with undisturbed(trainer, pl_module):
        twin, optimizers, schedulers = _copied(trainer, pl_module)
        for region in find_regions(twin).values():
            region.set_state(state, updates)
        before = _snapshot(twin)
        if zero_lr:
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = group["lr"] * 0  # keeps a tensor a tensor
            schedulers = []
        losses = _train(trainer, pl_module, twin, optimizers, schedulers, batches, freeze_batch_norm, advance)
        changed = _changed(before, _snapshot(twin))
        after = measure(trainer, pl_module, eval_batches, twin)
    parameters = {name for name, _ in twin.named_parameters()}
    marker = f"{REGION_NAME}.fake_quants."
    return Finetune(
        after=after,
        batches=len(losses),
        train_loss=_mean_over_ranks(trainer, losses),
        changed_parameters=tuple(n for n in changed if n in parameters),
        moved_buffers=tuple(n for n in changed if n not in parameters and marker not in n),
        moved_scales=tuple(
            n.split(marker)[1].rsplit(".", 1)[0].replace("/", ".")
            for n in changed
            if marker in n and n.endswith(".scale")
        ),
    )


def _copied(
    trainer: pl.Trainer, pl_module: pl.LightningModule
) -> tuple[pl.LightningModule, list[Optimizer], list[Any]]:
    """Copy module, optimizers and schedulers in one go, so that the copies refer to each other."""
    configs = [c for c in trainer.lr_scheduler_configs if c.interval == "step" and not c.reduce_on_plateau]
    gradients = [(p, p.grad) for p in pl_module.parameters()]
    try:
        twin, optimizers, schedulers = copy.deepcopy(
            (pl_module, list(trainer.optimizers), [c.scheduler for c in configs])
        )
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    twin.trainer = trainer
    return twin, [_bare(optimizer) for optimizer in optimizers], schedulers


def _bare(optimizer: Any) -> Optimizer:
    """The torch optimizer inside Lightning's wrapper, whose step would go through the strategy."""
    return cast(Optimizer, getattr(optimizer, "_optimizer", optimizer))


def _train(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    twin: pl.LightningModule,
    optimizers: list[Optimizer],
    schedulers: list[Any],
    batches: int,
    freeze_batch_norm: bool,
    advance: Callable[[], Any],
) -> list[float]:
    losses: list[float] = []
    accumulate = max(1, trainer.accumulate_grad_batches)
    twin.train()
    if freeze_batch_norm:
        for module in twin.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    twin.zero_grad()
    with muted_logging(twin), torch.inference_mode(False), torch.enable_grad():
        for extra in _passes(trainer, pl_module, batches):
            output = run_step(trainer, twin, extra, "train")
            loss = output.get("loss") if isinstance(output, dict) else output
            advance()
            if not isinstance(loss, Tensor):
                continue
            losses.append(float(loss.detach()))
            (loss / accumulate).backward()  # type: ignore[no-untyped-call]
            if len(losses) % accumulate == 0:
                _step(trainer, twin, optimizers, schedulers)
    return losses


def _passes(trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int) -> Iterator[ExtraBatch]:
    """Yield training batches, from as many passes over the loader as it takes."""
    taken = -1
    done = 0
    while done < batches and taken != done:
        taken = done
        for extra in analysis_batches(trainer, pl_module, batches - done, "train"):
            done += 1
            yield extra


def _step(trainer: pl.Trainer, twin: pl.LightningModule, optimizers: list[Optimizer], schedulers: list[Any]) -> None:
    if trainer.world_size > 1 and dist.is_initialized():
        for parameter in twin.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= trainer.world_size
    for optimizer in optimizers:
        twin.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings():
        # a copied scheduler cannot see that its copied optimizer was stepped
        warnings.filterwarnings("ignore", message=".*optimizer.step.*")
        for scheduler in schedulers:
            scheduler.step()


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in after.items() if name not in before or not _identical(before[name], tensor)]


def _identical(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def _mean_over_ranks(trainer: pl.Trainer, losses: list[float]) -> float | None:
    if not losses:
        return None
    mean = torch.tensor(sum(losses) / len(losses), device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(mean, reduce_op="mean"))
