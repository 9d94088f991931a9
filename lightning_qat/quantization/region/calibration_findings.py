"""Problems that calibration saw, and their messages: findings with one cause share a message."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_qat.quantization.interception.code_locations import is_installed
from lightning_qat.quantization.planning.plan import PointPlan
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.tracing.op_graph import OpGraph
from lightning_qat.quantization.tracing.tensor_origins import TensorOrigins

FindingKind = Literal["nan", "inf", "constant", "starts at zero", "no data", "unplanned"]


@dataclass(frozen=True)
class CalibrationFinding:
    """A problem that calibration saw.

    Args:
        kind: ``nan``, ``inf``: activations that are not finite. ``constant``: only zeros, so there is no scale.
            ``starts at zero``: one value only, because a parameter is zero that training will move.
            ``no data``: the point was never reached. ``unplanned``: an op that was not seen while tracing.
        point: point name (or place in the code).
        batch: the number of the batch in which it was first seen; None if unknown.
        message: what it means and what to do.
        origin: the point where it began, which can be the point itself. NaN and infinities spread from there to
            everything that is computed from them.
    """

    kind: FindingKind
    point: str
    batch: int | None
    message: str
    origin: str


def finding(kind: Literal["constant", "no data", "unplanned"], path: str, name: str) -> CalibrationFinding:
    """Return a finding about one point (or place in the code) of the region of the target ``path``."""
    qualified = _qualified(path, name)
    message = _INSTALLED if kind == "unplanned" and is_installed(name) else _MESSAGES[kind]
    return CalibrationFinding(kind, qualified, None, message.format(name=qualified), qualified)


def starting(path: str, name: str, parameter: str) -> CalibrationFinding:
    """Return what there is to say of a point that does not vary until training moves a parameter."""
    qualified = _qualified(path, name)
    message = _STARTS_AT_ZERO.format(name=qualified, parameter=_qualified(path, parameter))
    return CalibrationFinding("starts at zero", qualified, None, message, qualified)


def spread_findings(
    path: str, region: Region, kind: Literal["nan", "inf"], batches: Mapping[str, int | None]
) -> Iterator[CalibrationFinding]:
    """Return the findings of all points of a region that were not finite, each with the point where it began.

    Args:
        path: path of the region's target.
        region: the region.
        kind: what was seen there.
        batches: maps the name of each such point to the first batch with such a value; None if another rank saw it.
    """
    points = [point for point in region.plan.points if point.name in batches]  # in execution order
    points.sort(key=lambda point: math.inf if (batch := batches[point.name]) is None else batch)
    while points:
        origin = points[0]
        batch, name = batches[origin.name], _qualified(path, origin.name)
        message = _NOT_FINITE[kind].format(
            name=name,
            batch="a calibration batch of another rank" if batch is None else f"calibration batch {batch}",
            maker=_maker(region.graph, origin),
            location=region.graph.by_name[origin.op].location,
        )
        behind = _behind(region.graph, origin)
        for point in points:
            if point.op in behind:
                yield CalibrationFinding(kind, _qualified(path, point.name), batches[point.name], message, name)
        points = [point for point in points if point.op not in behind]


def messages(findings: Iterable[CalibrationFinding]) -> tuple[str, ...]:
    """Return one message for NaN or infinities that began at one point, and one for each other kind."""
    groups: dict[tuple[str, str], list[CalibrationFinding]] = {}
    for found in findings:
        groups.setdefault((found.kind, found.origin if found.kind in _NOT_FINITE else ""), []).append(found)
    return tuple(found[0].message + _others(kind, [f.point for f in found[1:]]) for (kind, _), found in groups.items())


def depends_on_data(region: Region, name: str) -> bool:
    """Whether a point quantizes data. Zeros in weights and constants are exact and do not mean that data is missing."""
    point = region.plan.by_name[name]
    if point.role != "input":
        return not point.is_weight
    return not TensorOrigins(region.graph, ()).is_constant(region.graph.by_name[point.op].operand(point.operand))


_NOT_FINITE = {
    "nan": "{name} is NaN in {batch} ({location}): {maker}. Look there (bad data, division by zero, log of a "
    "negative number) before quantizing.",
    "inf": "{name} is infinite in {batch} ({location}): {maker}. Infinities were left out of its range. If they are a "
    "mask, keep the point in float: activation: {{dtype: float32}}.",
}
_STARTS_AT_ZERO = (
    "{name} does not vary as long as the parameter {parameter} is zero. It stays float until training moves the "
    "parameter, and then takes its scale from training. There is nothing to do."
)
_MESSAGES = {
    "constant": "{name} was zero in every batch, so it has no meaningful scale. Calibrate with data that reach it, or "
    "keep it in float: activation: {{dtype: float32}}.",
    "no data": "{name} was never reached by the calibration data and stays float. Calibrate with batches that take "
    "this branch, or give it a fixed_scale.",
    "unplanned": "{name} ran in calibration but not while tracing, and stays float. Trace more batches, or mark the "
    "code with dynamic_block.",
}

_INSTALLED = (
    "{name} ran in calibration but not while tracing, and stays float. Trace more batches; or switch off in the "
    "settings of this library what makes it vary (such as layerdrop=0.0)."
)


_NAMES = 20


def _others(kind: str, points: list[str]) -> str:
    if not points:
        return ""
    shown = _NAMES if kind == "starts at zero" else 3  # nothing else names them: they need no advice
    names = ", ".join(points[:shown]) + (" ..." if len(points) > shown else ".")
    where = " behind it" if kind in _NOT_FINITE else ""
    return f" The same at {len(points)} more {'points' if len(points) > 1 else 'point'}{where}: {names}"


def _behind(graph: OpGraph, point: PointPlan) -> set[str]:
    """Names of the ops that read the tensor at a point, or a tensor that is computed from it."""
    found = {point.op}
    if point.role != "output":
        sources = set(graph.by_name[point.op].operand(point.operand).sources)
        found |= {op.name for op in graph.ops if any(sources & set(operand.sources) for operand in op.operands)}
    pending = list(found)
    while pending:
        readers = {op.name for op in graph.consumers.get(pending.pop(), ())} - found
        found |= readers
        pending.extend(readers)
    return found


def _maker(graph: OpGraph, point: PointPlan) -> str:
    """Say where the values at a point come from."""
    if point.role == "output":
        return "the float model computes it here"
    makers = TensorOrigins(graph, ()).of(graph.by_name[point.op].operand(point.operand).sources)
    return f"it comes from {', '.join(s.name if s.kind == 'op' else f'{s.kind} {s.name}' for s in makers)}"


def _qualified(path: str, name: str) -> str:
    return f"{path}:{name}" if path else name
