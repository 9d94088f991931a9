"""Measuring what every point of one region at every type does to the region's output."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_qat.analysis.influence import influence_on
from lightning_qat.analysis.mixed_precision.balanced_outputs import balanced
from lightning_qat.analysis.mixed_precision.measured_forwards import Chosen, measure_forwards
from lightning_qat.analysis.mixed_precision.op_costs import op_costs
from lightning_qat.analysis.mixed_precision.point_errors import Check, PointError, finite_error
from lightning_qat.analysis.mixed_precision.point_quantizers import Quantizers, at_dtype, dtypes_of, type_for
from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from lightning_qat.analysis.mixed_precision.raised_together import raised_together
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.analysis.sensitivity.sensitivity_sketch import Sketch, forwards_of_sketch
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.region.region import Region

Pair = tuple[str, str]
"""A point and a type."""


@dataclass(frozen=True)
class MeasuringOptions:
    """How errors are measured.

    Args:
        profile: the hardware that the regions were planned for; None without.
        probes: backward passes per batch.
        confirm: how many of the largest estimates are measured; as many as cost what the sketch costs if not given.
        seed: of the probes, and of the random numbers that the forward draws.
        across_ranks: every rank measures with its own batches; the result is that of all batches.
    """

    profile: HardwareProfile | None = None
    probes: int = 4
    confirm: int | None = None
    seed: int = 0
    across_ranks: bool = False

    @property
    def measured(self) -> int:
        """How many of the largest estimates are measured."""
        return forwards_of_sketch(self.probes) if self.confirm is None else self.confirm


def region_errors(
    region: Region,
    quantizers: Quantizers,
    calls: Sequence[Call],
    select: OutputSelector,
    options: MeasuringOptions,
    without_scale: Mapping[str, tuple[str, ...]],
) -> PrecisionErrors:
    """Measure the output error of every point of one region at every type.

    Points without a scale have no error, and those that no batch runs none that is known; they count as 0. Both have
    rows, as they can be raised, alone or with a point that the hardware ties to them.

    Args:
        region: a calibrated region.
        quantizers: of its points at each type.
        calls: the inputs.
        select: the chosen output.
        options: of the measurement.
        without_scale: the types of points that have none.

    Raises:
        ConfigurationError: there is no batch, the output does not exist, or no gradient reaches the points.
    """
    select = balanced(region, calls, select, options.seed, options.across_ranks)
    measuring = _Measuring(region, select, quantizers, options)
    sketch = measuring.sketch(calls)
    alone = measuring.without_gradient(sketch)
    alone += measuring.largest(sketch, set(alone))
    chosen: dict[Pair | str, Chosen] = {(p, dtype): {p: quantizers[p][dtype]} for p, dtype in alone}
    types = dtypes_of(quantizers)
    chosen |= {dtype: at_dtype(quantizers, dtype) for dtype in types}
    measured, power = measure_forwards(region, calls, select, chosen, options.seed, across_ranks=options.across_ranks)
    known = _of_the_same({pair: measured[pair] for pair in alone}, quantizers)
    rows, not_reached = _rows(region, quantizers, without_scale, sketch, known)
    checks = tuple(Check(dtype, _predicted(rows, dtype), finite_error(measured[dtype])) for dtype in types)
    return replace(
        _facts(region, options, rows, not_reached),
        output=select.description,
        batches=sketch.batches,
        power=power,
        checks=checks,
    )


def _of_the_same(measured: Mapping[Pair, float], quantizers: Quantizers) -> dict[Pair, float]:
    """What was measured, for all types at which the point has the fake-quant that it was measured with."""
    found = dict(measured)
    for (point, dtype), error in measured.items():
        own = quantizers[point]
        found |= {(point, other): error for other in own if own[other] is own[dtype]}
    return found


def unknown_errors(
    region: Region, quantizers: Quantizers, options: MeasuringOptions, without_scale: Mapping[str, tuple[str, ...]]
) -> PrecisionErrors:
    """Return the errors of a region that no batch runs: nothing is known, and all points have rows.

    Args:
        region: a calibrated region.
        quantizers: of its points at each type.
        options: of the measurement.
        without_scale: the types of points that have none.
    """
    return _facts(region, options, *_rows(region, quantizers, without_scale))


def _facts(
    region: Region, options: MeasuringOptions, rows: list[PointError], not_reached: list[str]
) -> PrecisionErrors:
    """What follows from the rows, the plan and the hardware."""
    types: dict[str, list[str]] = {}
    for row in rows:
        types.setdefault(row.point, []).append(row.dtype)
    narrow = {name: own[0] for name, own in types.items() if len(own) > 1}
    wide = {name: types[name][-1] for name in narrow}
    hardware = options.profile
    return PrecisionErrors(
        tuple(rows),
        together=raised_together(region, hardware, narrow, wide),
        ops=op_costs(region),
        latency=dict(hardware.cost) if hardware is not None else {},
        not_reached=tuple(not_reached),
    )


class _Measuring:
    """The forwards and backward passes."""

    def __init__(
        self, region: Region, select: OutputSelector, quantizers: Quantizers, options: MeasuringOptions
    ) -> None:
        self.region = region
        self.select = select
        self.quantizers = {name: own for name, own in quantizers.items() if own}
        self.options = options

    def sketch(self, calls: Sequence[Call]) -> Sketch:
        """Estimate all points at all types."""
        named = {p: {_name(p, dtype): fq for dtype, fq in own.items()} for p, own in self.quantizers.items()}
        options = self.options
        sketch = Sketch(self.region, list(named), self.select, options.probes, options.seed, alternatives=named)
        if problem := sketch.add(calls, options.across_ranks):
            raise ConfigurationError(
                f"errors cannot be measured, as {problem}. Choose an output before the op without a derivative."
            )
        if sketch.batches == 0:
            raise ConfigurationError("there was no batch to measure errors on.")
        return sketch

    def without_gradient(self, sketch: Sketch) -> list[Pair]:
        """Return the points and types that the sketch cannot see, though they act on the output."""
        path = self.select.output if isinstance(self.select.output, str) else None
        influence = influence_on(self.region.graph, path)
        return [
            (point, dtype)
            for point, own in self.quantizers.items()
            for dtype in own
            if sketch.estimates[_name(point, dtype)].failed
            and (sketch.left_torch or influence.reaches(self.region.plan.by_name[point].op))
        ]

    def largest(self, sketch: Sketch, known: Container[Pair]) -> list[Pair]:
        """Return the points with the largest estimates, at their narrowest type."""
        narrowest = [(point, next(iter(own))) for point, own in self.quantizers.items()]
        unknown = [pair for pair in narrowest if pair not in known and sketch.estimates[_name(*pair)].reached]
        return sorted(unknown, key=lambda pair: -sketch.mse(_name(*pair))[0])[: self.options.measured]


def _rows(
    region: Region,
    quantizers: Quantizers,
    without_scale: Mapping[str, tuple[str, ...]],
    sketch: Sketch | None = None,
    measured: Mapping[Pair, float] | None = None,
) -> tuple[list[PointError], list[str]]:
    """The rows of all points, and the points that no batch ran."""
    rows, not_reached = [], []
    for planned in region.plan.points:
        point = planned.name
        names = point, planned.op, region.graph.by_name[planned.op].kind, planned.scale_role
        for dtype in without_scale.get(point, ()):
            rows.append(PointError(*names, dtype, 0.0, 0.0, True))
        own = quantizers.get(point, {})
        reached = sketch is not None and any(sketch.estimates[_name(point, dtype)].reached for dtype in own)
        if own and not reached:
            not_reached.append(point)
        for dtype in own:
            if measured and (point, dtype) in measured:
                rows.append(PointError(*names, dtype, finite_error(measured[point, dtype]), 0.0, True))
            elif sketch is not None and reached:
                mse, standard_error = sketch.mse(_name(point, dtype))
                error = None if math.isnan(standard_error) else standard_error
                rows.append(PointError(*names, dtype, finite_error(mse), error, False))
            else:
                rows.append(PointError(*names, dtype, 0.0, None, False))
    return rows, not_reached


def _predicted(rows: list[PointError], dtype: str) -> float:
    """Sum of the errors with all points at a type, or at the type they have there."""
    by_point: dict[str, dict[str, float]] = {}
    for row in rows:
        by_point.setdefault(row.point, {})[row.dtype] = row.mse
    return math.fsum(own[type_for(dtype, own)] for own in by_point.values())


def _name(point: str, dtype: str) -> str:
    return f"{point} {dtype}"
