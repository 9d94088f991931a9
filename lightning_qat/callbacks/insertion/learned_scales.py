"""What learned scales need from a training run: an optimizer that has them, and gradients that agree on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import nn

from lightning_qat.quantization import ranks
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.region.regions import find_regions

_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
_GROUPS = (
    "torch.optim.AdamW(lightning_qat.parameter_groups(self, lr=self.lr), lr=self.lr) in configure_optimizers, in place "
    "of self.parameters()"
)


def check_optimizers(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Look for learned scales in the optimizers.

    Raises:
        MisconfigurationException: no optimizer has one of them, so that it would never be learned.
    """
    group_of = {id(p): group for group in _groups(trainer) for p in group["params"]}
    decayed, missing = [], []
    for name, scale in _learned(find_regions(pl_module)):
        group = group_of.get(id(scale))
        if group is None and scale.requires_grad:
            missing.append(name)
        elif group is not None and group.get("weight_decay"):
            decayed.append(name)
    if missing:
        raise MisconfigurationException(
            f"no optimizer has the learned scales ({len(missing)}, such as that of {missing[0]}): it was built from "
            f"other parameters, or before fake-quant was inserted. Write {_GROUPS}; or learn no scales: "
            'weight_scales="updated", activation_scales="fixed".'
        )
    if decayed:
        rank_zero_warn(
            f"weight decay pulls {len(decayed)} learned scales to zero (such as that of {decayed[0]}): leave them out "
            f"of it. Write {_GROUPS}.",
            category=PossibleUserWarning,
        )


def warn_about_step_size(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Say that Adam's steps, which do not depend on the size of the gradient, are as large as the scales."""
    lr_of = {
        id(p): float(group.get("initial_lr", group.get("lr", 0.0)))
        for group in _groups(trainer)
        if "betas" in group
        for p in group["params"]
    }
    small = []
    for name, scale in _learned(find_regions(pl_module)):
        smallest = float(scale.detach().min())
        if lr_of.get(id(scale), 0.0) > smallest / 2:
            small.append((smallest, name))
    if small:
        smallest, name = min(small)
        rank_zero_warn(
            f"learned scales that are less than 2 steps of the optimizer from zero: {len(small)}, the smallest of them "
            f"{smallest:.2g} ({name}). Adam moves a parameter by about its learning rate, however small it is: lower "
            "that with lightning_qat.parameter_groups(self, lr=self.lr, scale_lr_factor=...), or do not learn the "
            "scales of wide types such as int16.",
            category=PossibleUserWarning,
        )


def freeze_learned(regions: Iterable[Region], frozen: bool) -> None:
    """Let learned scales stand still, or go on. Optimizers skip a parameter without gradient, momentum included."""
    for region in regions:
        points = region.points
        for name, scale in region.learned_scales.items():
            if not points[name].frozen:
                scale.requires_grad_(not frozen)
                scale.grad = None if frozen else scale.grad


def hide_from_ddp(pl_module: pl.LightningModule) -> None:
    """Let DistributedDataParallel leave learned scales alone; :func:`average_gradients` takes its place.

    DDP fails when a parameter gets no gradient in a step: scales in a branch that was not taken, before a ``detach``,
    or of an epoch that trains in float.
    """
    parameters = dict(pl_module.named_parameters())
    scales = {id(scale) for _, scale in _learned(find_regions(pl_module))}
    ours = {name for name, p in parameters.items() if id(p) in scales}
    if any(p.requires_grad for name, p in parameters.items() if name not in ours):  # DDP wants at least one
        setattr(pl_module, _DDP_IGNORES, sorted({*getattr(pl_module, _DDP_IGNORES, ()), *ours}))


def show_to_ddp(pl_module: pl.LightningModule) -> None:
    """Undo :func:`hide_from_ddp`."""
    ignored = getattr(pl_module, _DDP_IGNORES, ())
    scales = {id(scale) for _, scale in _learned(find_regions(pl_module))}
    ours = {name for name, p in pl_module.named_parameters() if id(p) in scales}
    if ignored:
        setattr(pl_module, _DDP_IGNORES, [name for name in ignored if name not in ours])


def average_gradients(regions: Iterable[Region]) -> None:
    """Average the gradients of learned scales over ranks, in one reduction; what no rank has stays without.

    Gradients that are averaged already, as those of earlier accumulated batches, are not changed by it.
    """
    scales = [scale for _, scale in _learned(dict(enumerate(regions)))]
    if not scales or ranks.count() == 1:
        return
    present = torch.tensor([float(s.grad is not None) for s in scales], device=scales[0].device)
    parts = [(s.grad if s.grad is not None else torch.zeros_like(s)).detach().reshape(-1) for s in scales]
    means = ranks.averaged(torch.cat([*parts, present]))
    *gradients, counts = means.split([*(p.numel() for p in parts), len(scales)])
    for scale, gradient, count in zip(scales, gradients, counts.tolist(), strict=True):
        if count:
            scale.grad = gradient.reshape(scale.shape).clone()


def _groups(trainer: pl.Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def _learned(regions: dict[Any, Region]) -> Iterator[tuple[str, nn.Parameter]]:
    for path, region in regions.items():
        for name, scale in region.learned_scales.items():
            yield f"{path}:{name}" if path else name, scale
