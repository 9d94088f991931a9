"""Gathering the evidence of every point while batches stream through.

The memory for a point does not depend on how many values it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_qat.analysis.comparison.point_evidence import AxisProfile, Octave, PointEvidence
from lightning_qat.analysis.model_check.divided_values import constant_inputs, divisors
from lightning_qat.analysis.model_check.long_loops import long_loops
from lightning_qat.analysis.statistics.point_ranges import observed_range, representable_range
from lightning_qat.analysis.statistics.point_statistics import CHUNK, PointStatistics
from lightning_qat.quantization import ranks
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.planning.plan import PointPlan
from lightning_qat.quantization.region.region import Region

_EXPONENTS = 128
_LONGEST_AXIS = 4096
"""A longer axis is not split by hand."""


class EvidenceCollector:
    """Gathers the evidence of every point of a region from the values that arrive at it.

    Args:
        region: a calibrated region.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self._points = region.points
        self._plans = region.plan.by_name
        self._divides = divisors(region)
        self._constants = constant_inputs(region)
        self._loops = loops_by_op(region)
        self._gathered = {
            name: _Gathered(PointStatistics.of(point))
            for name, point in self._points.items()
            if point.scale_source is not None
        }

    @torch.no_grad()
    def add(self, name: str, value: Tensor) -> None:
        """Add what arrives at a point. A weight is looked at once: it does not change between batches."""
        gathered = self._gathered.get(name)
        if gathered is None or not value.is_floating_point():
            return
        plan = self._plans[name]
        if plan.is_weight and gathered.statistics.count:
            return
        point = self._points[name]
        quantized = point.forward(value)
        gathered.statistics.update(value, quantized, point)
        gathered.add_magnitudes(value, quantized)
        every = name in self._divides
        # the first axis of data is that of the samples, which no scale can follow
        axes = range(name not in self._constants, value.dim()) if every else _channel_axis(value, plan)
        for axis in axes:
            gathered.add_axis(value, axis)

    def all_reduce(self) -> None:
        """Combine the evidence of all ranks (but for the profiles along axes); every rank must call this."""
        if ranks.count() == 1:
            return
        for name, gathered in self._gathered.items():
            own = gathered.statistics
            numbers, hits = own.to_tensors()
            packed = [torch.cat([numbers, gathered.octaves.flatten(), gathered.zeroed]), hits]
            everywhere = [ranks.gathered(part) for part in packed]
            size = len(numbers)
            merged: PointStatistics | None = None
            octaves, zeroed = torch.zeros_like(gathered.octaves), torch.zeros_like(gathered.zeroed)
            for both, rank_hits in zip(*everywhere, strict=True):
                other = PointStatistics.from_tensors(both[:size], rank_hits, own.channels, own.levels)
                if not other.count or (merged is not None and self._plans[name].is_weight):
                    continue
                octaves += both[size : size + octaves.numel()].reshape(octaves.shape)
                zeroed += both[size + octaves.numel() :]
                if merged is None:
                    merged = other
                else:
                    merged.merge(other)
            gathered.statistics, gathered.octaves, gathered.zeroed = merged or own, octaves, zeroed

    def evidence(self) -> tuple[PointEvidence, ...]:
        """Return the evidence of every point that has a scale and saw a value, in execution order."""
        return tuple(
            self._evidence(self._plans[name], self._points[name], gathered)
            for name, gathered in self._gathered.items()
            if gathered.statistics.count
        )

    def _evidence(self, plan: PointPlan, point: FakeQuantize, gathered: _Gathered) -> PointEvidence:
        s = gathered.statistics
        calls = tuple(ends for ends in self.region.call_ranges.points.get(plan.name, ()) if ends[0] <= ends[1])
        return PointEvidence(
            point=plan.name,
            op_type=self.region.graph.by_name[plan.op].kind,
            role=plan.role,
            dtype=point.dtype,
            bits=(point.quant_max - point.quant_min + 1 + int(point.narrow_range)).bit_length() - 1,
            scheme=point.scheme,
            observer=point.observer,
            fixed_scale=point.fixed_scale,
            scale=float(point.scale.detach().max()),
            quant_max=point.quant_max,
            representable=representable_range(point),
            min=s.low,
            max=s.high,
            count=int(s.count),
            signal=s.signal,
            rounding=s.rounding,
            clipping=s.clipping,
            clipped=int(s.clipped),
            used_share=s.used_share,
            codes=round(s.level_occupancy * s.levels),
            octaves=gathered.found_octaves(),
            vanished=gathered.vanished,
            calibrated=observed_range(point) if point.scale.numel() == 1 else None,
            calls=calls if len(calls) > 1 else (),
            divides=self._divides.get(plan.name, ()),
            profiles=gathered.profiles(),
            scales=point.scale.numel(),
            channels=self._channels(plan),
            loop=self._loops.get(plan.op, ""),
        )

    def _channels(self, plan: PointPlan) -> int:
        op = self.region.graph.by_name[plan.op]
        if not plan.is_weight or op.weight_axis is None:
            return 1
        return next(o.shape[op.weight_axis] for o in op.operands if o.index == plan.operand)


