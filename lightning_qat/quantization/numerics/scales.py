"""From a range to scale and zero point."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FLOAT32_MAX = torch.finfo(torch.float32).max
MIN_SCALE = 2.0**-126
"""The smallest scale, the smallest normal float32: below it digits are lost."""

ZERO_RANGE_SCALE = torch.tensor(1e-7).item()
"""The scale of data that are all zero. Their true scale would be 0; this is about the epsilon of float32."""


def scale_from_range(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, scheme: str = "symmetric"
) -> tuple[Tensor, Tensor]:
    """Turn ranges of values into scales and zero points.

    Symmetric: ``scale = max(-low, high) / quant_max`` (for an unsigned type ``high / quant_max``), zero point 0.
    Affine: the range is extended to contain zero, ``scale = (high - low) / (quant_max - quant_min)`` and ``zero_point
    = quant_min - round(low / scale)``, so zero is represented exactly. Scales are kept normal and small enough that
    every code times the scale is finite; an empty range gives :data:`ZERO_RANGE_SCALE`.

    Args:
        low: Lower ends, ``(channels,)``.
        high: Upper ends, ``(channels,)``.
        quant_min: Smallest code.
        quant_max: Largest code.
        scheme: ``symmetric`` or ``affine``.

    Returns:
        The scale, float32, and the zero point, int32, of the shape of ``low``.

    Example:
        >>> scale, zero_point = scale_from_range(torch.tensor([-1.0]), torch.tensor([3.0]), 0, 255, "affine")
        >>> round(scale.item(), 6), zero_point.item()
        (0.015686, 64)
    """
    low, high = low.double(), high.double()
    if scheme == "affine":
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        extent, steps, largest = high - low, quant_max - quant_min, quant_max - quant_min
    else:
        extent = (torch.maximum(-low, high) if quant_min < 0 else high).clamp(min=0.0)
        steps, largest = quant_max, max(quant_max, -quant_min)
    scale = (extent / steps).clamp(MIN_SCALE, greatest_scale(largest)).float()
    scale = torch.where(extent == 0, ZERO_RANGE_SCALE, scale)
    if scheme != "affine":
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = (quant_min - (low / scale.double()).round()).clamp(quant_min, quant_max)
    return scale, zero_point.to(torch.int32)


def scale_from_numbers(
    low: float, high: float, quant_min: int, quant_max: int, scheme: str = "symmetric"
) -> tuple[float, int]:
    """Compute :func:`scale_from_range` for a single finite range without tensors, in a hundredth of the time.

    Returns:
        The scale, which still has to be rounded to float32, and the zero point.

    Example:
        >>> scale_from_numbers(-1.0, 3.0, 0, 255, "affine") == (4 / 255, 64)
        True
    """
    if scheme == "affine":
        low, high = min(low, 0.0), max(high, 0.0)
        extent, steps, largest = high - low, quant_max - quant_min, quant_max - quant_min
    else:
        extent = max(-low, high, 0.0) if quant_min < 0 else max(high, 0.0)
        steps, largest = quant_max, max(quant_max, -quant_min)
    scale = min(max(extent / steps, MIN_SCALE), greatest_scale(largest)) if extent else ZERO_RANGE_SCALE
    if scheme != "affine":
        return scale, 0
    rounded = ctypes.c_float(scale).value
    return scale, min(max(quant_min - round(low / rounded), quant_min), quant_max)


def relative_range(ends: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor], signed: bool | None) -> Tensor:
    """Return a range relative to another, ``(2, channels)``; 1 where an end of that other is zero.

    Args:
        ends: lower and upper ends, ``(channels,)``.
        whole: those of the other range.
        signed: whether a symmetric type has negative codes; None for an affine scheme, whose ends are two numbers.

    Example:
        >>> one = torch.ones(1)
        >>> relative_range((-one, 3 * one), (-2 * one, 4 * one), signed=None).flatten().tolist()
        [0.5, 0.75]
    """

    def bounds(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if signed is None:
            return low, high
        bound = torch.maximum(-low, high) if signed else high
        return bound, bound

    ratios = [a / b for a, b in zip(bounds(*ends), bounds(*whole), strict=True)]
    return torch.stack([torch.where(r.isfinite() & (r > 0), r, 1.0) for r in ratios])


def greatest_scale(largest: int) -> float:
    """The greatest scale whose product with the code ``largest`` is finite."""
    # Rounding to float32 might exceed it by half a unit: take one unit off.
    return min(2.0**126, FLOAT32_MAX / largest) * (1 - 2.0**-23)


MAX_SCALE = greatest_scale(1)
"""The greatest scale that a point may have with any type."""


def packed_ratios(ratio: Tensor, ema_ratio: Tensor) -> dict[str, list[list[float]]]:
    """Return two results of :func:`relative_range` for a checkpoint: nothing that is 1 or the same twice.

    Example:
        >>> packed_ratios(torch.full((2, 1), 0.5), torch.full((2, 1), 0.5))
        {'ratio': [[0.5]]}
    """
    if torch.equal(ratio, ema_ratio):
        return {"ratio": _rows(ratio)} if bool((ratio != 1).any()) else {}
    return {"ratio": _rows(ratio), "ema_ratio": _rows(ema_ratio)}


def ratios_of(state: Mapping[str, Any], shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the two tensors of :func:`packed_ratios`, or those that a checkpoint of an earlier release holds.

    Args:
        state: with the entries ``ratio`` and ``ema_ratio``, or some of them.
        shape: of each tensor.
    """
    ratio = state.get("ratio", 1.0)
    found = (torch.as_tensor(r, dtype=torch.float64, device="cpu") for r in (ratio, state.get("ema_ratio", ratio)))
    with torch.inference_mode(False):
        one, other = (r.expand(shape).clone() for r in found)
    return one, other


def _rows(ratio: Tensor) -> list[list[float]]:
    return ratio.unique_consecutive(dim=0).tolist()  # type: ignore[no-any-return]
