"""Walking the modules of a model quickly: small analyses spend much of their time on it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

REGION_NAME = "_quantization"
"""The child of a target that holds everything fake-quant adds to it."""


def is_in_region(name: str) -> bool:
    """Whether a dotted name (of a module, a parameter, a key of a state_dict) names a region or something inside one.

    Example:
        >>> is_in_region("net._quantization.fake_quants"), is_in_region("net.conv.weight")
        (True, False)
    """
    return REGION_NAME in name.split(".")


def modules_and_regions(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``named_modules`` yields, in the same order, without the inside of regions."""
    seen: set[int] = set()
    pending: list[tuple[str, str, nn.Module]] = [("", "", module)]
    while pending:
        path, name, current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield path, current
        if name != REGION_NAME:
            children = [(f"{path}.{n}" if path else n, n, m) for n, m in current._modules.items() if m is not None]
            pending += reversed(children)


def modules_outside_regions(module: nn.Module) -> list[nn.Module]:
    """Return a module and all modules below it, each once, without regions and their contents.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> region = insert(model, (torch.ones(1, 2),))
        >>> [type(m).__name__ for m in modules_outside_regions(model)]
        ['Sequential', 'Linear']
    """
    return [m for path, m in modules_and_regions(module) if not is_in_region(path)]


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of all modules, regions included, with their names in these; in a fixed order.

    A parameter that several modules hold comes several times.

    Example:
        >>> [name for name, _ in own_tensors(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)))]
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    seen: set[int] = set()
    pending: list[nn.Module | None] = [module]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        for tensors in (current._parameters, current._buffers):
            yield from ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
        pending += reversed(current._modules.values())


def has_lazy_tensors(module: nn.Module) -> bool:
    """Whether a module itself is a lazy layer that has not seen an input yet, so that its tensors have no shape.

    Example:
        >>> has_lazy_tensors(nn.LazyLinear(2)), has_lazy_tensors(nn.Linear(2, 2))
        (True, False)
    """
    return isinstance(module, LazyModuleMixin) and bool(module.has_uninitialized_params())
