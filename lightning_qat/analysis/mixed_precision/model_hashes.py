"""What errors were measured with, as hashes: the plan, the weights, the data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_qat.quantization.region.region import Region


def hashes_of(region: Region) -> dict[str, str]:
    """Return the SHA-256 of the plan and of the weights of a region."""
    plan = hashlib.sha256(region.plan.to_json(None).encode()).hexdigest()
    return {"plan": plan, "weights": hash_of_tensors(region.target.parameters())}


def hash_of_tensors(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the values of tensors, in order, with their types and shapes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
