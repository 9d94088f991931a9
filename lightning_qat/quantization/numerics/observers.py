"""Observers: pure functions that derive a scale from statistics.

To add an observer, write a function that returns the range from the statistics (see ``range_search.py``), and add its
name to :data:`ObserverName` and a line to :func:`clip_range`, both here. All other code uses these two.

:func:`clip_range` chooses the range to represent, by any method and for any type;
:func:`~lightning_qat.quantization.numerics.scales.scale_from_range` turns a range into scale and zero point.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_qat.quantization.errors import ConfigurationError, unknown_choice
from lightning_qat.quantization.numerics.percentile import DEFAULT_PERCENTILE, percentile_range
from lightning_qat.quantization.numerics.range_search import kl_range, mse_range
from lightning_qat.quantization.numerics.range_statistics import Statistics
from lightning_qat.quantization.numerics.scales import scale_from_range
from lightning_qat.quantization.numerics.split_statistics import SplitStatistics

ObserverName = Literal["minmax", "ema", "percentile", "mse", "kl", "fixed"]


def scale_for(
    statistics: Statistics | SplitStatistics,
    observer: str,
    quant_min: int,
    quant_max: int,
    scheme: str = "symmetric",
    percentile: float = DEFAULT_PERCENTILE,
) -> tuple[Tensor, Tensor]:
    """Derive scale (float32) and zero point (int32), both ``(channels,)``: :func:`clip_range`, then
    :func:`scale_from_range`.

    Raises:
        ConfigurationError: If there is no such observer, if it is ``fixed``, which derives nothing, or the
            percentile is out of its bounds.

    Example:
        >>> from lightning_qat.quantization.numerics.range_statistics import RangeStatistics
        >>> statistics = RangeStatistics()
        >>> statistics.observe(torch.tensor([-2.54, 1.0]))
        >>> [t.tolist() for t in scale_for(statistics, "minmax", -128, 127)]
        [[0.019999999552965164], [0]]
    """
    low, high = clip_range(statistics, observer, quant_min, quant_max, scheme, percentile)
    return scale_from_range(low, high, quant_min, quant_max, scheme)


def clip_range(
    statistics: Statistics | SplitStatistics,
    observer: str,
    quant_min: int,
    quant_max: int,
    scheme: str = "symmetric",
    percentile: float = DEFAULT_PERCENTILE,
) -> tuple[Tensor, Tensor]:
    """Choose the range of values to represent.

    * ``minmax``: everything observed.
    * ``ema``: moving averages of the batches' smallest and largest values.
    * ``percentile``: the percentile of the magnitudes (symmetric), or of the values at both ends (affine), interpolated
      within a bin of the histogram. If that many values are exactly zero, the range is everything observed: otherwise
      all other values would be clipped.
    * ``mse``: the range with the smallest expected squared error, see :func:`expected_error`.
    * ``kl``: the threshold that changes the distribution of the magnitudes least (Migacz, "8-bit Inference with
      TensorRT", GTC 2017). It needs bins that are much finer than the codes: for wider types (beyond int9 and uint8,
      per channel beyond int5 and uint4), the range is everything observed. For ``affine``, the threshold clips the
      observed range.

    Args:
        statistics: What was observed.
        observer: The method.
        quant_min: Smallest code.
        quant_max: Largest code.
        scheme: ``symmetric`` or ``affine``.
        percentile: In percent, for the method of that name.

    Returns:
        Lower and upper ends, float64 ``(channels,)`` or ``(groups,)``, within the observed range; ``mse`` first extends
        that range to zero, which every grid contains.

    Raises:
        ConfigurationError: If there is no such observer, if it is ``fixed``, which derives nothing, or the
            percentile is out of its bounds.
    """
    if isinstance(statistics, SplitStatistics):
        groups = statistics.groups
        ends = [clip_range(group, observer, quant_min, quant_max, scheme, percentile) for group in groups]
        return torch.cat([low for low, _ in ends]), torch.cat([high for _, high in ends])
    if observer == "minmax":
        return statistics.range
    if observer == "ema":
        return statistics.ema_range
    if observer == "percentile":
        return percentile_range(statistics, scheme, percentile)
    if observer == "mse":
        return mse_range(statistics, quant_min, quant_max, scheme)
    if observer == "kl":
        return kl_range(statistics, quant_min, quant_max)
    if observer == "fixed":
        raise ConfigurationError("the observer 'fixed' derives no scale from data: give the point a fixed_scale.")
    raise unknown_choice("observer", observer, get_args(ObserverName))


def check_observer(observer: str, fixed_scale: float | None) -> None:
    """Refuse a name that no observer has, and ``fixed`` without a scale.

    Raises:
        ConfigurationError: It is one of these.
    """
    if observer not in get_args(ObserverName):
        raise unknown_choice("observer", observer, get_args(ObserverName))
    if observer == "fixed" and fixed_scale is None:
        raise ConfigurationError("the observer 'fixed' needs a fixed_scale, such as 100/32768.")
