"""Keep the scales of all ranks the same."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import lightning.pytorch as pl
import torch

from lightning_qat.callbacks.schedule.learned_scales import named_scales
from lightning_qat.quantization import ranks
from lightning_qat.quantization.region.region import Region, find_regions

_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


def hide_from_ddp(pl_module: pl.LightningModule) -> None:
    """Let DistributedDataParallel leave learned scales alone; :func:`average_gradients` takes its place.

    DDP fails when a parameter gets no gradient in a step: scales in a branch that was not taken, before a ``detach``,
    or of an epoch that trains in float.
    """
    parameters = dict(pl_module.named_parameters())
    scales = {id(scale) for _, scale in named_scales(find_regions(pl_module))}
    ours = {name for name, p in parameters.items() if id(p) in scales}
    if any(p.requires_grad for name, p in parameters.items() if name not in ours):  # DDP wants at least one
        setattr(pl_module, _DDP_IGNORES, sorted({*getattr(pl_module, _DDP_IGNORES, ()), *ours}))


def show_to_ddp(pl_module: pl.LightningModule) -> None:
    """Undo :func:`hide_from_ddp`."""
    ignored = getattr(pl_module, _DDP_IGNORES, ())
    scales = {id(scale) for _, scale in named_scales(find_regions(pl_module))}
    ours = {name for name, p in pl_module.named_parameters() if id(p) in scales}
    if ignored:
        setattr(pl_module, _DDP_IGNORES, [name for name in ignored if name not in ours])


def average_gradients(regions: Iterable[Region]) -> None:
    """Average the gradients of learned scales over ranks, in one reduction. A scale without any gradient keeps none.

    Gradients that were averaged before, such as those of earlier accumulated batches, do not change.
    """
    scales = [scale for _, scale in named_scales(dict(enumerate(regions)))]
    if not scales or ranks.count() == 1:
        return
    present = torch.tensor([float(s.grad is not None) for s in scales], device=scales[0].device)
    parts = [(s.grad if s.grad is not None else torch.zeros_like(s)).detach().reshape(-1) for s in scales]
    means = ranks.averaged(torch.cat([*parts, present]))
    *gradients, counts = means.split([*(p.numel() for p in parts), len(scales)])
    for scale, gradient, count in zip(scales, gradients, counts.tolist(), strict=True):
        if count:
            scale.grad = gradient.reshape(scale.shape).clone()


def average_scales(regions: Iterable[Region], updates: Collection[str]) -> None:
    """Average the scales of activations that have followed this rank's batch over ranks."""
    for region in regions:
        if region.switches.first_scales:
            region.scales.agree_on_first(updates)
        if "activation" in updates:
            region.scales.synchronize()
