"""Per-point statistics of what flows through a region, over sampled batches.

The values are those of the quantized model: the input of a point and its fake-quantized output. Nothing is kept but
    what
:class:`~lightning_qat.analysis.statistics.point_statistics.PointStatistics` keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lightning_qat.analysis.captured_calls import RepeatableForward, analysis_mode
from lightning_qat.analysis.results import Result
from lightning_qat.analysis.statistics.code_histogram import CodeHistogram
from lightning_qat.analysis.statistics.point_statistics import PointStatistics, weight_codes
from lightning_qat.quantization import ranks
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.planning.plan import PointPlan
from lightning_qat.quantization.region.region import Region


@dataclass(frozen=True)
class LayerStatisticsRow:
    """Statistics of one point; None where there is nothing to say (never reached, not calibrated, no snapshot).

    Args:
        point: name of the point.
        op_type: torch function of its op.
        role: ``activation`` or ``weight``.
        dtype: quantized type.
        scale: scale; the largest (coarsest) of a per-channel point.
        min: smallest value before quantization.
        max: largest value before quantization.
        mean: mean value.
        var: unbiased variance.
        clipped_share: share of the values whose code was outside the range of codes.
        used_share: distance from the smallest to the largest code hit, as a share of all codes (mean over channels).
        level_occupancy: share of the codes hit at least once, by any channel.
        rounding_energy: sum of the squared errors of the values inside the range.
        clipping_energy: sum of the squared errors of the values outside; with the above it adds up to the whole error.
        scale_drift: scale relative to the calibrated one, minus 1; of the channel that moved most.
        flip_rate: share of the integer weight codes that changed since the last snapshot.
        error_source: ``rounding`` or ``clipping``, whichever has more energy; ``none`` without error.
        sqnr: ``10 * log10(sum of squares / sum of squared errors)`` in dB.
        count: finite values seen.
        non_finite: NaN and infinities seen; they enter no other column.
        region: path of the target in the model, ``""`` for the model itself.
    """

    point: str
    op_type: str
    role: str
    dtype: str
    scale: float | None
    min: float | None
    max: float | None
    mean: float | None
    var: float | None
    clipped_share: float | None
    used_share: float | None
    level_occupancy: float | None
    rounding_energy: float | None
    clipping_energy: float | None
    scale_drift: float | None
    flip_rate: float | None
    error_source: str | None
    sqnr: float | None
    count: int
    non_finite: int
    region: str = ""


T = TypeVar("T", LayerStatisticsRow, CodeHistogram)


@dataclass(frozen=True)
class LayerStatisticsResult(Result[LayerStatisticsRow]):
    """One row per point of the plan, in execution order.

    Args:
        histograms: of the points that were quantized.
    """

    histograms: tuple[CodeHistogram, ...] = field(default=(), repr=False)

    title: ClassVar[str] = "Layer statistics"
    shown: ClassVar[tuple[str, ...]] = ("point", "dtype", "clipped_share", "used_share", "sqnr")

    def columns(self) -> tuple[str, ...]:
        """Names of all columns, also without rows."""
        return tuple(LayerStatisticsRow.__dataclass_fields__)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries; a row holds only primitives, so no deep copy is needed."""
        return [dict(vars(row)) for row in self.rows]

    @classmethod
    def merged(cls, results: Mapping[str, LayerStatisticsResult]) -> LayerStatisticsResult:
        """Put the results of several regions together, by the paths of their targets."""
        return cls(
            tuple(_in_region(row, name) for name, result in results.items() for row in result.rows),
            tuple(_in_region(one, name) for name, result in results.items() for one in result.histograms),
        )


def _in_region(one: T, region: str) -> T:
    return one if one.region == region else replace(one, region=region)


def layer_statistics(
    region: Region, batches: Iterable[object], calibrated: ScaleSnapshot | None = None
) -> LayerStatisticsResult:
    """Run batches through a region's target, in evaluation mode, and return the statistics of every point.

    Nothing of the region or its target is changed.

    Args:
        region: a calibrated region.
        batches: see :meth:`~lightning_qat.quantization.modules.call.Call.of`.
        calibrated: scales to measure the drift from; see :func:`scale_snapshot`.

    Example:
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> x = torch.linspace(-1, 1, 32).reshape(8, 4)
        >>> region = insert(model, (x,))
        >>> with region.state("observe"):
        ...     _ = model(x)
        >>> _ = region.compute_scales("minmax")
        >>> row = layer_statistics(region, [x]).rows[0]
        >>> row.point, row.min, row.max, row.clipped_share, row.count
        ('0.input0', -1.0, 1.0, 0.0, 32)
    """
    collector = StatisticsCollector(region, calibrated)
    with analysis_mode(region), collector:
        for batch in batches:
            with RepeatableForward(region.target, Call.of(batch)) as forward:
                forward()
    return collector.result()


ScaleSnapshot = dict[str, dict[str, object]]
"""Type and scale of every calibrated point; primitives and tensors, fit for a checkpoint."""

WeightCodes = dict[str, Tensor]
"""Integer codes of every weight point; memory: one byte per weight up to 8 bits, else four."""


def scale_snapshot(region: Region) -> ScaleSnapshot:
    """Copy the present scales, to tell later how far they have drifted."""
    return {
        name: {"dtype": fake_quant.dtype, "scale": fake_quant.scale.detach().cpu().clone()}
        for name, fake_quant in region.points.items()
        if fake_quant.scale_source is not None
    }


