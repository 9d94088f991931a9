"""Forwards with some points quantized at chosen types: what the prediction is checked against."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from lightning_qat.analysis.captured_calls import RepeatableForward, analysis_mode
from lightning_qat.analysis.metrics import error_sums, metric_of_sums
from lightning_qat.analysis.nan_origin import refuse_nan
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.quantization import ranks
from lightning_qat.quantization.config_values import Scheme
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.region.region import Region

Key = TypeVar("Key", bound=Hashable)
Chosen = Mapping[str, FakeQuantize]
"""The points that are quantized, and the fake-quants whose type and scale they have. All others are left out."""


def measure_forwards(
    region: Region,
    calls: Sequence[Call],
    select: OutputSelector,
    chosen: Mapping[Key, Chosen],
    seed: int,
    *,
    across_ranks: bool = False,
) -> tuple[dict[Key, float], float]:
    """Measure the output error of choices of points and types, one forward for each of them and each call.

    Args:
        region: a calibrated region.
        calls: the inputs.
        select: the chosen output.
        chosen: what is quantized, by any key; at least one.
        seed: of the random numbers that the forward draws.
        across_ranks: add up what all ranks measure.

    Returns:
        The mean squared output error by key; and the mean square of the float output.

    Raises:
        ConfigurationError: the output holds NaN or no finite number, or quantization changes its shape.
    """
    sums = {key: torch.zeros(7, dtype=torch.float64) for key in chosen}
    with ranks.failing_together(across_ranks), analysis_mode(region, buffers=False):
        for call in calls:
            with RepeatableForward(region.target, call, seed) as forward:
                with region.only(()):
                    reference = [tensor.clone() for tensor in select(forward())]
                refuse_nan(reference, select.description, region, forward)
                for key, own in chosen.items():
                    with quantized_by(region, own), region.only(own):
                        sums[key] += _error(reference, select(forward()))
    if across_ranks and ranks.count() > 1:
        total = ranks.summed(torch.stack(list(sums.values())))
        sums = dict(zip(sums, total, strict=True))
    first = next(iter(sums.values()))
    if not first[0]:
        raise ConfigurationError(
            f"{select.description} holds no finite number on these batches, so no error of it can be measured: are "
            "they empty, or is all of it masked?"
        )
    power = float(first[3] / first[0].clamp(min=1))
    return {key: float(metric_of_sums("MSE", value)) for key, value in sums.items()}, power


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
