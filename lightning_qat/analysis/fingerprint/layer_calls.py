"""What the layers of a model compute: a sketch of the inputs and outputs of every call of a step.

Two sketches tell how far two tensors lie apart, without the tensors: each value is added, with a random sign, to one of
a few sums. The squared difference of the sums of two tensors is on average the squared distance of the tensors.

Sources:
    M. Charikar, K. Chen, M. Farach-Colton, "Finding frequent items in data streams", ICALP 2002 (count sketch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from lightning_qat.quantization.reading.checks import Check

SUMS = 8
_COMPLETE = Check(lambda sums: len(sums) == SUMS, f"a list of {SUMS} numbers")
MOST_SAMPLES = 8
MOST_VALUES = 2**18
"""A sketch is about the first samples of a tensor: at most so many samples, and values unless one sample has more."""


@dataclass(frozen=True)
class Sketch:
    """A few numbers from which the distance to another tensor of the same shape can be told.

    Args:
        shape: shape of what was looked at: the first samples.
        norm: square root of the sum of the squared values.
        sums: signed sums.
    """

    shape: tuple[int, ...]
    norm: float
    sums: Annotated[tuple[float, ...], _COMPLETE]


@dataclass(frozen=True)
class LayerCall:
    """One call of a module in a step.

    Args:
        name: path of the module.
        inputs: sketches of its tensors, by their path among the arguments.
        outputs: the same of what it returned.
    """

    name: str
    inputs: dict[str, Sketch] = field(default_factory=dict)
    outputs: dict[str, Sketch] = field(default_factory=dict)


class Sketcher:
    """Makes sketches; the random signs and places are the same on every device and in every process.

    Example:
        >>> sketcher, x = Sketcher(), torch.linspace(-1, 1, 1000).reshape(10, 100)
        >>> relative_distance(sketcher.sketch(x), sketcher.sketch(x))
        0.0
        >>> 0.03 < relative_distance(sketcher.sketch(x), sketcher.sketch(1.1 * x)) < 0.3
        True
    """

    def __init__(self) -> None:
        self._signs = torch.zeros(0, dtype=torch.float64)
        self._places = torch.zeros(0, dtype=torch.long)

    def sketch(self, tensor: Tensor) -> Sketch:
        """Return the sketch of the first samples of a tensor."""
        tensor = tensor.detach()
        if tensor.dim():
            size = max(1, tensor[:1].numel())
            tensor = tensor[: max(1, min(MOST_SAMPLES, MOST_VALUES // size))]
        values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        flat = values.reshape(-1).cpu().double()
        signs, places = self._hashed(len(flat))
        sums = torch.bincount(places, flat * signs, minlength=SUMS)
        return Sketch(
            tuple(tensor.shape), _rounded(float(flat.norm())), tuple(_rounded(value) for value in sums.tolist())
        )

    def _hashed(self, count: int) -> tuple[Tensor, Tensor]:
        """Signs and places of the first ``count`` values, by a hash of their index."""
        if count > len(self._signs):
            index = torch.arange(count)
            for factor, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13)):
                index = (index * factor) & 0xFFFFFFFF
                index = index ^ (index >> shift)
            self._signs = 1.0 - 2.0 * (index & 1).double()
            self._places = (index >> 1) % SUMS
        return self._signs[:count], self._places[:count]


def relative_distance(one: Sketch, other: Sketch) -> float:
    """Return the distance of two tensors relative to the longer of them: 0 if they are equal.

    It is an estimate, mostly right within a third. It is infinite if the shapes differ, or if only one is finite.
    """
    if one.shape != other.shape:
        return math.inf
    largest = max(one.norm, other.norm)
    if not (math.isfinite(one.norm) and math.isfinite(other.norm)):
        return 0.0 if str(one.norm) == str(other.norm) else math.inf
    return math.dist(one.sums, other.sums) / largest if largest > 0 else 0.0


def _rounded(value: float) -> float:
    return float(f"{value:.8g}")  # files stay small
