"""What learned scales need from a training run: an optimizer that has them, with steps that are small enough."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import nn

from lightning_qat.callbacks.trainer.messages import rank_zero_warn
from lightning_qat.quantization.region.region import Region, find_regions


def check_optimizers(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Check that the optimizers have the learned scales.

    Raises:
        MisconfigurationException: a learned scale is in no optimizer and would never be learned.
    """
    group_of = {id(p): group for group in _groups(trainer) for p in group["params"]}
    decayed: dict[str, list[str]] = {}
    missing: dict[str, list[str]] = {}
    regions = find_regions(pl_module)
    for path, region in regions.items():
        for name, scale in named_scales({path: region}):
            group = group_of.get(id(scale))
            if group is None and scale.requires_grad:
                missing.setdefault(path, []).append(name)
            elif group is not None and group.get("weight_decay"):
                decayed.setdefault(path, []).append(name)
    if missing:
        names = [name for found in missing.values() for name in found]
        raise MisconfigurationException(
            f"no optimizer has the learned scales ({len(names)}, such as that of {names[0]}): it was built from "
            f"other parameters, or before fake-quant was inserted. {_advice(trainer, pl_module, list(missing))}; or "
            'learn no scales: weight_scales="updated", activation_scales="fixed".'
        )
    if decayed:
        names = [name for found in decayed.values() for name in found]
        rank_zero_warn(
            f"weight decay pulls {len(names)} learned scales to zero (such as that of {names[0]}): leave them out "
            f"of it. {_advice(trainer, pl_module, list(decayed))}.",
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
    for path, region in find_regions(pl_module).items():
        for name, scale in named_scales({path: region}):
            smallest = float(scale.detach().min())
            if lr_of.get(id(scale), 0.0) > smallest / 2:
                small.append((smallest, name, path))
    if small:
        smallest, name, path = min(small)
        module = f"self.{path}" if path and len(trainer.optimizers) > 1 else "self"
        rank_zero_warn(
            f"learned scales that are less than 2 steps of the optimizer from zero: {len(small)}, the smallest of them "
            f"{smallest:.2g} ({name}). Adam moves a parameter by about its learning rate, however small it is: lower "
            f"that with lightning_qat.parameter_groups({module}, lr=self.lr, scale_lr_factor=...), or do not learn the "
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


def _advice(trainer: pl.Trainer, pl_module: pl.LightningModule, targets: list[str]) -> str:
    """Say what to write in ``configure_optimizers`` for the scales of some targets.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        targets: paths of the targets whose scales are in no optimizer, or decay.
    """
    if len(trainer.optimizers) < 2:
        name = type(trainer.optimizers[0]).__name__ if trainer.optimizers else "AdamW"
        return (
            f"Write torch.optim.{name}(lightning_qat.parameter_groups(self, lr=self.lr), lr=self.lr) in "
            "configure_optimizers, in place of self.parameters()"
        )
    lines = []
    for path in targets:
        target = pl_module.get_submodule(path)
        parameters = {id(p) for p in target.parameters()}
        owned = [
            len(parameters & {id(p) for group in optimizer.param_groups for p in group["params"]})
            for optimizer in trainer.optimizers
        ]
        owners = [number for number, count in enumerate(owned) if count]
        name = f"self.{path}" if path else "self"
        if len(owners) == 1 and path:
            kind = type(trainer.optimizers[owners[0]]).__name__
            lines.append(
                f"The parameters of {path!r} are in optimizer {owners[0]} ({kind}): there, write lightning_qat."
                f"parameter_groups({name}, lr=...) in place of {name}.parameters()"
            )
        else:
            where = f"in optimizers {owners}" if owners else "in none of the optimizers"
            lines.append(
                f"The parameters of {path or 'the whole module'!r} are {where}: name the parts that are deployed, each "
                'of which has one optimizer, such as target: "generator", and write lightning_qat.parameter_groups('
                "self.generator, lr=...) in that optimizer in place of self.generator.parameters()"
            )
    if len(targets) == 1 < len(find_regions(pl_module)) or len(targets) > 1:
        lines.append("If one of the targets is not deployed, leave it out: target: names the others")
    return ". ".join(lines)


def _groups(trainer: pl.Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
