"""What errors were measured with, as hashes: the plan, the weights, the data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_qat.quantization.region.region import Region


def hashes_of(regions: Mapping[str, Region]) -> dict[str, str]:
    """Return the SHA-256 of the plan and of the weights of each region.

    Args:
        regions: by the path of the target.
    """
    found = {}
    for path, region in regions.items():
        of = f" of {path!r}" if len(regions) > 1 else ""
        found[f"plan{of}"] = hashlib.sha256(region.plan.to_json(None).encode()).hexdigest()
        found[f"weights{of}"] = hash_of_tensors(region.target.parameters())
    return found


def hash_of_tensors(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the values of tensors, in order, with their types and shapes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
