"""Training a deep copy of a module as the Trainer would train the module itself, in automatic optimization.

The order of hooks is that of Lightning's loops (``training_epoch_loop.py``, ``automatic.py``, ``precision.py``). The
hooks of the module run, on the copy; those of callbacks do not: they hold the state of the run.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_qat.callbacks.ladder.step_sizes import largest_step, parameters_of, relative_update
from lightning_qat.callbacks.passes.extra_batches import ExtraBatch, extra_batches
from lightning_qat.callbacks.passes.run_step import loss_of, mean_loss, run_step
from lightning_qat.callbacks.preservation.module_copy import copied_module
from lightning_qat.callbacks.preservation.rebinding import only_the_copy
from lightning_qat.callbacks.preservation.undisturbed import muted_logging
from lightning_qat.callbacks.schedule.rank_averaging import average_scales
from lightning_qat.callbacks.trainer._compat import bare, replaced_optimizers
from lightning_qat.callbacks.trainer.muted_loggers import muted_loggers
from lightning_qat.quantization import ranks
from lightning_qat.quantization.modules.batch_norms import is_batch_norm
from lightning_qat.quantization.modules.module_walk import is_in_region
from lightning_qat.quantization.region.region import find_regions

_STEPS_MEASURED = 8
"""Steps in which the effect of clipping and the size of the step are looked at."""


class TrainingCopy:
    """A copy of a module with its optimizers and schedulers. They refer to one another and to nothing of the run.

    Args:
        trainer: the running trainer, after its optimizers were set up.
        pl_module: its module. Its submodules keep the train/eval modes they have.
        zero_lr: every step is made with learning rate 0, whatever hooks and schedulers set.
        freeze_batch_norm: batch norm in eval mode while training.

    Attributes:
        module: the copy.
        losses: training loss by batch.
        learning_rates: those of every step, before ``zero_lr``.
        changed_by_optimizer: names of the parameters that a step with ``zero_lr`` changed itself.
        gradient_kept: share of the gradient's length that clipping left, in the first steps.
        step_sizes: largest change of a weight in each of the first steps, relative to the largest of its tensor, and
            without that by weight decay.
        group_updates: by group of weights, the length of the change in each of the first steps, relative to that of the
            weights, and without that by weight decay.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, zero_lr: bool, freeze_batch_norm: bool
    ) -> None:
        self._trainer = trainer
        self._original = pl_module
        memo: dict[int, Any] = {}  # one for all, so that the copies refer to each other
        self.module = copied_module(pl_module, memo)
        self._optimizers = [_copied_optimizer(bare(optimizer), memo) for optimizer in trainer.optimizers]
        self._schedulers = copy.deepcopy(list(trainer.lr_scheduler_configs), memo)
        self.module.trainer = trainer
        # a step may ask for the optimizers, to log their learning rate: never give it those of the run
        schedulers = [config.scheduler for config in self._schedulers]
        self.module.__dict__["optimizers"] = lambda use_pl_optimizer=True: _one_or_all(self._optimizers)
        self.module.__dict__["lr_schedulers"] = lambda: _one_or_all(schedulers) or None
        norms = [m for m in self.module.modules() if is_batch_norm(m)]
        self._frozen = [m for m in norms if freeze_batch_norm or not m.training]
        self._loss_scale = _loss_scale(trainer)
        self._accumulated = 0
        self.losses: list[float] = []
        self.learning_rates: list[float] = []
        self.changed_by_optimizer: set[str] = set()
        self.gradient_kept: list[float] = []
        self.step_sizes: list[float] = []
        self.group_updates: list[list[float]] = []
        self._zero_lr = zero_lr
        self._before_update: dict[str, Tensor] = {}
        self._updated = False
        for optimizer in self._optimizers:
            self._watch(optimizer)

    def begin_anew(self, rates: Sequence[float]) -> None:
        """Let the optimizers begin without a state, and keep these learning rates of the groups of weights."""
        scales = self._scales()
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        own = [group for group in groups if any(id(p) not in scales for p in group["params"])]
        for group, rate in zip(own, rates, strict=True):
            group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
        for optimizer in self._optimizers:
            optimizer.state.clear()
        self._schedulers.clear()

    def _scales(self) -> set[int]:
        return {id(p) for name, p in self.module.named_parameters() if is_in_region(name)}

    def train(self, batches: int, advance: Callable[[], Any]) -> int:
        """Train for ``batches`` batches, in as many passes over the loader as needed; returns how many there were.

        Args:
            batches: batches on this rank.
            advance: called after each batch.

        Raises:
            NotACopyError: the step of the copy calls the original.
        """
        done = 0
        self.module.zero_grad()
        with ExitStack() as stack:
            stack.enter_context(muted_logging(self.module))
            stack.enter_context(muted_loggers(self._trainer))
            stack.enter_context(replaced_optimizers(self._trainer, self._optimizers, self._schedulers))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(warnings.catch_warnings())
            # a copied scheduler cannot see that its copied optimizer was stepped
            warnings.filterwarnings("ignore", message=".*optimizer.step.*")
            epoch = self._trainer.current_epoch
            while done < batches:
                before = done
                extra = None
                for extra in extra_batches(self._trainer, self._original, batches - done, "train"):
                    with only_the_copy(self.module, self._original) if done == 0 else nullcontext():
                        self._train_batch(extra, epoch)
                    done += 1
                    advance()
                if extra is None or done == before:
                    break
                if self._accumulated:  # as Lightning does after the last batch of an epoch
                    self._step(extra.batch_idx, epoch, lambda: None)
                self._step_schedulers("epoch", epoch)
                epoch += 1
        self._share_buffers()
        return done

    def train_loss(self) -> tuple[float | None, float | None]:
        """Return the mean training loss over batches and ranks, and its standard error."""
        return mean_loss(self._trainer, self.losses)

    def _train_batch(self, extra: ExtraBatch, epoch: int) -> None:
        if self.module.on_train_batch_start(extra.batch, extra.batch_idx) == -1:
            return
        for module in self._frozen:
            module.eval()
        outputs: list[Any] = []

        def step_and_backward() -> Tensor | None:
            outputs[:] = [run_step(self._trainer, self.module, extra, "train")]
            return self._backward(outputs[0], extra, epoch)

        accumulate = max(1, self._trainer.accumulate_grad_batches)
        if self.module.automatic_optimization and (extra.batch_idx + 1) % accumulate == 0:
            self._step(extra.batch_idx, epoch, step_and_backward)
        else:
            step_and_backward()
            self._accumulated += 1
        if self._trainer.world_size > 1:
            for region in find_regions(self.module).values():
                average_scales([region], region.updates)
        loss = loss_of(outputs[0]) if outputs else None
        if loss is not None:
            self.losses.append(float(loss.detach()))
        self.module.on_train_batch_end(outputs[0] if outputs else None, extra.batch, extra.batch_idx)

    def _backward(self, output: Any, extra: ExtraBatch, epoch: int) -> Tensor | None:
        loss = loss_of(output)
        if not self.module.automatic_optimization:
            return loss
        if self._accumulated == 0:
            for optimizer in self._optimizers:
                self.module.on_before_zero_grad(optimizer)
                self.module.optimizer_zero_grad(epoch, extra.batch_idx, optimizer)
        if loss is not None:
            scaled = loss * self._loss_scale / max(1, self._trainer.accumulate_grad_batches)
            self.module.on_before_backward(scaled)
            self.module.backward(scaled)
            self.module.on_after_backward()
        return loss

    def _step(self, batch_idx: int, epoch: int, step_and_backward: Callable[[], Tensor | None]) -> None:
        for optimizer in self._optimizers:

            def closure(optimizer: Optimizer = optimizer) -> Tensor | None:
                with torch.enable_grad():
                    loss = step_and_backward()
                self._finish_gradients()
                self.module.on_before_optimizer_step(optimizer)
                clip = self._trainer.gradient_clip_val, self._trainer.gradient_clip_algorithm
                length = self._gradient_length() if len(self.gradient_kept) < _STEPS_MEASURED else 0.0
                self.module.configure_gradient_clipping(optimizer, *clip)
                if 0.0 < length < math.inf:
                    self.gradient_kept.append(self._gradient_length() / length)
                if self._zero_lr and not self._before_update:
                    self._before_update = {n: p.detach().clone() for n, p in self.module.named_parameters()}
                return loss

            self.module.optimizer_step(epoch, batch_idx, optimizer, closure)
        self._accumulated = 0
        self._step_schedulers("step", batch_idx)

    def _gradient_length(self) -> float:
        gradients = [p.grad.detach() for p in self.module.parameters() if p.grad is not None]
        return (
            float(torch.stack([g.double().square().sum().cpu() for g in gradients]).sum().sqrt()) if gradients else 0.0
        )

    def _finish_gradients(self) -> None:
        """Undo the scale of the loss, and average over ranks, as the wrappers around the module would."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if self._loss_scale != 1.0:
            for gradient in gradients:
                gradient /= self._loss_scale
            if not all(bool(gradient.isfinite().all()) for gradient in gradients):
                self._loss_scale /= 2  # too large for float16: skip this step, as a gradient scaler does
                self.module.zero_grad()
        if ranks.count() > 1:
            for parameter in self.module.parameters():
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    parameter.grad.copy_(ranks.averaged(parameter.grad))

    def _step_schedulers(self, interval: str, index: int) -> None:
        for config in self._schedulers:
            # a copy may train longer than a short run: at the last learning rate, where OneCycleLR would raise
            is_over = config.scheduler.last_epoch >= getattr(config.scheduler, "total_steps", math.inf)
            is_due = config.interval == interval and not config.reduce_on_plateau and not is_over
            if is_due and (index + 1) % config.frequency == 0:
                self.module.lr_scheduler_step(config.scheduler, None)

    def _watch(self, optimizer: Optimizer) -> None:
        """Note the learning rates; with ``zero_lr`` set them to 0 around every step, and see what still moves."""
        rates: list[Any] = []
        before: list[Tensor] = []
        scales = self._scales()
        first = len(self.group_updates)
        own = [group for group in optimizer.param_groups if any(id(p) not in scales for p in group["params"])]
        self.group_updates += [[] for _ in own]

        def pre(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            rates[:] = [group.get("lr", 0.0) for group in optimizer.param_groups]
            self.learning_rates += [float(rate) for rate in rates]
            if self._zero_lr:
                for group in optimizer.param_groups:
                    group["lr"] = group.get("lr", 0.0) * 0  # keeps a tensor a tensor
            elif len(self.step_sizes) < _STEPS_MEASURED:
                before[:] = [p.detach().clone() for p in parameters_of(optimizer)]

        def post(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if not self._zero_lr:
                if before:
                    self.step_sizes.append(largest_step(optimizer, before))
                    known = dict(zip(map(id, parameters_of(optimizer)), before, strict=True))
                    for sizes, group in zip(self.group_updates[first:], own, strict=False):
                        sizes.append(relative_update(group, known, scales))
                    before.clear()
                return
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            for name, parameter in self.module.named_parameters() if not self._updated else ():
                if not torch.equal(parameter.detach(), self._before_update[name]):
                    self.changed_by_optimizer.add(name)
            self._updated = True

        optimizer.register_step_pre_hook(pre)
        optimizer.register_step_post_hook(post)

    def _share_buffers(self) -> None:
        """Copy the buffers of rank 0 to every rank, as DDP does."""
        if ranks.count() == 1:
            return
        with torch.no_grad():
            for buffer in self.module.buffers():
                buffer.copy_(ranks.of_first_rank(buffer))


def _copied_optimizer(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """Copy an optimizer with the attributes that ``Optimizer.__getstate__`` forgets (those of LBFGS, SAM ...)."""
    copied = copy.deepcopy(optimizer, memo)
    for name, value in vars(optimizer).items():
        if name not in vars(copied) and name != "step":  # a scheduler has put its own step there, bound to the original
            setattr(copied, name, copy.deepcopy(value, memo))
    return copied


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _loss_scale(trainer: pl.Trainer) -> float:
    """Float16 gradients vanish without the gradient scaler's factor."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
