"""The module of a quantization point: it keeps statistics of its data and the scale derived from them."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from lightning_qat.quantization.config_values import Scheme
from lightning_qat.quantization.errors import ConfigurationError, unknown_choice
from lightning_qat.quantization.fake_quant.fake_quantize_function import fake_quantize
from lightning_qat.quantization.fake_quant.learned_scale import fake_quantize_learned, gradient_scale
from lightning_qat.quantization.fake_quant.quantization_parameters import QuantizationParameters, write_magnitudes
from lightning_qat.quantization.modules.exporting import is_exporting
from lightning_qat.quantization.numerics.channel_groups import swap_within_groups
from lightning_qat.quantization.numerics.observers import ObserverName, check_observer, clip_range
from lightning_qat.quantization.numerics.percentile import DEFAULT_PERCENTILE, check_percentile
from lightning_qat.quantization.numerics.range_statistics import RangeStatistics
from lightning_qat.quantization.numerics.scales import (
    MAX_SCALE,
    MIN_SCALE,
    greatest_scale,
    packed_ratios,
    ratios_of,
    relative_range,
)
from lightning_qat.quantization.numerics.split_statistics import repeat_groups, statistics_for


class FakeQuantize(QuantizationParameters):
    """A quantization point: it records its data, derives a scale from the statistics and fake-quantizes.

    These are three separate steps. :meth:`observe` only records. :meth:`compute_scale` only derives the scale; it can
    be repeated with other methods or types on the same statistics. Calling the module only quantizes with the present
    scale. Without a scale (``scale_source`` is ``None``), or while ``enabled`` is false, it returns its input.

    Args:
        dtype: Name of the quantized type, such as ``int8``.
        scheme: ``symmetric`` (zero point 0) or ``affine`` (the range of the data, extended to contain zero).
        axis: Channel axis for one scale per channel; ``None`` for one scale.
        channels: Number of channels; needed with ``axis`` and only then.
        split_sizes: Lengths of groups of neighbouring channels, for one scale per group instead of per channel.
        batch_axis: The axis of the samples, ``None`` for a weight; only the gradient of a learned scale uses it.
        observer: The method that derives the scale, see
            :func:`~lightning_qat.quantization.numerics.observers.clip_range`.
        percentile: For the ``percentile`` observer: share of the values inside the range, in percent.
        ema_momentum: Weight of a new batch in moving averages.
        fixed_scale: A scale given by the user. It is used at once and never changed; statistics are still recorded.
        narrow_range: Leave out the smallest code of a signed type: the codes are symmetric (int8: -127 ... 127).

    Attributes:
        scale: Always float32, ``()``, ``(channels,)`` or ``(groups,)``. A buffer; a parameter after
            :meth:`learn_scale`.
        zero_point: Buffer, int32, of the same shape.
        scale_source: The method the scale came from, ``None`` before calibration.
        enabled: Set to false to switch this point off.
        frozen: Set to true to keep the scale as it is, once there is one; see :meth:`Region.freeze`.
        outdated: True if a training forward computed the scale of a weight. The optimizer may have stepped since, so
            the next evaluation computes the scale again.
        forgotten: Whether a checkpoint left out its statistics, as those of a weight can be taken again.
        starts_at_zero: Whether its first scale comes from training: see ``first_scale.py``.
        batches_from_zero: Of such a point: how many batches with values it has seen since.
        agreed_batches: That number when the ranks last agreed on it.
        groups: Set to the groups of a transposed convolution to have ``axis`` count in the layout of a convolution: see
            :mod:`~lightning_qat.quantization.numerics.channel_groups`.
        statistics: What was observed.

    Raises:
        ConfigurationError: If an argument has a value that is not allowed, or two arguments contradict each other.

    Example:
        >>> point = FakeQuantize("int8", observer="minmax")
        >>> point.observe(torch.tensor([-1.0, 2.54]))
        >>> point.compute_scale()
        >>> round(point.scale.item(), 4), point(torch.tensor([0.031, 9.0]))
        (0.02, tensor([0.0400, 2.5400]))
    """

    def __init__(
        self,
        dtype: str,
        *,
        scheme: Scheme = "symmetric",
        axis: int | None = None,
        channels: int | None = None,
        split_sizes: tuple[int, ...] | None = None,
        batch_axis: int | None = None,
        observer: ObserverName = "mse",
        percentile: float = DEFAULT_PERCENTILE,
        ema_momentum: float = 0.01,
        fixed_scale: float | None = None,
        narrow_range: bool = False,
    ) -> None:
        if scheme not in get_args(Scheme):
            raise unknown_choice("scheme", scheme, get_args(Scheme))
        check_observer(observer, fixed_scale)
        check_percentile(percentile)
        if fixed_scale is not None and not MIN_SCALE <= fixed_scale <= MAX_SCALE:
            raise ConfigurationError(f"fixed_scale must be a positive float32, such as 100/32768, not {fixed_scale}.")
        scales = channels if split_sizes is None else len(split_sizes)
        super().__init__(dtype, scheme, scales, split_sizes, fixed_scale, narrow_range)
        self.axis = axis
        self.groups = 1
        self.batch_axis = batch_axis
        self.observer: ObserverName = observer
        self.percentile = percentile
        self.enabled = True
        self.frozen = False
        self.outdated = self.forgotten = False
        self.starts_at_zero, self.batches_from_zero, self.agreed_batches = False, 0, 0
        self.statistics = statistics_for(self.axis, channels, split_sizes, ema_momentum)
        if fixed_scale is not None:
            self.compute_scale("fixed")

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` with the present scale; return ``x`` itself when not calibrated or not enabled."""
        if self.scale_source is None or not self.enabled:
            return x
        if self.groups > 1:
            x = swap_within_groups(x, self.groups)
        if self._parameters:
            quantized = self._forward_learned(x)
        else:
            scale = self.scale if self.split_sizes is None else self.channel_scale
            zero_point = 0 if self.scheme == "symmetric" else self.channel_zero_point
            quantized = fake_quantize(x, scale, zero_point, self.quant_min, self.quant_max, self.axis)
        return quantized if self.groups == 1 else swap_within_groups(quantized, self.groups)

    def _forward_learned(self, x: Tensor) -> Tensor:
        scale = self.scale
        if not is_exporting():  # an optimizer may have stepped across zero; the gradient is not cut
            scale.detach().clamp_(MIN_SCALE, greatest_scale(self.quant_max - self.quant_min))
        zero_point = self.channel_zero_point if self.scheme == "affine" else 0
        arguments = (x, self.channel_scale, zero_point, self.quant_min, self.quant_max, self.axis)
        if self.frozen or not (scale.requires_grad and torch.is_grad_enabled()):
            return fake_quantize(*arguments)
        factors = gradient_scale(tuple(x.shape), self.quant_max, self.axis, self.batch_axis, self.split_sizes)
        if self.split_sizes is None:
            return fake_quantize_learned(*arguments, factors[0])
        return fake_quantize_learned(*arguments, repeat_groups(scale.new_tensor(factors), self.split_sizes))

    def observe(self, x: Tensor) -> None:
        """Record the statistics of ``x``; the scale stays."""
        self.forgotten = False
        self.statistics.observe(x if self.groups == 1 else swap_within_groups(x, self.groups))

    @property
    def keeps_scale(self) -> bool:
        """Whether the point is frozen with a scale: neither training nor a new calibration changes it."""
        return self.frozen and self.scale_source is not None

    @torch.no_grad()
    @torch.inference_mode(False)
    def compute_scale(self, observer: str | None = None, dtype: str | None = None) -> None:
        """Derive scale and zero point from the kept statistics, in place. This overwrites a learned scale.

        Args:
            observer: The method, by default the one given at construction (``fixed`` if there is a fixed scale).
            dtype: Change to this type first.

        Raises:
            ConfigurationError: If nothing finite was observed, or the method or type does not exist.
        """
        source = observer or ("fixed" if self.fixed_scale is not None else self.observer)
        check_observer(source, self.fixed_scale)
        statistics = self.statistics
        if source != "fixed" and statistics.count == 0:
            raise ConfigurationError(
                "there is no scale to compute, as no finite value was observed at this point: calibrate with batches "
                "that reach it, give it a fixed_scale, or leave it in float32. Of a weight from a checkpoint, call "
                "compute_scales() of the region."
            )
        if dtype is not None:
            self.set_dtype(dtype)
        if self.starts_at_zero:  # what calibration saw says nothing
            if self.batches_from_zero:
                self.write_range(*self.statistics.ema_range)
            return
        if source == "fixed":
            self.scale.fill_(self.fixed_scale or 1.0)
            self.zero_point.zero_()
        else:
            low, high = clip_range(
                statistics, source, self.quant_min, self.quant_max, scheme=self.scheme, percentile=self.percentile
            )
            signed = None if self.scheme == "affine" else self.quant_min < 0
            self._ratio = relative_range((low, high), statistics.range, signed)
            self._ema_ratio = relative_range((low, high), statistics.ema_range, signed)
            self.write_range(low, high)
        self.scale_source = source

    def change_dtype(self, dtype: str) -> None:
        """Change the quantized type, and derive the scale again by the method it came from. A fixed scale stays.

        Raises:
            ConfigurationError: If there is no such quantized type.
        """
        if self.scale_source is None:
            self.set_dtype(dtype)
        else:
            self.compute_scale(self.scale_source, dtype)

    def update_scale(self, x: Tensor, *, ema: bool | None = None) -> None:
        """Let the scale follow the data in training, without a jump from the calibrated one.

        The new range is that of ``x`` (a weight) or its moving average over batches (an activation), multiplied by
        the ratio of the calibrated range to the same kind of range at calibration. The scale stays if ``x`` holds NaN
        or infinities or is transformed by ``torch.func``, and if the scale is fixed, learned or not calibrated.

        Args:
            x: The present weight, or this batch's activation.
            ema: Whether to average over batches; by default only if the observer is ``ema``.
        """
        if self.scale_source is None or self.scale_source == "fixed" or x.numel() == 0 or self._parameters:
            return
        if not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(x):
            return
        x = x.detach() if self.groups == 1 else swap_within_groups(x.detach(), self.groups)
        ema = self.observer == "ema" if ema is None else ema
        if self._followed(x, ema):
            return
        with torch.no_grad(), torch.inference_mode(False):
            ends = self.statistics.extremes(x)
            self._write_ends(*(self.statistics.update_ema(*ends) if ema else ends), ema)

    def _followed(self, x: Tensor, ema: bool) -> bool:
        """Follow an ordinary tensor on the CPU in few operations, as this runs in every training step."""
        if not x.is_cpu or torch.compiler.is_compiling():
            return False
        if isinstance(self.statistics, RangeStatistics):
            low, high = (end.item() for end in torch.aminmax(x))
            if ema:
                low, high = self.statistics.move_averages(low, high)
            self._write_number(low, high, self._ema_ratio if ema else self._ratio)
            return True
        magnitudes = None if ema else self.magnitudes(x)
        return magnitudes is not None and bool(write_magnitudes([self], [magnitudes]))

    def magnitudes(self, x: Tensor) -> Tensor | None:
        """The largest magnitude of each channel of a weight; None if the scale does not follow from these alone."""
        if self.axis is None or self.scheme != "symmetric" or self.quant_min >= 0 or self.split_sizes is not None:
            return None
        if x.dim() < 2 or x.shape[axis := self.axis % x.dim()] != self.scale.numel():
            return None
        return x.abs().amax(dim=[d for d in range(x.dim()) if d != axis])

    @torch.no_grad()
    @torch.inference_mode(False)
    def set_averages(self, averages: Tensor) -> None:
        """Replace the moving averages of the range, ``(2, channels)``, and compute the scale from the new ones."""
        self.statistics.averages = averages
        if not self.learned:
            self._write_ends(*self.statistics.ema_range, True)

    def reset_statistics(self) -> None:
        """Reset the statistics, to calibrate again; the scale stays."""
        self.statistics.reset()
        self.forgotten, self.starts_at_zero, self.batches_from_zero, self.agreed_batches = False, False, 0, 0

    def get_statistics_state(self) -> dict[str, Any]:
        """Return the state that ``state_dict`` lacks, as ints, floats, strings, lists and CPU tensors."""
        ratios = {"ratio": self._ratio.to("cpu", copy=True), "ema_ratio": self._ema_ratio.to("cpu", copy=True)}
        return {**self._plain_state(), **ratios, "statistics": self.statistics.state_dict()}

    def get_packed_state(self, limit: int | None) -> dict[str, Any]:
        """Return the same in few bytes: ``limit`` characters for counts, None leaves out the statistics of a weight."""
        statistics = {} if limit is None else {"statistics": self.statistics.packed_state(limit)}
        return {**self._plain_state(), **packed_ratios(self._ratio, self._ema_ratio), **statistics}

    def _plain_state(self) -> dict[str, Any]:
        names = ("dtype", "scale_source", "learned", "outdated", "starts_at_zero", "batches_from_zero")
        return {name: getattr(self, name) for name in names}

    def load_statistics_state(self, state: dict[str, Any]) -> None:
        """Take the state of either method; one with other channels is a ConfigurationError."""
        self.reset_statistics()
        self.forgotten = "statistics" not in state
        if not self.forgotten:
            self.statistics.load_state_dict(state["statistics"])
        self.set_dtype(state["dtype"])
        self.scale_source = state["scale_source"]
        self.learn_scale(state["learned"])
        self.outdated = state["outdated"]
        self.starts_at_zero = state.get("starts_at_zero", False)  # checkpoints of earlier releases have no such points
        self.batches_from_zero = self.agreed_batches = state.get("batches_from_zero", 0)
        self._ratio, self._ema_ratio = ratios_of(state, self._ratio.shape)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        axis = "" if self.axis is None else f", axis={self.axis}"
        axis += "" if self.groups == 1 else f", groups={self.groups}"
        axis += "" if self.split_sizes is None else f", split_sizes={list(self.split_sizes)}"
        source = f"{self.scale_source}, learned" if self.learned else self.scale_source
        return f"{self.dtype}, {self.scheme}{axis}, observer={self.observer}, scale_source={source}"

    def _write_ends(self, low: Tensor, high: Tensor, ema: bool) -> None:
        ratio = (self._ema_ratio if ema else self._ratio).to(low.device)
        self.write_range(low * ratio[0], high * ratio[1])
