"""What an affine scheme would gain over a symmetric one, measured on the kept histogram."""

from __future__ import annotations

import math

import torch

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.numerics.range_search import expected_error
from lightning_qat.quantization.numerics.range_statistics import RangeStatistics
from lightning_qat.quantization.numerics.scales import scale_from_range

WORTHWHILE_GAIN = math.sqrt(2)
"""Half a bit, 3 dB."""


def affine_gain(fake_quant: FakeQuantize) -> float | None:
    """Return the factor by which the root mean square error falls if the scheme becomes affine; 1 if it does not.

    Both errors are those expected of the values that were observed: with the present scale, and with the range of the
    values, cut off where the present scale cuts them off or not at all, whichever is better.

    Returns:
        None where there is nothing to tell: a point that is affine, unsigned, has a scale that was given or several
        scales, or has observed nothing.

    Example:
        >>> fake_quant = FakeQuantize("int8", observer="minmax")
        >>> fake_quant.observe(torch.nn.functional.silu(torch.linspace(-6, 6, 4001)))
        >>> fake_quant.compute_scale()
        >>> round(affine_gain(fake_quant), 2)
        1.99
    """
    statistics = fake_quant.statistics
    if fake_quant.scheme != "symmetric" or fake_quant.quant_min >= 0 or fake_quant.fixed_scale is not None:
        return None
    if fake_quant.scale_source is None or not isinstance(statistics, RangeStatistics) or not statistics.count:
        return None
    low, high = (float(end) for end in statistics.range)
    low, high = min(low, 0.0), max(high, 0.0)
    if min(-low, high) * WORTHWHILE_GAIN > max(-low, high) / 2:  # whatever is cut off: the ends are too much alike
        return 1.0
    scale = fake_quant.scale.detach().double().reshape(1, 1).to(statistics.histogram.counts.device)
    ends = [end * float(scale) for end in (fake_quant.quant_min, fake_quant.quant_max)]
    lows, highs = [low, max(low, ends[0])], [high, min(high, ends[1])]
    limits = fake_quant.quant_min, fake_quant.quant_max
    cut_low, cut_high = (torch.tensor([ends], dtype=torch.float64, device=scale.device) for ends in (lows, highs))
    affine_scale, zero_point = scale_from_range(cut_low, cut_high, *limits, "affine")
    before = float(expected_error(statistics.histogram, scale, torch.zeros_like(scale), *limits))
    after = float(expected_error(statistics.histogram, affine_scale, zero_point, *limits).min())
    if not before > 0 or not math.isfinite(before):
        return 1.0
    return max(1.0, math.sqrt(before / after)) if after > 0 else 1.0
