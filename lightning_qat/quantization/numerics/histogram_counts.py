"""The counts of a histogram: in wider bins, and in few bytes for a checkpoint."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.packed_text import pack_text, unpack_text

_COUNT = np.dtype("<i8")


def grown(counts: Tensor, doublings: Tensor) -> Tensor:
    """Return the counts after every row's bin width was doubled ``doublings`` times, as exact as before.

    Args:
        counts: int64 ``(channels, 2 * bins)``, as a histogram has them.
        doublings: int64 ``(channels,)``.
    """
    result = counts.clone()
    bins = counts.shape[1] // 2
    for times in doublings.unique().tolist():
        if times == 0:
            continue
        rows = doublings == times
        factor = 1 << min(times, bins.bit_length() - 1)
        positive = counts[rows, bins:]
        negative = counts[rows, :bins].flip(1).roll(1, dims=1)  # column = |index|; column 0 was the empty one
        wider = torch.zeros_like(result[rows])
        positive = positive.reshape(len(positive), -1, factor).sum(-1)
        negative = negative.reshape(len(negative), -1, factor).sum(-1)
        positive[:, 0] += negative[:, 0]
        wider[:, bins : bins + positive.shape[1]] = positive
        wider[:, bins - negative.shape[1] + 1 : bins] = negative[:, 1:].flip(1)
        result[rows] = wider
    return result


def packed(counts: Tensor, limit: int) -> tuple[str, int]:
    """Return counts as a compressed text, in bins so wide that it fits.

    The histogram itself could have come to these wider bins, by one more value that is larger: the counts stay exact.

    Args:
        counts: int64 ``(channels, 2 * bins)``.
        limit: characters at most. A text is longer only if even four bins per side need more.

    Returns:
        The text, and how often the width of all bins was doubled.

    Example:
        >>> counts = torch.ones(1, 4096, dtype=torch.int64)
        >>> counts[0, 0] = 0
        >>> text, doublings = packed(counts, 40)
        >>> torch.equal(unpacked(text, (1, 4096)), grown(counts, torch.tensor([doublings])))
        True
    """
    text, doublings = _text(counts), 0
    bins = counts.shape[1] // 2
    farthest = int((counts.any(dim=0).nonzero() - bins).abs().max()) if bool(counts.any()) else 0
    most = max(0, farthest.bit_length() - 2)
    while len(text) > limit and doublings < most:
        # half the bins have more than half the text
        step = min(max(1, int(math.log2(len(text) / limit))), most - doublings)
        counts = grown(counts, torch.full((len(counts),), step))
        text, doublings = _text(counts), doublings + step
    return text, doublings


def unpacked(text: str, shape: tuple[int, int]) -> Tensor:
    """Return the counts of :func:`packed`.

    Raises:
        ConfigurationError: the text is damaged.
    """
    planes = unpack_text(text, math.prod(shape) * _COUNT.itemsize)
    if len(planes) != math.prod(shape) * _COUNT.itemsize:
        raise ConfigurationError(f"the stored histogram has not {shape[0]} x {shape[1]} bins: use another checkpoint.")
    rows = np.frombuffer(planes, np.uint8).reshape(_COUNT.itemsize, -1).T
    return torch.from_numpy(np.ascontiguousarray(rows).reshape(-1).view(_COUNT).reshape(shape).astype(np.int64))


def _text(counts: Tensor) -> str:
    """All lowest bytes of the counts come first, then the next ones: the higher ones are nearly all zero."""
    planes = counts.numpy().astype(_COUNT).reshape(-1).view(np.uint8).reshape(-1, _COUNT.itemsize).T
    return pack_text(planes.tobytes())
