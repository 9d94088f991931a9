"""A pass over sampled batches, between epochs, that leaves no trace; all analysing callbacks use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_qat.callbacks.passes.extra_batches import extra_batches
from lightning_qat.callbacks.passes.run_step import run_step
from lightning_qat.callbacks.preservation.undisturbed import undisturbed, undisturbed_forwards
from lightning_qat.callbacks.quantized_run import require_regions
from lightning_qat.callbacks.trainer.misconfiguration import misconfiguration
from lightning_qat.callbacks.trainer.seeding import seeded
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.region.switches import State


@contextmanager
def undisturbed_analysis(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    who: str,
    state: State = "quantize",
    seed: int = 0,
    steps: bool = True,
) -> Iterator[dict[str, Region]]:
    """Prepare an analysis in the middle of training: nothing logs, nothing is changed, everything is in eval mode.

    The random state is seeded, so every analysis of a run draws the same batches (and augments them in the same way):
    results of different epochs can be compared.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        who: the callback, for messages.
        state: of all regions, with no scale moving.
        seed: of the random state; each rank adds its number.
        steps: whether the module's steps will run. If not, less is put back: the analysis functions restore modes,
            buffers and random numbers themselves.

    Returns:
        The regions by the path of their target.
    """
    regions = require_regions(trainer, pl_module, who)
    with ExitStack() as stack:
        stack.enter_context(misconfiguration())
        stack.enter_context(undisturbed(trainer, pl_module) if steps else undisturbed_forwards(pl_module))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for region in regions.values():
            stack.enter_context(region.state(state, updates=()))
        if steps:
            stack.enter_context(seeded(seed + trainer.global_rank))
            pl_module.eval()
        yield regions


def sampled_steps(trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int) -> Iterator[Callable[[], Any]]:
    """Yield, for each of some sampled batches, a function that runs the module's step on it."""
    for extra in extra_batches(trainer, pl_module, batches, "calibration"):
        yield partial(run_step, trainer, pl_module, extra, "validate")
