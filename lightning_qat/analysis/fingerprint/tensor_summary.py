"""Summarize a stream of batches: a few numbers per channel, enough to see that two streams differ."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from lightning_qat.quantization.errors import ConfigurationError, shown
from lightning_qat.quantization.reading.checks import AT_LEAST_ZERO, SHARE

MOST_CHANNELS = 16
MOST_LABELS = 1000
LEAST_GREYS = 128
"""Bytes with so many different values are the pixels of a picture, not classes."""


@dataclass(frozen=True)
class TensorSummary:
    """Statistics of one tensor over batches, per channel where there are few of them.

    Args:
        name: path of the tensor in the batch or among the arguments, such as ``0`` or ``image``.
        dtype: its type.
        shape: its shape without the batch axis; -1 for a length that varies between batches.
        samples: number of samples seen.
        mean: mean per channel; one element if channels are not told apart.
        std: standard deviation per channel, of all values.
        mean_error: standard error of the mean per channel, by the variation of samples.
        min: smallest value per channel.
        max: largest value per channel.
        labels: how often each value occurs; only for integer tensors with few values that are not images.
        constant: share of the samples in which every channel is one value all over; None without several values.

    Raises:
        ConfigurationError: the statistics are not of one number of channels, or a label is not a whole number.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    samples: Annotated[int, AT_LEAST_ZERO]
    mean: tuple[float, ...]
    std: tuple[Annotated[float, AT_LEAST_ZERO], ...]
    mean_error: tuple[Annotated[float, AT_LEAST_ZERO], ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    labels: dict[str, Annotated[int, AT_LEAST_ZERO]] | None = None
    constant: Annotated[float, SHARE] | None = None

    def __post_init__(self) -> None:
        lengths = [len(values) for values in (self.mean, self.std, self.mean_error, self.min, self.max)]
        if len(set(lengths)) > 1:
            raise ConfigurationError(f"mean, std, mean_error, min and max are of {lengths} channels.")
        for label in self.labels or ():
            if not label.removeprefix("-").isdecimal() or len(label) > 20:
                raise ConfigurationError(f"the label {shown(label)} is not a whole number.")


class TensorSummarizer:
    """Accumulates batches of one tensor into a :class:`TensorSummary`.

    Args:
        name: name of the tensor.

    Example:
        >>> summarizer = TensorSummarizer("image")
        >>> summarizer.update(torch.stack([torch.zeros(2, 2, 2), torch.ones(2, 2, 2)]))
        >>> summary = summarizer.result()
        >>> summary.shape, summary.mean, summary.std, summary.mean_error
        ((2, 2, 2), (0.5, 0.5), (0.5, 0.5), (0.5, 0.5))
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._dtype = ""
        self._shape: tuple[int, ...] | None = None
        self._samples: list[Tensor] = []  # means by sample and channel
        self._squares: list[Tensor] = []
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._labels: Counter[str] = Counter()
        self._is_integer = False
        self._constant: list[Tensor] = []  # by sample: is every channel one value all over

    def update(self, tensor: Tensor) -> None:
        """Add a batch; a tensor without axes counts as one sample."""
        tensor = tensor.detach()
        tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
        self._dtype = str(tensor.dtype).removeprefix("torch.")
        self._shape = _common_shape(self._shape, tuple(tensor.shape[1:]))
        self._is_integer = not (tensor.is_floating_point() or tensor.is_complex())
        if tensor.numel() == 0 or tensor.is_complex():
            return
        if self._is_integer and len(self._labels) <= MOST_LABELS:
            values, counts = tensor.unique(return_counts=True)
            self._labels.update({str(int(v)): int(c) for v, c in zip(values.tolist(), counts.tolist(), strict=True)})
        rows = _by_channel(tensor).double().cpu()
        self._samples.append(rows.mean(dim=2))
        self._squares.append(rows.square().mean(dim=2))
        if rows.shape[2] > 1:
            self._constant.append((rows.amin(dim=2) == rows.amax(dim=2)).all(dim=1))
        low, high = rows.amin(dim=(0, 2)), rows.amax(dim=(0, 2))
        same = self._low is not None and self._high is not None and self._low.shape == low.shape
        self._low = torch.minimum(self._low, low) if same and self._low is not None else low
        self._high = torch.maximum(self._high, high) if same and self._high is not None else high

    def result(self) -> TensorSummary:
        """Return the summary of everything added."""
        if not self._samples or self._low is None or self._high is None:
            return TensorSummary(self.name, self._dtype, self._shape or (), 0, (), (), (), (), ())
        channels = self._samples[-1].shape[1]
        means = torch.cat([m for m in self._samples if m.shape[1] == channels])
        squares = torch.cat([s for s in self._squares if s.shape[1] == channels])
        mean = means.mean(dim=0)
        count = len(means)
        error = means.std(dim=0, correction=0) / max(1, count - 1) ** 0.5 if count > 1 else torch.full_like(mean, 0.0)
        is_picture = self._dtype == "uint8" and len(self._labels) >= LEAST_GREYS
        few = self._is_integer and 0 < len(self._labels) <= MOST_LABELS and not is_picture
        return TensorSummary(
            name=self.name,
            dtype=self._dtype,
            shape=self._shape or (),
            samples=count,
            mean=tuple(mean.tolist()),
            std=tuple((squares.mean(dim=0) - mean**2).clamp(min=0).sqrt().tolist()),
            mean_error=tuple(error.tolist()),
            min=tuple(self._low.tolist()),
            max=tuple(self._high.tolist()),
            labels=dict(sorted(self._labels.items(), key=lambda item: int(item[0]))) if few else None,
            constant=float(torch.cat(self._constant).double().mean()) if self._constant else None,
        )


def _common_shape(known: tuple[int, ...] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What shapes have in common; the latest one if they have another number of axes."""
    if known is None or len(known) != len(shape):
        return shape
    return tuple(one if one == other else -1 for one, other in zip(known, shape, strict=True))


def _by_channel(tensor: Tensor) -> Tensor:
    """``(samples, channels, values)``: channels are axis 1 of images and sequences of features, or the last axis."""
    if tensor.dim() >= 3:
        if tensor.shape[1] <= MOST_CHANNELS:
            return tensor.flatten(2)
        if tensor.shape[-1] <= MOST_CHANNELS:
            return tensor.movedim(-1, 1).flatten(2)
    return tensor.reshape(tensor.shape[0], 1, -1)
