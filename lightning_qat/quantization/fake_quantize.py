"""What a quantization point keeps: the statistics of its data, and the scale derived from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_qat.quantization.dtypes import quant_dtype
from lightning_qat.quantization.errors import ConfigurationError, unknown_choice
from lightning_qat.quantization.fake_quantize_function import fake_quantize
from lightning_qat.quantization.observers import ObserverName, clip_range
from lightning_qat.quantization.range_statistics import PerChannelRange, RangeStatistics
from lightning_qat.quantization.scales import ZERO_RANGE_SCALE, scale_from_range

Scheme = Literal["symmetric", "affine"]


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

    @torch.no_grad()
    @torch.inference_mode(False)
    def set_averages(self, averages: Tensor) -> None:
        """Replace the moving averages of the range, ``(2, channels)``, and take the scale from them (over ranks)."""
        self.statistics.averages = averages
        low, high = self.statistics.ema_range
        ratio = self._ema_ratio.to(low.device)
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
