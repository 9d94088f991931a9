"""What there is to compare after a run: tensors, scales, files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.quantization.region.region import find_regions


def only_region(module: nn.Module) -> Any:
    (region,) = find_regions(module).values()
    return region


def scales(module: nn.Module) -> dict[str, Tensor]:
    """Every scale of a module, copied."""
    return {
        f"{path}:{name}": point.scale.clone()
        for path, region in find_regions(module).items()
        for name, point in region.points.items()
    }


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a module's state, copied."""
    return {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def assert_same(one: Any, other: Any) -> None:
    """The same names in the same order and, bit for bit, the same values, however deep."""
    found = list(differences(one, other))
    assert not found, found


def differences(
    one: Any, other: Any, path: str = "", equal: Callable[[Tensor, Tensor], bool] = torch.equal
) -> Iterator[str]:
    """Where two nested values differ, as paths.

    Args:
        one: dicts, lists and tuples of tensors and plain values.
        other: what to compare with.
        path: of these values.
        equal: decides for two tensors.
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if not equal(one, other):
            yield path
    elif isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        for key in one:
            yield from differences(one[key], other[key], f"{path} {key}", equal)
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{path} {index}", equal)
    elif isinstance(one, (Tensor, dict)) or isinstance(other, (Tensor, dict)) or one != other:
        yield path


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
