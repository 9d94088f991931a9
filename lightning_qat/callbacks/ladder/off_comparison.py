"""Fake-quant that is inserted and off, against the module without it: bit by bit, in both modes (rung 1)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_qat.analysis.ladder.measurements import OffComparison
from lightning_qat.callbacks.ladder.same_values import same_values
from lightning_qat.callbacks.passes.extra_batches import ExtraBatch, extra_batches
from lightning_qat.callbacks.passes.fresh_loaders import Stage
from lightning_qat.callbacks.passes.run_step import loss_of, run_step
from lightning_qat.callbacks.preservation.module_copy import copied_module
from lightning_qat.callbacks.preservation.undisturbed import undisturbed
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.seeding import seeded
from lightning_qat.quantization.modules.module_walk import is_in_region
from lightning_qat.quantization.modules.tensor_leaves import named_leaves
from lightning_qat.quantization.region.region import find_regions

_STAGES: tuple[Stage, ...] = ("train", "validate")


def compare_off(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int = 2, advance: Callable[[], Any] = lambda: None
) -> OffComparison:
    """Run the same batches through a copy with fake-quant off and one from which it was removed.

    The comparison covers the results of every module and of the steps and, in training, the gradients of the weights.

    Args:
        trainer: the running trainer.
        pl_module: its module, which is not changed.
        batches: batches per stage and rank.
        advance: called after each batch.
    """
    with undisturbed(trainer, pl_module):
        inserted = copied_module(pl_module)
        for region in find_regions(inserted).values():
            region.set_state("off", updates=())
        removed = copied_module(inserted)
        for region in list(find_regions(removed).values()):
            region.remove()
        compared, differing, repeatable = 0, dict[str, None](), True
        for stage in _STAGES:
            if _compat.attached_loader(trainer, stage) is None:
                continue
            for extra in extra_batches(trainer, pl_module, batches, stage):
                off, plain, again = (_run(trainer, m, extra, stage) for m in (inserted, removed, removed))
                repeatable = repeatable and all(_equal(plain[name], again.get(name)) for name in plain)
                names = plain.keys() | off.keys()
                compared += len(names)
                differing |= {n: None for n in sorted(names) if not _equal(plain.get(n), off.get(n))}
                advance()
    return OffComparison(compared, tuple(differing), repeatable)


def _run(trainer: pl.Trainer, module: pl.LightningModule, extra: ExtraBatch, stage: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    module.trainer = trainer
    with undisturbed(trainer, module, trains=True), seeded(extra.batch_idx), _results(module, found):
        module.train(stage == "train")
        output = run_step(trainer, module, copy.deepcopy(extra), stage)
        loss = loss_of(output)
        if stage == "train" and loss is not None and loss.requires_grad:
            loss.backward()
        found.update({f"{stage} step {name}".strip(): t.detach().clone() for name, t in named_leaves(output)})
        found.update({f"gradient of {n}": p.grad.clone() for n, p in _weights(module) if p.grad is not None})
    return found


@contextmanager
def _results(module: pl.LightningModule, found: dict[str, Tensor]) -> Iterator[None]:
    """Keep the results of every module; a call more of the same module overwrites them."""
    handles = []

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            for name, tensor in named_leaves(result):
                found[".".join(part for part in (path, name) if part) or "result"] = tensor.detach().clone()

        return hook

    for path, child in module.named_modules():
        if not is_in_region(path):
            handles.append(child.register_forward_hook(keep(path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if not is_in_region(name))


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and same_values(one, other)
