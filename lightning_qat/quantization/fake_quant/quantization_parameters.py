"""Type, scale and zero point of a quantization point, as a module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_qat.quantization.config_values import Scheme
from lightning_qat.quantization.numerics.dtypes import quant_dtype
from lightning_qat.quantization.numerics.scales import (
    ZERO_RANGE_SCALE,
    scale_from_numbers,
    scale_from_range,
)
from lightning_qat.quantization.numerics.split_statistics import repeat_groups

USUAL_MAGNITUDES = (1e-30, 1e30)
"""Between these, no scale has to be limited, whatever the type."""


class QuantizationParameters(torch.nn.Module):
    """Stores the type, scale and zero point of a point, and computes the scale from a range.

    Args:
        dtype: Name of the quantized type.
        scheme: ``symmetric`` or ``affine``.
        scales: Number of scales, ``None`` for one without an axis.
        split_sizes: Lengths of the groups of channels that share a scale, if they do.
        fixed_scale: A scale given by the user, which is never learned.
        narrow_range: Leave out the smallest code of a signed type.

    Attributes:
        scale: Always float32, ``()`` or ``(scales,)``. A buffer; a parameter after :meth:`learn_scale`.
        zero_point: Buffer, int32, of the same shape.
        scale_source: The method the scale came from, ``None`` before there is one.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        dtype: str,
        scheme: Scheme,
        scales: int | None,
        split_sizes: tuple[int, ...] | None,
        fixed_scale: float | None,
        narrow_range: bool,
    ) -> None:
        super().__init__()
        self.scheme: Scheme = scheme
        self.split_sizes = split_sizes
        self.fixed_scale = fixed_scale
        self.narrow_range = narrow_range
        self.scale_source: str | None = None
        self.set_dtype(dtype)
        shape = () if scales is None else (scales,)
        # A buffer born under inference_mode would break the next backward.
        with torch.inference_mode(False):
            self.register_buffer("scale", torch.ones(shape, dtype=torch.float32))
            self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
            # Clip range relative to the whole and to the averaged range of the data; rows: lower and upper end.
            self._ratio = torch.ones(2, scales or 1, dtype=torch.float64, device="cpu")
            self._ema_ratio = self._ratio.clone()

    @property
    def degenerate(self) -> bool:
        """Whether the scale comes from data that were all zero. It is a placeholder that fits no other data."""
        return self.scale_source is not None and bool((self.scale == ZERO_RANGE_SCALE).any())

    @property
    def channel_scale(self) -> Tensor:
        """The scale as it broadcasts along the axis: ``(channels,)`` even where groups of channels share one."""
        return self.scale if self.split_sizes is None else repeat_groups(self.scale, self.split_sizes)

    @property
    def channel_zero_point(self) -> Tensor:
        """The zero point in the shape of :attr:`channel_scale`."""
        return self.zero_point if self.split_sizes is None else repeat_groups(self.zero_point, self.split_sizes)

    @property
    def learned(self) -> bool:
        """Whether the scale is a parameter."""
        return "scale" in self._parameters

    def learn_scale(self, learn: bool = True) -> None:
        """Make the scale a parameter, with the gradient of LSQ, or a buffer again. Its name and its value stay.

        It starts from the calibrated value (the paper starts from ``2 mean(|v|) / sqrt(Q_P)``), so that training starts
        from the model that calibration left. Do this before the optimizer is built; calibration writes the parameter in
        place. A ``fixed_scale`` of the user stays a buffer.

        Args:
            learn: True makes the scale a parameter, False a buffer.
        """
        learn = learn and self.fixed_scale is None
        if learn == self.learned:
            return
        with torch.inference_mode(False):
            scale, zero_point = self.scale.detach().clone(), self.zero_point
            del self.scale, self.zero_point  # to keep the order of the state_dict
            if learn:
                self.scale = torch.nn.Parameter(scale)
            else:
                self.register_buffer("scale", scale)
            self.register_buffer("zero_point", zero_point)

    def set_dtype(self, dtype: str) -> None:
        """Change the type and its codes; the scale stays.

        Raises:
            ConfigurationError: If there is no such quantized type.
        """
        found = quant_dtype(dtype)
        self.dtype = found.name
        self.quant_max = found.quant_max
        self.quant_min = -found.quant_max if self.narrow_range and found.signed else found.quant_min

    def _write_number(self, low: float, high: float, ratio: Tensor) -> None:
        """One range by its ratio, without the small tensors that :meth:`write_range` makes. The result is the same."""
        (low_ratio,), (high_ratio,) = ratio.tolist()
        low, high = low * low_ratio, high * high_ratio
        if math.isfinite(low) and math.isfinite(high):
            scale, zero_point = scale_from_numbers(low, high, self.quant_min, self.quant_max, self.scheme)
            self.scale.fill_(scale)
            self.zero_point.fill_(zero_point)

    def write_range(self, low: Tensor, high: Tensor) -> None:
        """Take scale and zero point from a range, in place. What is not finite changes nothing.

        Args:
            low: smallest values, float64 ``(channels,)``.
            high: largest values, of the same shape.
        """
        scale, zero_point = scale_from_range(low, high, self.quant_min, self.quant_max, self.scheme)
        usable = (low.isfinite() & high.isfinite()).reshape(self.scale.shape).to(self.scale.device)
        present = self.scale.detach()  # in place also where it is a parameter
        present.copy_(torch.where(usable, scale.reshape(present.shape).to(present.device), present))
        if self.scheme == "affine":
            zero_point = zero_point.reshape(self.zero_point.shape).to(self.scale.device)
            self.zero_point.copy_(torch.where(usable, zero_point, self.zero_point))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device, but keep the types: a scale rounded to bfloat16 would be another scale."""
        scale, zero_point = self.scale.detach(), self.zero_point
        with torch.inference_mode(False):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            if self.scale.dtype != torch.float32:
                self.scale.data = scale.to(self.scale.device)  # the same parameter, if it is one
                if self.scale.grad is not None:
                    self.scale.grad.data = self.scale.grad.float()
            if self.zero_point.dtype != torch.int32:
                self.zero_point = zero_point.to(self.zero_point.device)
        return self


def write_magnitudes(
    points: Sequence[QuantizationParameters], magnitudes: Sequence[Tensor]
) -> list[QuantizationParameters]:
    """Take the usual symmetric scales per channel from the largest magnitudes, in few operations for all points.

    Args:
        points: all of types with the same largest code.
        magnitudes: the largest magnitude of each channel, for each point; on the CPU.

    Returns:
        The points whose scale was written: those without a magnitude that is zero, not finite or needs a limit.
    """
    found = torch.cat(list(magnitudes)) * torch.cat([point._ratio for point in points], dim=1)[1]
    low, high = torch.aminmax(found)
    if low.item() > USUAL_MAGNITUDES[0] and high.item() < USUAL_MAGNITUDES[1]:  # not of NaN
        # Rounded once, as the quotient is a float64.
        scales = torch.div(found, points[0].quant_max, out=torch.empty_like(found, dtype=torch.float32))
        torch._foreach_copy_([point.scale for point in points], scales.split([m.numel() for m in magnitudes]))
        return list(points)
    if len(points) == 1:
        return []
    return [point for point, own in zip(points, magnitudes, strict=True) if write_magnitudes([point], [own])]
