"""The counts of a histogram: in wider bins, and in few bytes for a checkpoint."""

from __future__ import annotations

import base64
import math
import zlib

import numpy as np
import torch
from torch import Tensor

from lightning_qat.quantization.errors import ConfigurationError

_COUNT = np.dtype("<i8")


def grown(counts: Tensor, doublings: Tensor) -> Tensor:
    """Return the counts after every row's bin width was doubled ``doublings`` times, as exact as before.

    Args:
        counts: int64 ``(channels, 2 * bins)``, as in a :class:`~lightning_qat.quantization.numerics.histogram.Histogram`.
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
    It is a text because a tensor costs more bytes for its place in a checkpoint than the counts do.

    Args:
        counts: int64 ``(channels, 2 * bins)``.
        limit: characters at most. A text is longer only if even two bins per side need more.

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
    while len(text) > limit and doublings < (counts.shape[1] // 2).bit_length() - 2:
        counts = grown(counts, torch.ones(len(counts), dtype=torch.int64))
        text, doublings = _text(counts), doublings + 1
    return text, doublings


def unpacked(text: str, shape: tuple[int, int]) -> Tensor:
    """Return the counts of :func:`packed`.

    Raises:
        ConfigurationError: the text is damaged.
    """
    size = math.prod(shape) * _COUNT.itemsize
    try:
        planes = zlib.decompressobj().decompress(base64.b85decode(text), size)  # never more than the bins need
        rows = np.frombuffer(planes, np.uint8).reshape(_COUNT.itemsize, -1).T
        counts = np.ascontiguousarray(rows).reshape(-1).view(_COUNT).reshape(shape)
    except (ValueError, zlib.error) as error:
        raise ConfigurationError(f"the stored histogram is damaged ({error}): use another checkpoint.") from error
    return torch.from_numpy(counts.astype(np.int64))


def _text(counts: Tensor) -> str:
    """All lowest bytes of the counts come first, then the next ones: the higher ones are nearly all zero."""
    planes = counts.numpy().astype(_COUNT).reshape(-1).view(np.uint8).reshape(-1, _COUNT.itemsize).T
    return base64.b85encode(zlib.compress(planes.tobytes(), 9)).decode()
