"""The range that a point can represent, and the one it has observed."""

from __future__ import annotations

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.numerics.split_statistics import SplitStatistics


def representable_range(fake_quant: FakeQuantize) -> tuple[float, float]:
    """Return the smallest and the largest value that a point represents; of its widest channel.

    Example:
        >>> [round(end, 3) for end in representable_range(FakeQuantize("int8", fixed_scale=0.0446799))]
        [-5.719, 5.674]
    """
    scale, zero = fake_quant.scale.detach().double(), fake_quant.zero_point.double()
    low, high = (scale * (code - zero) for code in (fake_quant.quant_min, fake_quant.quant_max))
    return float(low.min()), float(high.max())


def observed_range(fake_quant: FakeQuantize) -> tuple[float, float] | None:
    """Return the smallest and the largest value that a point has observed; None if there were none.

    Of a point that began at zero it is what training has shown it.

    Example:
        >>> import torch
        >>> fake_quant = FakeQuantize("int8")
        >>> fake_quant.observe(torch.tensor([-1.0, 3.0]))
        >>> observed_range(fake_quant)
        (-1.0, 3.0)
    """
    if not fake_quant.statistics.count:
        return None
    followed = fake_quant.starts_at_zero and fake_quant.batches_from_zero
    low, high = fake_quant.statistics.ema_range if followed else fake_quant.statistics.range
    return float(low.min()), float(high.max())


def clipped_share(fake_quant: FakeQuantize) -> float | None:
    """Return the share of the observed values that lie in bins beyond the representable range; of its widest channel.

    None for a split point, whose groups have ranges of their own. A point from a checkpoint has wider bins: what lies
    in the bin of an end does not count.

    Example:
        >>> import torch
        >>> fake_quant = FakeQuantize("int8", fixed_scale=1 / 127)
        >>> fake_quant.observe(torch.tensor([-3.0, -0.5, 0.5, 3.0]))
        >>> clipped_share(fake_quant)
        0.5
    """
    if isinstance(fake_quant.statistics, SplitStatistics):
        return None
    histogram = fake_quant.statistics.histogram
    low, high = representable_range(fake_quant)
    edges = histogram.edges * histogram.width.unsqueeze(1)
    beyond = (edges[:, 1:] <= low) | (edges[:, :-1] >= high)
    return float((histogram.counts * beyond).sum()) / max(1, histogram.count)
