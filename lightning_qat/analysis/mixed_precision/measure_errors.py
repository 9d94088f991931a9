"""Measuring what every point at every type does to the output: ``measure_errors(region, batches)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_qat.analysis.influence import influence_on
from lightning_qat.analysis.mixed_precision.measured_forwards import Pair, measure_forwards
from lightning_qat.analysis.mixed_precision.model_hashes import hash_of_tensors, hashes_of
from lightning_qat.analysis.mixed_precision.op_costs import op_costs
from lightning_qat.analysis.mixed_precision.point_quantizers import (
    Quantizers,
    ordered_dtypes,
    plans_by_dtype,
    quantizers_by_dtype,
)
from lightning_qat.analysis.mixed_precision.precision_errors import Check, PointError, PrecisionErrors
from lightning_qat.analysis.mixed_precision.raised_together import raised_together
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.analysis.sensitivity.run_sketch import run_sketch
from lightning_qat.analysis.sensitivity.sensitivity_sketch import Sketch, forwards_of_sketch
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.tensor_leaves import call_leaves
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile, planned_profile
from lightning_qat.quantization.region.region import Region


def measure_errors(
    region: Region,
    batches: Iterable[object],
    dtypes: Sequence[str] = ("int8", "int16"),
    output: str | Callable[[Any], Any] | None = None,
    post_process: Callable[[Any], Any] | None = None,
    *,
    profile: HardwareProfile | str | Path | None = None,
    probes: int = 4,
    confirm: int | None = None,
    seed: int = 0,
    across_ranks: bool = False,
) -> PrecisionErrors:
    """Measure the output error of every point at every type, from one calibration and one set of gradients.

    All errors are estimated by one sketch (see :mod:`~lightning_qat.analysis.sensitivity.sensitivity_sketch`): the
    gradients are the same for all types, only the error of the tensor differs. Points that act on the output without a
    gradient are measured, one forward for each of them, type and batch; so are the points with the largest estimates,
    at the narrowest type, as the choice rests on them. Errors of several points add up as long as the
    output has not collapsed, so the result answers which points to raise without any more data:
    :meth:`~lightning_qat.analysis.mixed_precision.precision_errors.PrecisionErrors.choose`. One forward per type with
    all points quantized tells how good that sum is. Nothing of the region is changed.

    Args:
        region: a calibrated region. Its type at present does not matter: scales for each type are derived from the
            statistics that calibration kept.
        batches: see :meth:`~lightning_qat.quantization.modules.call.Call.of`.
        dtypes: at least two types; points are raised from the narrowest. Overrides that give a point a type stay.
        output: path into the output such as ``map.layer_3``, or a callable on it; None: all its tensors.
        post_process: applied to the chosen output in float, such as ``torch.sigmoid``.
        profile: the hardware that the region was planned for; needed only if it is not a shipped one.
        probes: backward passes per batch.
        confirm: how many of the largest estimates are measured; as many as cost what the sketch costs if not given.
        seed: of the probes, and of the random numbers that the forward draws.
        across_ranks: every rank calls this with its own batches; the result is that of all batches, on all ranks.

    Raises:
        ConfigurationError: nothing is calibrated, a type does not exist, no point has more than one of the types, there
            is no batch, the output does not exist, or no gradient reaches the points.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.region.calibration import calibrate
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> x = torch.randn(32, 8)
        >>> region = insert(model, (x,))
        >>> _ = calibrate(region, [x])
        >>> errors = measure_errors(region, [x])
        >>> choice = errors.choose(top=1)
        >>> len(choice.overrides), choice.predicted < choice.narrowest
        (1, True)
    """
    types = ordered_dtypes(dtypes)
    hardware = hardware_profile(profile) or planned_profile(region.plan)
    plans = plans_by_dtype(region, types, hardware)
    quantizers = quantizers_by_dtype(region, plans)
    if not quantizers:
        raise ConfigurationError("no point has a scale: calibrate the region before measuring errors.")
    raisable = {name: own for name, own in quantizers.items() if len(own) > 1}
    if not raisable:
        raise ConfigurationError(
            f"there is nothing to raise: the hardware and the overrides leave every point one of {', '.join(types)}. "
            "Name other dtypes, or take out overrides that fix the type."
        )
    calls = [Call.of(batch) for batch in batches]
    select = OutputSelector(output, post_process)
    measuring = _Measuring(region, select, quantizers, seed, across_ranks)
    sketch = measuring.sketch(calls, probes)
    alone = measuring.without_gradient(sketch, output if isinstance(output, str) else None)
    alone += measuring.largest(sketch, set(alone), forwards_of_sketch(probes) if confirm is None else confirm)
    measured, power, together = measure_forwards(
        region, calls, select, measuring.quantizers, alone, seed, across_ranks=across_ranks
    )
    rows, not_reached = _rows(region, quantizers, sketch, measured)
    reached = {row.point for row in rows}
    narrow = {name: next(iter(own)) for name, own in raisable.items() if name in reached}
    wide = {name: list(raisable[name])[-1] for name in narrow}
    return PrecisionErrors(
        tuple(rows),
        dtypes=types,
        output=select.description,
        batches=sketch.batches,
        power=power,
        checks=tuple(Check(d, _predicted(rows, d), error) for d, error in together.items()),
        together=raised_together(region, hardware, narrow, wide),
        ops=op_costs(region),
        latency=dict(hardware.cost) if hardware is not None else {},
        not_reached=tuple(not_reached),
        hashes={
            **hashes_of(region),
            "data": hash_of_tensors(t for call in calls for t in call_leaves(call.args, call.kwargs)),
        },
    )


class _Measuring:
    """The forwards and backward passes."""

    def __init__(
        self, region: Region, select: OutputSelector, quantizers: Quantizers, seed: int, across_ranks: bool
    ) -> None:
        self.region = region
        self.select = select
        self.quantizers = {name: own for name, own in quantizers.items() if own}
        self.seed = seed
        self.across_ranks = across_ranks

    def sketch(self, calls: list[Call], probes: int) -> Sketch:
        """Estimate all points at all types."""
        named = {p: {_name(p, dtype): fq for dtype, fq in own.items()} for p, own in self.quantizers.items()}
        sketch = Sketch(self.region, list(named), self.select, probes, self.seed, alternatives=named)
        if problem := run_sketch(sketch, calls, self.across_ranks):
            raise ConfigurationError(
                f"errors cannot be measured, as {problem}. Choose an output before the op without a derivative."
            )
        if sketch.batches == 0:
            raise ConfigurationError("there was no batch to measure errors on.")
        return sketch

    def without_gradient(self, sketch: Sketch, path: str | None) -> list[Pair]:
        """Return the points and types that the sketch cannot see, though they act on the output."""
        influence = influence_on(self.region.graph, path)
        return [
            (point, dtype)
            for point, own in self.quantizers.items()
            for dtype in own
            if sketch.estimates[_name(point, dtype)].failed
            and (sketch.left_torch or influence.reaches(self.region.plan.by_name[point].op))
        ]

    def largest(self, sketch: Sketch, known: Container[Pair], count: int) -> list[Pair]:
        """Return so many points with the largest estimates at their narrowest type."""
        narrowest = [(point, next(iter(own))) for point, own in self.quantizers.items()]
        unknown = [pair for pair in narrowest if pair not in known and sketch.estimates[_name(*pair)].reached]
        return sorted(unknown, key=lambda pair: -sketch.mse(_name(*pair))[0])[:count]


def _rows(
    region: Region, quantizers: Quantizers, sketch: Sketch, measured: Mapping[Pair, float]
) -> tuple[list[PointError], list[str]]:
    rows, not_reached = [], []
    for point, own in quantizers.items():
        planned = region.plan.by_name[point]
        names = point, planned.op, region.graph.by_name[planned.op].kind, planned.scale_role
        if not own or not any(sketch.estimates[_name(point, dtype)].reached for dtype in own):
            not_reached.append(point)
            continue
        for dtype in own:
            exact = (point, dtype) in measured
            mse, standard_error = (measured[point, dtype], 0.0) if exact else sketch.mse(_name(point, dtype))
            error = None if math.isnan(standard_error) else standard_error
            rows.append(PointError(*names, dtype, mse if mse < _INFINITE else _INFINITE, error, exact))
    return rows, not_reached


_INFINITE = 1e100
"""Stands for an error that is no finite number: sums and differences of it are still numbers."""


def _predicted(rows: list[PointError], dtype: str) -> float:
    """Sum of the errors with all points at a type, or at their widest where they do not have it."""
    by_point: dict[str, dict[str, float]] = {}
    for row in rows:
        by_point.setdefault(row.point, {})[row.dtype] = row.mse
    return math.fsum(own.get(dtype, list(own.values())[-1]) for own in by_point.values())


def _name(point: str, dtype: str) -> str:
    return f"{point} {dtype}"
