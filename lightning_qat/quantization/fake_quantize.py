"""Fake-quantization: round to the codes of an integer type and back, with a straight-through gradient.

The function :func:`fake_quantize` is the arithmetic; :class:`FakeQuantize` adds what a point of the model keeps: the
statistics of its data, and the scale derived from them. Source of the gradient: Bengio et al., "Estimating or
Propagating Gradients Through Stochastic Neurons for Conditional Computation" (2013); of the arithmetic: the CPU
kernels of ``torch.fake_quantize_per_tensor_affine`` and ``torch.fake_quantize_per_channel_affine``.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_qat.quantization.dtypes import quant_dtype
from lightning_qat.quantization.errors import ConfigurationError, unknown_choice
from lightning_qat.quantization.observers import (
    ZERO_RANGE_SCALE,
    ObserverName,
    PerChannelRange,
    RangeStatistics,
    clip_range,
    scale_from_range,
)

Scheme = Literal["symmetric", "affine"]


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    """Quantize and dequantize: ``(clip(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``.

    The quotient is the product with the inverse of the scale, and ties round to even. On finite input this equals
    torch's operators bit for bit where those do not overflow. NaN stays NaN; infinite and huge values saturate by their
    sign (torch's operators turn NaN, and per channel also ``inf``, into ``quant_min``). float16 and bfloat16 are
    computed in float32 and returned in their own type; float64 is computed in float64 (torch's per-tensor operator
    rounds its result to float32).

    The gradient is handed through where the code before clipping is in range, as in torch, and is zero elsewhere, at
    NaN too. There is no gradient for scale and zero point.

    Args:
        x: Floating-point tensor of any shape and strides; it is not modified. Dense memory formats are kept.
        scale: Positive and normal float32; a single value, or ``(channels,)`` with ``axis``.
        zero_point: The code of zero, in ``quant_min ... quant_max``; int or integer tensor, of the scale's shape. An
            int 0 is faster than a tensor of zeros.
        quant_min: Smallest code.
        quant_max: Largest code.
        axis: The channel axis of ``x``; ``None`` quantizes with one scale.

    Returns:
        A new tensor of the shape and type of ``x``.

    Raises:
        ConfigurationError: If ``x`` is not floating-point, or its axis does not have as many channels as the scale.

    Example:
        >>> fake_quantize(torch.tensor([0.24, 0.25, 0.75, 100.0]), torch.tensor(0.5), 0, -8, 7)
        tensor([0.0000, 0.0000, 1.0000, 3.5000])
    """
    if not x.is_floating_point():
        raise ConfigurationError(f"only floating-point tensors can be quantized, not {x.dtype}: leave this point out.")
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    compiling = torch.compiler.is_compiling()
    if axis is None and x.device.type == "cpu" and not compiling:
        # Numbers read from tensors in CPU memory: this costs nothing, and cannot be stale as a cache of them could.
        s = scale.item() if isinstance(scale, Tensor) else _float32(scale)
        z = int(zero_point.item()) if isinstance(zero_point, Tensor) else zero_point
        if needs_grad:
            return cast(
                Tensor,
                _ScalarFakeQuantize.apply(x, s, quant_min - z, quant_max - z),  # type: ignore[no-untyped-call]
            )
        return _scalar_forward(x, s, quant_min - z, quant_max - z)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    if axis is not None:
        if x.dim() == 0 or x.shape[axis] != scale.numel():
            raise ConfigurationError(
                f"a tensor of shape {tuple(x.shape)} does not have {scale.numel()} channels at axis {axis}."
            )
        shape = [1] * x.dim()
        shape[axis] = -1
        scale = scale.reshape(shape)
        zero_point = zero_point.reshape(shape) if isinstance(zero_point, Tensor) else zero_point
    if needs_grad:
        return cast(
            Tensor,
            _TensorFakeQuantize.apply(x, scale, zero_point, quant_min, quant_max),  # type: ignore[no-untyped-call]
        )
    return _tensor_forward(x, scale, zero_point, quant_min, quant_max)


class _ScalarFakeQuantize(torch.autograd.Function):
    """One scale, on the CPU: four passes forward, and one backward over nothing but the saved input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.range = (_float32(1.0 / scale), low, high)
        return _scalar_forward(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        inverse, low, high = ctx.range
        x, dtype = x.detach(), grad.dtype
        if dtype not in _NATIVE:
            x, grad = x.float(), grad.float()
        lower, upper = _gradient_bounds(inverse, low, high, x.dtype is torch.float64)
        result = torch.ops.aten.hardtanh_backward(grad, x, lower, upper)
        # The vectorized kernel blocks the gradient at NaN, its scalar remainder does not. A sum is the cheapest check.
        if math.isnan(x.sum().item()):
            result = result.masked_fill(x.isnan(), 0.0)
        return result.to(dtype), None, None, None


class _TensorFakeQuantize(torch.autograd.Function):
    """Any number of scales, any device, no synchronization, only primitives: also what ``torch.compile`` captures."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int) -> Tensor:
        inverse = scale.reciprocal()  # not the buffers themselves: they may be updated before the backward
        zero = zero_point.to(torch.float32, copy=True) if isinstance(zero_point, Tensor) else None
        ctx.save_for_backward(x, inverse, zero)
        ctx.range = (quant_min, quant_max)
        return _tensor_forward(x, scale, zero_point, quant_min, quant_max)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, inverse, zero = ctx.saved_tensors
        quant_min, quant_max = ctx.range
        x, dtype = x.detach(), grad.dtype
        if dtype not in _NATIVE:
            x, grad = x.float(), grad.float()
        codes = _codes(x, inverse, zero).nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        # Codes are whole numbers, and the bounds of hardtanh_backward are exclusive. (`where` and a product with a
        # bool mask are several times slower on the CPU.)
        result = torch.ops.aten.hardtanh_backward(grad, codes, quant_min - 1, quant_max + 1)
        return result.to(dtype), None, None, None, None


_NATIVE = (torch.float32, torch.float64)
_ZERO = torch.zeros((), device="cpu")  # whatever the default device is


def _scalar_forward(x: Tensor, scale: float, low: int, high: int) -> Tensor:
    # Clamping to the range less the zero point spares adding and subtracting it; whole numbers below 2**24 are exact.
    work = x if x.dtype in _NATIVE else x.float()
    codes = work.mul(_float32(1.0 / scale)).round_().clamp_(low, high)
    # 0 + scale * codes instead of codes * scale: the result for -0.1 is 0.0 as in torch, not -0.0.
    return torch.add(_ZERO, codes, alpha=scale, out=codes).to(x.dtype)


def _tensor_forward(x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int) -> Tensor:
    zero = zero_point.to(torch.float32) if isinstance(zero_point, Tensor) else (zero_point or None)
    work = x if x.dtype in _NATIVE else x.float()
    codes = _codes(work, scale.reciprocal(), zero).clamp_(quant_min, quant_max)
    if zero is not None:
        codes = codes.sub_(zero)
    return codes.mul_(scale).add_(0.0).to(x.dtype)


def _codes(x: Tensor, inverse: Tensor, zero: Tensor | int | None) -> Tensor:
    """Codes before clipping, in a new tensor."""
    codes = x.mul(inverse).round_()
    return codes if zero is None else codes.add_(zero)


@lru_cache(maxsize=8192)
def _gradient_bounds(inverse: float, low: int, high: int, double: bool) -> tuple[float, float]:
    """The largest value below and the smallest above all ``x`` with ``low <= round(x * inverse) <= high``.

    Multiplication and rounding are monotone, so these two numbers describe torch's gradient mask completely. They are
    searched from a first guess, as the product is itself rounded.
    """
    upper = _first_reaching(_tie_after(high, double), inverse, double)
    lower = -_first_reaching(_tie_after(-low, double), inverse, double)
    return lower, upper


def _tie_after(code: int, double: bool) -> float:
    """The smallest product that rounds to more than ``code``: ties go to the even neighbour."""
    tie = code + 0.5
    return tie if code % 2 else _next(tie, double)


def _first_reaching(product: float, inverse: float, double: bool) -> float:
    """The smallest ``x`` whose rounded product with ``inverse`` is at least ``product``; ``inf`` if none is."""
    rounded: Callable[[float], float] = float if double else _float32
    x = rounded(product / inverse)
    while math.isfinite(x) and rounded(x * inverse) < product:  # a product of two float32 is exact in Python's float
        x = _next(x, double)
    while rounded(_next(x, double, -1) * inverse) >= product:
        x = _next(x, double, -1)
    return x


def _float32(value: float) -> float:
    """Round to float32; too large values become infinite."""
    return ctypes.c_float(value).value


def _next(value: float, double: bool, step: Literal[1, -1] = 1) -> float:
    """The neighbour of ``value`` in float32 or float64, towards ``inf`` or (``step=-1``) ``-inf``."""
    if double:
        return math.nextafter(value, step * math.inf)
    if value == 0.0:
        return step * 2.0**-149
    if math.isinf(value) and value * step > 0:
        return value
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    (result,) = struct.unpack("<f", struct.pack("<i", bits + (step if value > 0 else -step)))
    return float(result)


class FakeQuantize(torch.nn.Module):
    """A quantization point: it records what flows through, derives a scale from that and fake-quantizes.

    These are three separate steps: :meth:`observe` only records, :meth:`compute_scale` only derives (again and again,
    with other methods or types, from the same statistics) and calling the module only quantizes with the scale it has.
    Until it has one (``scale_source`` is ``None``), or while ``enabled`` is false, calling it returns its input.

    Args:
        dtype: Name of the quantized type, such as ``int8``.
        scheme: ``symmetric`` (zero point 0) or ``affine`` (the range of the data, extended to contain zero).
        axis: Channel axis for one scale per channel; ``None`` for one scale.
        channels: Number of channels; needed with ``axis`` and only then.
        observer: The method that derives the scale, see :func:`~lightning_qat.quantization.observers.clip_range`.
        percentile: For the ``percentile`` observer: share of the values inside the range, in percent.
        ema_momentum: Weight of a new batch in moving averages.
        fixed_scale: A scale given by the user. It is used at once and never changed; statistics are still recorded.
        narrow_range: Leave out the smallest code of a signed type, so that the codes are symmetric (int8: -127 ...
            127).

    Attributes:
        scale: Buffer, float32 whatever the type of the model, ``()`` or ``(channels,)``.
        zero_point: Buffer, int32, of the same shape.
        scale_source: The method the scale came from, ``None`` before calibration.
        enabled: Set to false to switch this point off.
        statistics: What was observed.

    Raises:
        ConfigurationError: If an argument is out of its set, or two of them contradict each other.

    Example:
        >>> point = FakeQuantize("int8", observer="minmax")
        >>> point.observe(torch.tensor([-1.0, 2.54]))
        >>> point.compute_scale()
        >>> round(point.scale.item(), 4), point(torch.tensor([0.031, 9.0]))
        (0.02, tensor([0.0400, 2.5400]))
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        dtype: str,
        *,
        scheme: Scheme = "symmetric",
        axis: int | None = None,
        channels: int | None = None,
        observer: ObserverName = "mse",
        percentile: float = 99.99,
        ema_momentum: float = 0.01,
        fixed_scale: float | None = None,
        narrow_range: bool = False,
    ) -> None:
        super().__init__()
        if scheme not in get_args(Scheme):
            raise unknown_choice("scheme", scheme, get_args(Scheme))
        _check_observer(observer, fixed_scale)
        if (axis is None) != (channels is None):
            raise ConfigurationError(f"axis and channels belong together, got axis={axis} and channels={channels}.")
        if not 0.0 < percentile <= 100.0:
            raise ConfigurationError(f"percentile must be above 0 and at most 100, such as 99.99, not {percentile}.")
        if not 0.0 < ema_momentum <= 1.0:
            raise ConfigurationError(f"ema_momentum must be above 0 and at most 1, such as 0.01, not {ema_momentum}.")
        if fixed_scale is not None and not 2.0**-126 <= fixed_scale <= 2.0**126:
            raise ConfigurationError(f"fixed_scale must be a positive float32, such as 100/32768, not {fixed_scale}.")
        self.scheme: Scheme = scheme
        self.axis = axis
        self.observer: ObserverName = observer
        self.percentile = percentile
        self.fixed_scale = fixed_scale
        self.narrow_range = narrow_range
        self.enabled = True
        self.scale_source: str | None = None
        self._set_dtype(dtype)
        self.statistics: RangeStatistics | PerChannelRange = (
            RangeStatistics(ema_momentum)
            if axis is None or channels is None
            else PerChannelRange(axis, channels, ema_momentum)
        )
        shape = () if channels is None else (channels,)
        # A buffer born under inference_mode would break the next backward.
        with torch.inference_mode(False):
            self.register_buffer("scale", torch.ones(shape, dtype=torch.float32))
            self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
            # Clip range relative to the whole and to the averaged range of the data: row 0 for the lower end, 1 for
            # the upper.
            self._ratio = torch.ones(2, channels or 1, dtype=torch.float64, device="cpu")
            self._ema_ratio = self._ratio.clone()
        if fixed_scale is not None:
            self.compute_scale("fixed")

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` with the present scale; return ``x`` itself when not calibrated or not enabled."""
        if self.scale_source is None or not self.enabled:
            return x
        zero_point = self.zero_point if self.scheme == "affine" else 0
        return fake_quantize(x, self.scale, zero_point, self.quant_min, self.quant_max, self.axis)

    def observe(self, x: Tensor) -> None:
        """Record the statistics of ``x``; the scale stays."""
        self.statistics.observe(x)

    @property
    def degenerate(self) -> bool:
        """Whether a scale was derived from data that were all zero: it is a stand-in that fits no other data."""
        return self.scale_source is not None and bool((self.scale == ZERO_RANGE_SCALE).any())

    @torch.no_grad()
    @torch.inference_mode(False)
    def compute_scale(self, observer: str | None = None, dtype: str | None = None) -> None:
        """Derive scale and zero point from the kept statistics, in place.

        Args:
            observer: The method, by default the one given at construction (``fixed`` if there is a fixed scale).
            dtype: Change to this type first.

        Raises:
            ConfigurationError: If nothing finite was observed, or the method or type does not exist.
        """
        source = observer or ("fixed" if self.fixed_scale is not None else self.observer)
        _check_observer(source, self.fixed_scale)
        statistics = self.statistics
        if source != "fixed" and statistics.count == 0:
            raise ConfigurationError(
                "there is no scale to compute, as no finite value was observed at this point: calibrate with batches "
                "that reach it, give it a fixed_scale, or leave it in float32."
            )
        if dtype is not None:
            self._set_dtype(dtype)
        if source == "fixed":
            self.scale.fill_(self.fixed_scale or 1.0)
            self.zero_point.zero_()
        else:
            low, high = clip_range(
                statistics, source, self.quant_min, self.quant_max, scheme=self.scheme, percentile=self.percentile
            )
            self._ratio = self._relative(low, high, *statistics.range)
            self._ema_ratio = self._relative(low, high, *statistics.ema_range)
            self._write_range(low, high)
        self.scale_source = source

    def change_dtype(self, dtype: str) -> None:
        """Change the quantized type, and re-derive the scale by the method it came from. A fixed scale stays.

        Raises:
            ConfigurationError: If there is no such quantized type.
        """
        if self.scale_source is None:
            self._set_dtype(dtype)
        else:
            self.compute_scale(self.scale_source, dtype)

    @torch.no_grad()
    @torch.inference_mode(False)
    def update_scale(self, x: Tensor, *, ema: bool | None = None) -> None:
        """Let the scale follow the data in training, without a jump from the calibrated one.

        The new scale is that of the range of ``x`` (a weight), or of its moving average over batches (an activation),
        times the ratio of the calibrated range to the same kind of range at calibration. Cheap: it looks at minimum
        and maximum only; a tensor with NaN or infinities changes nothing. A fixed or uncalibrated scale stays.

        Args:
            x: The present weight, or this batch's activation.
            ema: Whether to average over batches; by default if the observer is ``ema``.
        """
        if self.scale_source is None or self.scale_source == "fixed" or x.numel() == 0:
            return
        low, high = self.statistics.extremes(x)
        if self.observer == "ema" if ema is None else ema:
            low, high = self.statistics.update_ema(low, high)
            ratio = self._ema_ratio
        else:
            ratio = self._ratio
        ratio = ratio.to(low.device)
        self._write_range(low * ratio[0], high * ratio[1])

    def reset_statistics(self) -> None:
        """Forget what was observed, to calibrate anew; the scale stays."""
        self.statistics.reset()

    def get_statistics_state(self) -> dict[str, Any]:
        """Return what is not in ``state_dict``: ints, floats, strings, lists and CPU tensors only."""
        return {
            "dtype": self.dtype,
            "scale_source": self.scale_source,
            "ratio": self._ratio.to("cpu", copy=True),
            "ema_ratio": self._ema_ratio.to("cpu", copy=True),
            "statistics": self.statistics.state_dict(),
        }

    def load_statistics_state(self, state: dict[str, Any]) -> None:
        """Take the state of :meth:`get_statistics_state`, with the dtype the stored scale belongs to.

        Raises:
            ConfigurationError: If the state belongs to a point with other channels.
        """
        self.statistics.load_state_dict(state["statistics"])
        self._set_dtype(state["dtype"])
        self.scale_source = state["scale_source"]
        with torch.inference_mode(False):
            self._ratio = state["ratio"].cpu().clone()
            self._ema_ratio = state["ema_ratio"].cpu().clone()

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        axis = "" if self.axis is None else f", axis={self.axis}"
        return f"{self.dtype}, {self.scheme}{axis}, observer={self.observer}, scale_source={self.scale_source}"

    def _set_dtype(self, dtype: str) -> None:
        found = quant_dtype(dtype)
        self.dtype = found.name
        self.quant_max = found.quant_max
        self.quant_min = -found.quant_max if self.narrow_range and found.signed else found.quant_min

    def _write_range(self, low: Tensor, high: Tensor) -> None:
        scale, zero_point = scale_from_range(low, high, self.quant_min, self.quant_max, self.scheme)
        usable = (low.isfinite() & high.isfinite()).reshape(self.scale.shape).to(self.scale.device)
        self.scale.copy_(torch.where(usable, scale.reshape(self.scale.shape).to(self.scale.device), self.scale))
        if self.scheme == "affine":
            zero_point = zero_point.reshape(self.zero_point.shape).to(self.scale.device)
            self.zero_point.copy_(torch.where(usable, zero_point, self.zero_point))

    def _relative(self, low: Tensor, high: Tensor, whole_low: Tensor, whole_high: Tensor) -> Tensor:
        """The given range relative to another; 1 where an end of that other is zero."""
        if self.scheme == "symmetric":
            signed = self.quant_min < 0
            low = high = torch.maximum(-low, high) if signed else high
            whole_low = whole_high = torch.maximum(-whole_low, whole_high) if signed else whole_high
        ratios = [a / b for a, b in ((low, whole_low), (high, whole_high))]
        return torch.stack([torch.where(r.isfinite() & (r > 0), r, 1.0) for r in ratios])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device, but keep the types: a scale rounded to bfloat16 would be another scale."""
        scale, zero_point = self.scale, self.zero_point
        with torch.inference_mode(False):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            if self.scale.dtype != torch.float32:
                self.scale = scale.to(self.scale.device)
            if self.zero_point.dtype != torch.int32:
                self.zero_point = zero_point.to(self.zero_point.device)
        return self


def _check_observer(observer: str, fixed_scale: float | None) -> None:
    if observer not in get_args(ObserverName):
        raise unknown_choice("observer", observer, get_args(ObserverName))
    if observer == "fixed" and fixed_scale is None:
        raise ConfigurationError("the observer 'fixed' needs a fixed_scale, such as 100/32768.")
