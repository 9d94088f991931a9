"""Several regions of one model: refusing targets that overlap, and freezing parts of several at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.freezing import patterns_by_target
from lightning_qat.quantization.region.region import Region, find_regions


def check_target(module: nn.Module) -> None:
    """Refuse a module that is quantized already, or whose forward cannot be taken over.

    Raises:
        ConfigurationError: it has, or contains, a region; its parameters are sharded; or it is a script module.
    """
    name = type(module).__name__
    regions = find_regions(module)
    if "" in regions:
        raise ConfigurationError(f"{name} already has fake-quants; remove() them first.")
    if regions:
        raise ConfigurationError(
            f"{name} contains quantized regions ({', '.join(regions)}): an op must not be quantized twice. Remove them "
            "first, or leave this target out."
        )
    if any(hasattr(parameter, "placements") for parameter in module.parameters()):  # a DTensor
        raise ConfigurationError(
            f"the parameters of {name} are sharded: what gathers them runs inside its forward and would be taken for "
            "ops of the model. Insert fake-quant first, and call fully_shard afterwards."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ConfigurationError(
            f"{name} is a script module, whose ops cannot be seen: use the module it was made from."
        )


def freeze(regions: Mapping[str, Region], patterns: str | Iterable[str]) -> None:
    """Freeze parts of several regions, see :meth:`Region.freeze`.

    Args:
        regions: the regions by the path of their target, as :func:`find_regions` returns them.
        patterns: relative to each target, or beginning with the path of one (``backbone.*``).

    Raises:
        ConfigurationError: a pattern matches nothing; then nothing is frozen.
    """
    chosen = patterns_by_target({path: region.freezable for path, region in regions.items()}, patterns)
    for path, region in regions.items():
        if chosen[path]:
            region.freeze_selected(chosen[path])
