"""Gathering the evidence of every point while batches stream through.

The memory for a point does not depend on how many values it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_qat.analysis.comparison.axis_sums import SumsByAxis
from lightning_qat.analysis.comparison.point_evidence import AxisProfile, Octave, PointEvidence
from lightning_qat.analysis.comparison.populations import Population, lost_populations
from lightning_qat.analysis.comparison.tensor_makers import TensorMakers
from lightning_qat.analysis.model_check.divided_values import constant_inputs, divisors
from lightning_qat.analysis.model_check.long_loops import long_loops
from lightning_qat.analysis.statistics.affine_gain import affine_gain
from lightning_qat.analysis.statistics.point_ranges import observed_range, representable_range
from lightning_qat.analysis.statistics.point_statistics import CHUNK, PointStatistics
from lightning_qat.quantization import ranks
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.numerics.channel_groups import channel_rows, swap_within_groups
from lightning_qat.quantization.numerics.scales import MIN_SCALE
from lightning_qat.quantization.planning.plan import PointPlan
from lightning_qat.quantization.planning.weight_channels import WeightChannels, weight_channels
from lightning_qat.quantization.region.region import Region

_EXPONENTS = 128
_CUTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Ranges that are tried for a weight, relative to the largest magnitude: few bits gain from a shorter one."""