def with_configuration(
    evidence: tuple[PointEvidence, ...],
    requests: Mapping[str, tuple[str, str]],
    types: Mapping[str, tuple[str, ...]],
) -> tuple[PointEvidence, ...]:
    """Add to the evidence: a requested type that is not in effect, an explanation, and the types of the hardware."""
    nothing = ("", "")
    return tuple(
        replace(
            e,
            requested=requests.get(e.point, nothing)[0],
            request=requests.get(e.point, nothing)[1],
            types=types.get(e.point, ()),
        )
        for e in evidence
    )


def loops_by_op(region: Region) -> dict[str, str]:
    """Map every op that is a round of a long loop to a description of its line."""
    return {name: str(line) for line, names in long_loops(region.graph).items() for name in names}


class _Gathered:
    def __init__(self, statistics: PointStatistics) -> None:
        self.statistics = statistics
        self.octaves = torch.zeros(_EXPONENTS, 2, dtype=torch.float64)  # count, sum of squared relative errors
        self.zeroed = torch.zeros(2, dtype=torch.float64)  # values that are not zero, and those that become zero
        self._axes: dict[int, tuple[Tensor, Tensor] | None] = {}

    @property
    def vanished(self) -> float:
        return float(self.zeroed[1] / self.zeroed[0]) if self.zeroed[0] else 0.0

    def add_magnitudes(self, value: Tensor, quantized: Tensor) -> None:
        for x, q in zip(value.reshape(-1).split(CHUNK), quantized.reshape(-1).split(CHUNK), strict=True):
            chosen = x.isfinite() & (x != 0)
            x, q = x[chosen].double(), q[chosen].double()
            if not x.numel():
                continue
            exponents = (torch.frexp(x)[1].long() - 1 + _EXPONENTS // 2).clamp_(0, _EXPONENTS - 1)
            relative = ((q - x) / x).square()
            counts = torch.bincount(exponents, minlength=_EXPONENTS).double()
            self.octaves += torch.stack([counts, torch.bincount(exponents, relative, _EXPONENTS)], 1).cpu()
            self.zeroed += torch.stack([counts.sum(), (q == 0).sum().double()]).cpu()

    def add_axis(self, value: Tensor, axis: int) -> None:
        if value.shape[axis] > _LONGEST_AXIS or not value.numel():
            return
        rows = value.detach().movedim(axis, 0).reshape(value.shape[axis], -1)
        usable = rows.isfinite() & (rows != 0)
        largest = torch.where(usable, rows, 0).abs().amax(1).double().cpu()
        inverse = torch.where(usable, rows, torch.inf).double().square().reciprocal().sum(1).cpu()
        if axis in self._axes:
            known = self._axes[axis]
            if known is None or len(known[0]) != len(largest):
                self._axes[axis] = None  # its length follows the data
                return
            largest, inverse = torch.maximum(known[0], largest), known[1] + inverse
        self._axes[axis] = largest, inverse

    def found_octaves(self) -> tuple[Octave, ...]:
        return tuple(
            Octave(index - _EXPONENTS // 2, int(count), math.sqrt(squares / count))
            for index, (count, squares) in enumerate(self.octaves.tolist())
            if count
        )

    def profiles(self) -> tuple[AxisProfile, ...]:
        return tuple(
            AxisProfile(axis, tuple(found[0].tolist()), tuple(found[1].tolist()))
            for axis, found in self._axes.items()
            if found is not None
        )


def _channel_axis(value: Tensor, plan: PointPlan) -> tuple[int, ...]:
    """Where the channels of an activation with one scale are: axis 1 of pictures, else the last."""
    if plan.is_weight or plan.axis is not None or value.dim() < 2:
        return ()
    return (1 if value.dim() > 3 else value.dim() - 1,)
