"""Inspect one point: the tensors that reach it, before and after quantization, and their statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_qat.analysis.captured_calls import analysis_mode
from lightning_qat.analysis.metrics import metric_of_sums
from lightning_qat.analysis.statistics.point_ranges import representable_range
from lightning_qat.analysis.statistics.point_statistics import PointStatistics
from lightning_qat.quantization.errors import ConfigurationError, near_names
from lightning_qat.quantization.region.region import Region


@dataclass(frozen=True, repr=False)
class PointInspection:
    """The tensors at one quantization point while some samples ran through the quantized model in evaluation mode.

    Args:
        point: name of the point.
        op_type: torch function of its op.
        role: ``output``, ``weight`` or ``input``.
        location: ``file.py:line`` of the op.
        region: path of the quantized module in the model, ``""`` for the model itself.
        dtype: quantized type.
        scheme: ``symmetric`` or ``affine``.
        axis: channel axis, None for one scale per tensor.
        scale: float32, one element per scale.
        zero_point: int32, of the same shape.
        scale_source: where the scale came from.
        lowest: smallest value that the type represents; of the widest channel.
        highest: largest value that the type represents; of the widest channel.
        values: what arrived, one tensor per quantization; the tensor itself, on the CPU.
        quantized: what fake-quantization made of it, of the same shapes.
        statistics: statistics of all these tensors together.
    """

    point: str
    op_type: str
    role: str
    location: str
    region: str
    dtype: str
    scheme: str
    axis: int | None
    scale: Tensor
    zero_point: Tensor
    scale_source: str
    lowest: float
    highest: float
    values: tuple[Tensor, ...]
    quantized: tuple[Tensor, ...]
    statistics: PointStatistics

    @property
    def errors(self) -> tuple[Tensor, ...]:
        """Return the quantization errors, ``quantized - value``."""
        return tuple(q - v for q, v in zip(self.quantized, self.values, strict=True))

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise ratio in dB, as in the layer statistics."""
        s = self.statistics
        sums = [s.quantized, 0.0, s.rounding + s.clipping, s.signal, 0.0, 0.0, 0.0]
        return float(metric_of_sums("SQNR", torch.tensor(sums, dtype=torch.float64)))

    @property
    def clipped_share(self) -> float:
        """Share of the values outside the representable range."""
        return self.statistics.clipped / self.statistics.quantized if self.statistics.quantized else 0.0

    def histogram(self, bins: int = 100) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Count values and quantized values in bins that cover both.

        Args:
            bins: number of bins.

        Returns:
            Counts of the values, counts of the quantized values (both int64 ``(bins,)``), and the edges, float64
            ``(bins + 1,)``. Values that are not finite are not counted.
        """
        before, after = flat(self.values), flat(self.quantized)
        both = np.concatenate([before, after])
        low, high = (float(both.min()), float(both.max())) if both.size else (0.0, 1.0)
        edges = np.histogram_bin_edges(both, bins, (low, high) if low < high else (low - 0.5, low + 0.5))
        return np.histogram(before, edges)[0], np.histogram(after, edges)[0], edges

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(v.shape)) for v in self.values)
        return f"PointInspection({self.point!r}, {self.dtype}, shapes {shapes}, SQNR {self.sqnr:.4g} dB)"


def inspect_point(region: Region, point: str, run: Callable[[], Any], path: str = "") -> PointInspection:
    """Run a function that calls a quantized region, and keep the tensors at one of its points.

    The model is in evaluation mode and quantized everywhere, no scale moves, and everything is as before afterwards.

    Args:
        region: a calibrated region.
        point: name of the point.
        run: calls the region's target, once or several times.
        path: of the target, for the report.

    Raises:
        ConfigurationError: there is no such point, it has no scale, or ``run`` did not reach it.

    Example:
        >>> from lightning_qat.quantization.region.calibration import calibrate
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sigmoid())
        >>> region = insert(model, (torch.ones(2, 4),))
        >>> _ = calibrate(region, torch.randn(3, 2, 4))
        >>> found = inspect_point(region, "0.weight", lambda: model(torch.ones(2, 4)))
        >>> found.values[0].shape, bool(found.errors[0].abs().max() <= found.scale.max() / 2)
        (torch.Size([4, 4]), True)
    """
    plan = region.plan.by_name.get(point)
    if plan is None:
        raise unknown_point(point, list(region.points))
    fake_quant = region.points[point]
    if fake_quant.scale_source is None:
        raise ConfigurationError(f"{point} has no scale yet: calibrate first.")
    # a weight that is used twice has several names, and is kept once
    watched = {name for name, other in region.points.items() if plan.is_weight and other is fake_quant} | {point}
    kept: list[tuple[Tensor, Tensor]] = []
    statistics = PointStatistics.of(fake_quant)

    def tap(name: str, value: Tensor, quantized: Tensor) -> None:
        if name in watched and not (plan.is_weight and kept):
            kept.append((value.detach().to("cpu", copy=True), quantized.detach().to("cpu", copy=True)))
            statistics.update(value, quantized, fake_quant)

    with analysis_mode(region), region.tap(tap):
        run()
    if not kept:
        raise ConfigurationError(f"{point} was not reached: none of the samples takes the branch of its op.")
    op = region.graph.by_name[plan.op]
    lowest, highest = representable_range(fake_quant)
    return PointInspection(
        point=point,
        op_type=op.kind,
        role=plan.role,
        location=op.location,
        region=path,
        dtype=fake_quant.dtype,
        scheme=fake_quant.scheme,
        axis=fake_quant.axis,
        scale=fake_quant.scale.detach().cpu().clone(),
        zero_point=fake_quant.zero_point.detach().cpu().clone(),
        scale_source=fake_quant.scale_source,
        lowest=lowest,
        highest=highest,
        values=tuple(value for value, _ in kept),
        quantized=tuple(quantized for _, quantized in kept),
        statistics=statistics,
    )


def unknown_point(name: str, points: list[str]) -> ConfigurationError:
    """Build the error for a name that is not a point: the points of that op, or near names.

    Example:
        >>> str(unknown_point("conv", ["conv.weight", "conv.output", "fc.weight"]))
        "there is no point 'conv'. The op has: conv.weight, conv.output."
    """
    of_op = [point for point in points if point.rpartition(".")[0] == name]
    if of_op:
        return ConfigurationError(f"there is no point {name!r}. The op has: {', '.join(of_op)}.")
    near = near_names(name, points, limit=5) or [point for point in points if name.lower() in point.lower()][:5]
    hint = f" Near names: {', '.join(near)}." if near else ""
    return ConfigurationError(
        f"there is no point {name!r} among the {len(points)}.{hint} model_check_result.txt lists all of them."
    )


def flat(tensors: tuple[Tensor, ...]) -> np.ndarray[Any, Any]:
    """Return the finite values of some tensors as one float64 array ``(n,)``."""
    values = [tensor.double().reshape(-1) for tensor in tensors]
    joined = torch.cat(values) if values else torch.empty(0, dtype=torch.float64)
    return joined[joined.isfinite()].numpy()