class EvidenceCollector:
    """Gathers the evidence of every point of a region from the values that arrive at it.

    Args:
        region: a calibrated region.

    Attributes:
        makers: which op made the values of a tensor.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        region.scales.observe_weights_again()  # the range of a weight is part of its evidence
        self._points = region.points
        self._plans = region.plan.by_name
        self._divides = divisors(region)
        self._constants = constant_inputs(region)
        self._loops = loops_by_op(region)
        self.makers = TensorMakers(region)
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
        if plan.is_weight:
            self._add_weight(gathered, value, quantized, plan)
            return
        if plan.axis is None:
            axes, gathered.along.profiled = self._axes(plan, value.dim())
            gathered.along.axes.add(value, quantized, axes)

    def _axes(self, plan: PointPlan, dims: int) -> tuple[list[int], tuple[int, ...]]:
        """The axes of an activation with one scale to look along, and those of them that a split may follow."""
        if plan.name in self._divides:
            # the first axis of data is that of the samples, which no scale can follow
            every = tuple(range(plan.name not in self._constants, dims))
            return list(every), every
        if dims < 2:
            return [part.axis for part in self.makers.parts(plan)[:1] if part.axis < dims], ()
        channels = 1 if dims > 3 else dims - 1
        joined = [part.axis for part in self.makers.parts(plan)[:1] if part.axis < dims]
        return sorted({1, channels, dims - 1, *joined}), (channels,)

    def _add_weight(self, gathered: _Gathered, value: Tensor, quantized: Tensor, plan: PointPlan) -> None:
        """Look along the inputs of a weight; if it has one scale also along its channels, and try a scale for each."""
        held = self._held(plan)
        if held.axis not in (0, 1) or value.dim() < 2:
            return
        if held.groups > 1:  # no axis of its own layout holds the channels
            value, quantized = (swap_within_groups(tensor, held.groups) for tensor in (value, quantized))
        axis = held.axis if held.groups == 1 else 0
        gathered.along.axes.add(value, quantized, [1 - axis] if plan.axis is not None else [0, 1])
        gathered.along.channels = axis
        if plan.axis is None:
            gathered.along.per_channel = _per_channel_error(channel_rows(value, axis), self._points[plan.name])

    def _held(self, plan: PointPlan) -> WeightChannels:
        op = self.region.graph.by_name[plan.op]
        return weight_channels(op, op.operand(plan.operand))

    def all_reduce(self) -> None:
        """Combine the evidence of all ranks; every rank must call this."""
        if ranks.count() == 1:
            return
        every = ranks.gathered_objects(self._gathered)
        for name, own in self._gathered.items():
            merged, *others = [rank[name] for rank in every if rank[name].statistics.count] or [own]
            for other in others if not self._plans[name].is_weight else ():
                merged.merge(other)
            self._gathered[name] = merged

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
            populations=self._populations(plan, point, gathered),
            leaves=plan.role == "output" and plan.op in self.makers.leaving,
            given=self.makers.given(plan),
            channel_axis=gathered.along.channels,
            affine_gain=affine_gain(point) if not plan.is_weight else None,
            per_channel=gathered.along.per_channel,
            scales=point.scale.numel(),
            channels=self._channels(plan),
            loop=self._loops.get(plan.op, ""),
        )

    def _populations(self, plan: PointPlan, point: FakeQuantize, gathered: _Gathered) -> tuple[Population, ...]:
        sums = gathered.along.axes.known
        if not sums or not bool(point.scale.isfinite().all()):
            return ()
        scale = float(point.scale.detach().max())
        highest = max(map(abs, representable_range(point))) + scale / 2
        parts = () if plan.is_weight else self.makers.parts(plan)
        bound = None if plan.is_weight else self.makers.bound(plan)
        return lost_populations(sums, point.quant_max, scale, highest, parts, bound)

    def _channels(self, plan: PointPlan) -> int:
        if not plan.is_weight:
            return 1
        shape = self.region.graph.by_name[plan.op].operand(plan.operand).shape
        return self._held(plan).count(shape) or 1


def with_configuration(
    evidence: tuple[PointEvidence, ...],
    requests: Mapping[str, tuple[str, str]],
    types: Mapping[str, tuple[str, ...]],
    styles: Mapping[str, tuple[str, ...]],
) -> tuple[PointEvidence, ...]:
    """Note at every point which type was asked for and is not in effect, that in words, and what the hardware has.

    Args:
        evidence: of all points.
        requests: type and explanation, by point.
        types: those that the hardware has, by point.
        styles: schemes and granularities that the hardware has, by point.
    """
    nothing = ("", "")
    return tuple(
        replace(
            e,
            requested=requests.get(e.point, nothing)[0],
            request=requests.get(e.point, nothing)[1],
            types=types.get(e.point, ()),
            styles=styles.get(e.point, ()),
        )
        for e in evidence
    )


def loops_by_op(region: Region) -> dict[str, str]:
    """Map every op that is a round of a long loop to a description of its line."""
    return {name: str(line) for line, names in long_loops(region.graph).items() for name in names}


@dataclass
class _Along:
    """What is kept along axes.

    Args:
        axes: the sums.
        profiled: axes that a split may follow.
        per_channel: sum of squared errors with a scale per channel, of a weight.
        channels: the axis of the sums that holds the output channels of a weight.
    """

    axes: SumsByAxis = field(default_factory=SumsByAxis)
    profiled: tuple[int, ...] = ()
    per_channel: float | None = None
    channels: int | None = None


class _Gathered:
    def __init__(self, statistics: PointStatistics) -> None:
        self.statistics = statistics
        self.octaves = torch.zeros(_EXPONENTS, 2, dtype=torch.float64)  # count, sum of squared relative errors
        self.zeroed = torch.zeros(2, dtype=torch.float64)  # values that are not zero, and those that become zero
        self.along = _Along()

    def merge(self, other: _Gathered) -> None:
        """Add what another rank has gathered."""
        self.statistics.merge(other.statistics)
        self.octaves += other.octaves
        self.zeroed += other.zeroed
        self.along.axes.merge(other.along.axes)

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

    def found_octaves(self) -> tuple[Octave, ...]:
        return tuple(
            Octave(index - _EXPONENTS // 2, int(count), math.sqrt(squares / count))
            for index, (count, squares) in enumerate(self.octaves.tolist())
            if count
        )

    def profiles(self) -> tuple[AxisProfile, ...]:
        return tuple(
            AxisProfile(axis, tuple(sums.largest.tolist()), tuple(sums.inverse_squares.tolist()))
            for axis, sums in self.along.axes.known.items()
            if axis in self.along.profiled
        )


def _per_channel_error(rows: Tensor, point: FakeQuantize) -> float:
    """Quantize with a scale per row; one that cuts the largest values off where the observer would."""
    rows = rows.detach().double()
    rows = torch.where(rows.isfinite(), rows, 0.0)
    widest = rows.abs().amax(1, keepdim=True).clamp(min=MIN_SCALE) / point.quant_max
    best = torch.full_like(widest, torch.inf)
    for factor in _CUTS if point.observer in ("mse", "percentile", "kl") else _CUTS[:1]:
        scale = widest * factor
        codes = (rows / scale).round_().clamp_(point.quant_min, point.quant_max)
        best = torch.minimum(best, (codes * scale - rows).square_().sum(1, keepdim=True))
    return float(best.sum())