class StatisticsCollector:
    """Context manager that gathers statistics of every quantization that happens inside it.

    The region has to be in state ``quantize``. The user of the collector runs the forwards, in train or eval mode. A
    weight is measured once, when it is first met: it does not change between the batches of one pass.

    Args:
        region: the region to watch.
        calibrated: the scales from which the drift is measured.
        previous: codes of the weights at the last snapshot (``codes`` of an earlier collector).

    Attributes:
        codes: integer codes of the weights seen.
    """

    def __init__(
        self, region: Region, calibrated: ScaleSnapshot | None = None, previous: WeightCodes | None = None
    ) -> None:
        self.region = region
        self.calibrated = calibrated or {}
        self.previous = previous or {}
        self.codes: WeightCodes = {}
        self._points = region.points
        self._plans = region.plan.by_name
        self._statistics: dict[str, PointStatistics] = {}
        self._stack = ExitStack()

    def __enter__(self) -> StatisticsCollector:
        self._stack.enter_context(self.region.tap(self._collect))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @torch.no_grad()
    def _collect(self, name: str, value: Tensor, quantized: Tensor) -> None:
        fake_quant = self._points[name]
        if self._plans[name].is_weight and name in self._statistics:
            return
        statistics = self._statistics.setdefault(name, PointStatistics.of(fake_quant))
        statistics.update(value, quantized, fake_quant)
        if self._plans[name].is_weight and fake_quant.scale_source is not None:
            codes = weight_codes(value, fake_quant)
            self.codes[name] = codes
            before = self.previous.get(name)
            if before is not None and before.shape == codes.shape and before.dtype == codes.dtype:
                statistics.flipped = float((before != codes).sum())
                statistics.compared = float(codes.numel())

    def all_reduce(self) -> None:
        """Merge the statistics of all ranks, so that all have the same; every rank must call this.

        Activations are merged. Weights are the same on all ranks: those of the first rank that has met them are taken.
        Does nothing with one rank.
        """
        if ranks.count() == 1:
            return
        names = list(self._points)
        own = [self._statistics.get(n) or PointStatistics.of(self._points[n]) for n in names]
        packed = [statistics.to_tensors() for statistics in own]
        everywhere = [ranks.gathered(torch.cat([p[i] for p in packed]) if packed else torch.empty(0)) for i in (0, 1)]
        sizes = [[len(p[i]) for p in packed] for i in (0, 1)]
        self._statistics = {}
        for numbers, hits in zip(*everywhere, strict=True):
            parts = zip(names, own, numbers.split(sizes[0]), hits.split(sizes[1]), strict=True)
            for name, mine, point_numbers, point_hits in parts:
                other = PointStatistics.from_tensors(point_numbers, point_hits, mine.channels, mine.levels)
                if not other.count and not other.non_finite:
                    continue
                if name not in self._statistics:
                    self._statistics[name] = other
                elif not self._plans[name].is_weight:
                    self._statistics[name].merge(other)

    def result(self) -> LayerStatisticsResult:
        """Return what was gathered: a row for every point of the plan, in execution order."""
        kinds = self.region.graph.by_name
        return LayerStatisticsResult(
            tuple(
                self._row(plan, kinds[plan.op].kind, self._points[plan.name], self._statistics.get(plan.name))
                for plan in self.region.plan.points
            ),
            tuple(
                CodeHistogram.of(plan.name, self._points[plan.name], self._statistics[plan.name])
                for plan in self.region.plan.points
                if plan.name in self._statistics and self._statistics[plan.name].quantized
            ),
        )

    def _row(
        self, plan: PointPlan, op_type: str, fake_quant: FakeQuantize, found: PointStatistics | None
    ) -> LayerStatisticsRow:
        s = found or PointStatistics.of(fake_quant)
        source = "clipping" if s.clipping > s.rounding else "rounding" if s.rounding else "none"
        return LayerStatisticsRow(
            point=plan.name,
            op_type=op_type,
            role=plan.scale_role,
            dtype=fake_quant.dtype,
            scale=float(fake_quant.scale.detach().max()) if fake_quant.scale_source is not None else None,
            min=s.low if s.count else None,
            max=s.high if s.count else None,
            mean=s.mean if s.count else None,
            var=s.var,
            clipped_share=s.clipped / s.quantized if s.quantized else None,
            used_share=s.used_share,
            level_occupancy=s.level_occupancy if s.quantized else None,
            rounding_energy=s.rounding if s.quantized else None,
            clipping_energy=s.clipping if s.quantized else None,
            scale_drift=_drift(fake_quant, self.calibrated.get(plan.name)),
            flip_rate=s.flipped / s.compared if s.compared else None,
            error_source=source if s.quantized else None,
            sqnr=s.sqnr,
            count=int(s.count),
            non_finite=int(s.non_finite),
        )


def _drift(fake_quant: FakeQuantize, calibrated: dict[str, object] | None) -> float | None:
    """Relative change of the scale that moved most; None if the type has changed, which changes every scale."""
    if calibrated is None or fake_quant.scale_source is None or calibrated["dtype"] != fake_quant.dtype:
        return None
    before = calibrated["scale"]
    now = fake_quant.scale.detach().cpu().reshape(-1)
    if not isinstance(before, Tensor) or before.numel() != now.numel():
        return None
    if torch.equal(now, before.reshape(-1)):
        return 0.0
    change = now.double() / before.double().reshape(-1) - 1.0
    return float(change[change.abs().argmax()])
