"""From a range to scale and zero point."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SCALE = 2.0**-126
"""The smallest scale: below it, float32 is no longer normal and the inverse overflows."""

ZERO_RANGE_SCALE = torch.tensor(1e-7).item()
"""The scale of data that are all zero. Their true scale would be 0; this is about the epsilon of float32."""


def scale_from_range(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, scheme: str = "symmetric"
) -> tuple[Tensor, Tensor]:
    """Turn ranges of values into scales and zero points.

    Symmetric: ``scale = max(-low, high) / quant_max`` (for an unsigned type ``high / quant_max``), zero point 0.
        Affine: the range is
    extended to contain zero, ``scale = (high - low) / (quant_max - quant_min)`` and ``zero_point = quant_min -
    round(low / scale)``, so zero is represented exactly. Scales are kept normal and small enough that every code times
    the scale is finite; an empty range gives :data:`ZERO_RANGE_SCALE`.

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
    greatest = min(2.0**126, torch.finfo(torch.float32).max / largest)
    # Rounding to float32 might exceed the greatest scale by half a unit: take one unit off.
    greatest *= 1 - 2.0**-23
    scale = (extent / steps).clamp(MIN_SCALE, greatest).float()
    scale = torch.where(extent == 0, ZERO_RANGE_SCALE, scale)
    if scheme != "affine":
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = (quant_min - (low / scale.double()).round()).clamp(quant_min, quant_max)
    return scale, zero_point.to(torch.int32)
