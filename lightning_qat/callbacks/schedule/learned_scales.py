"""What learned scales need from a training run: an optimizer that has them, with steps that are small enough."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import nn

from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.region.regions import find_regions

_GROUPS = (
    "torch.optim.AdamW(lightning_qat.parameter_groups(self, lr=self.lr), lr=self.lr) in configure_optimizers, in place "
    "of self.parameters()"
)


def check_optimizers(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Check that the optimizers have the learned scales.

    Raises:
        MisconfigurationException: a learned scale is in no optimizer and would never be learned.
    """
    group_of = {id(p): group for group in _groups(trainer) for p in group["params"]}
    decayed, missing = [], []
    for name, scale in named_scales(find_regions(pl_module)):
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
    """Warn if Adam's steps are as large as the scales; they do not depend on the size of the gradient."""
    lr_of = {
        id(p): float(group.get("initial_lr", group.get("lr", 0.0)))
        for group in _groups(trainer)
        if "betas" in group
        for p in group["params"]
    }
    small = []
    for name, scale in named_scales(find_regions(pl_module)):
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
    """Stop or resume learned scales. Optimizers skip a parameter without gradient, momentum included."""
    for region in regions:
        points = region.points
        for name, scale in region.learned_scales.items():
            if not points[name].frozen:
                scale.requires_grad_(not frozen)
                scale.grad = None if frozen else scale.grad


def named_scales(regions: Mapping[Any, Region]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the learned scales of regions, each with the name of its point behind the path of the region."""
    for path, region in regions.items():
        for name, scale in region.learned_scales.items():
            yield f"{path}:{name}" if path else name, scale


def _groups(trainer: pl.Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
