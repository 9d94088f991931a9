"""Forwards with some points quantized at chosen types: what the prediction is checked against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_qat.analysis.captured_calls import RepeatableForward, analysis_mode
from lightning_qat.analysis.metrics import error_sums, metric_of_sums
from lightning_qat.analysis.mixed_precision.point_quantizers import Quantizers
from lightning_qat.analysis.nan_origin import refuse_nan
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.quantization import ranks
from lightning_qat.quantization.config_values import Scheme
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.region.region import Region

Pair = tuple[str, str]
"""A point and a type."""


def measure_forwards(
    region: Region,
    calls: Sequence[Call],
    select: OutputSelector,
    quantizers: Quantizers,
    pairs: Sequence[Pair],
    seed: int,
    *,
    across_ranks: bool = False,
) -> tuple[dict[Pair, float], float, dict[str, float]]:
    """Measure pairs of point and type alone, and all points together at each type.

    Args:
        region: a calibrated region.
        calls: the inputs.
        select: the chosen output.
        quantizers: the fake-quants of the points.
        pairs: what to measure alone.
        seed: of the random numbers that the forward draws.
        across_ranks: add up what all ranks measure.

    Returns:
        The mean squared output error of each pair; the mean square of the float output; and, by type, the error with
        all points at it, or at their widest type where they do not have it.
    """
    types = list(dict.fromkeys(dtype for own in quantizers.values() for dtype in own))
    chosen: dict[Pair | str, dict[str, FakeQuantize]] = {
        (point, dtype): {point: quantizers[point][dtype]} for point, dtype in pairs
    }
    for dtype in types:
        chosen[dtype] = {p: own.get(dtype) or list(own.values())[-1] for p, own in quantizers.items()}
    sums = {what: torch.zeros(7, dtype=torch.float64) for what in chosen}
    with ranks.failing_together(across_ranks), analysis_mode(region, buffers=False):
        for call in calls:
            with RepeatableForward(region.target, call, seed) as forward:
                with region.only(()):
                    reference = [tensor.clone() for tensor in select(forward())]
                refuse_nan(reference, select.description, region, forward)
                for what, own in chosen.items():
                    with quantized_by(region, own), region.only(own):
                        sums[what] += _error(reference, select(forward()))
    if across_ranks and ranks.count() > 1:
        total = ranks.summed(torch.stack(list(sums.values())))
        sums = dict(zip(sums, total, strict=True))
    errors = {what: float(metric_of_sums("MSE", value)) for what, value in sums.items()}
    first = sums[types[0]]
    power = float(first[3] / first[0].clamp(min=1))
    return {pair: errors[pair] for pair in pairs}, power, {dtype: errors[dtype] for dtype in types}


@contextmanager
@torch.no_grad()
def quantized_by(region: Region, quantizers: Mapping[str, FakeQuantize]) -> Iterator[None]:
    """Give points the type, the scheme and the scale of other fake-quants inside the block, and put them back then."""
    points = region.points
    kept = []
    for name, other in quantizers.items():
        own = points[name]
        if own is not other:
            kept.append((own, own.dtype, own.scheme, own.scale.detach().clone(), own.zero_point.clone()))
            _write(own, other.dtype, other.scheme, other.scale, other.zero_point)
    try:
        yield
    finally:
        for own, dtype, scheme, scale, zero_point in kept:
            _write(own, dtype, scheme, scale, zero_point)


def _write(fake_quant: FakeQuantize, dtype: str, scheme: Scheme, scale: Tensor, zero_point: Tensor) -> None:
    fake_quant.set_dtype(dtype)
    fake_quant.scheme = scheme
    fake_quant.scale.copy_(scale)
    fake_quant.zero_point.copy_(zero_point)


def _error(reference: list[Tensor], analysed: list[Tensor]) -> Tensor:
    total = torch.zeros(7, dtype=torch.float64)
    for base, analy in zip(reference, analysed, strict=True):
        if base.shape != analy.shape:
            raise ConfigurationError(
                "quantization changes the shape of the chosen output: choose an output before the selection."
            )
        finite = base.isfinite()
        total += error_sums(*((base, analy) if bool(finite.all()) else (base[finite], analy[finite]))).cpu()
    return total
