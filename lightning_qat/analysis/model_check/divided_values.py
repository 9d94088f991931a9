"""Which points hold divisors: for a divisor, the error relative to each value counts."""

from __future__ import annotations

from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.tracing.op_graph import Op, Source
from lightning_qat.quantization.tracing.tensor_origins import TensorOrigins

RECIPROCALS = frozenset({"reciprocal", "rsqrt", "log", "log2", "log10"})
"""Kinds that answer to the *relative* error of their operand, as a divisor does."""
_DIVISIONS = {"div": 1, "rdiv": 0, "floor_divide": 1, "remainder": 1, "fmod": 1, "addcdiv": 2}
"""Number of the divisor among the operands."""


def divisors(region: Region) -> dict[str, tuple[str, ...]]:
    """Map each point that holds a divisor to the names of the ops that divide by it."""
    graph, plan = region.graph, region.plan
    passing = {o.name for o in plan.ops if o.status == "passes" and graph.by_name[o.name].role == "join"}
    origins = TensorOrigins(graph, passing)
    inputs = {(p.op, p.operand): p.name for p in plan.points if p.role == "input"}
    outputs = {p.op: p.name for p in plan.points if p.role == "output"}
    found: dict[str, list[str]] = {}
    for op in graph.ops:
        index = _divided_by(op)
        if index is None:
            continue
        operand = next((o for o in op.operands if o.index == index), None)
        if operand is None or not operand.is_float:
            continue
        sources: list[Source] = origins.of(operand.sources)
        points = [inputs.get((op.name, index)), *(outputs.get(s.name) for s in sources if s.kind == "op")]
        for point in points:
            if point is not None:
                found.setdefault(point, []).append(op.name)
    return {point: tuple(dict.fromkeys(ops)) for point, ops in found.items()}


def constant_inputs(region: Region) -> frozenset[str]:
    """Input points whose tensor depends on no input of the region."""
    origins = TensorOrigins(region.graph, ())
    found = []
    for point in region.plan.points:
        operands = region.graph.by_name[point.op].operands
        operand = next((o for o in operands if o.index == point.operand), None)
        if point.role == "input" and operand is not None and origins.is_constant(operand):
            found.append(point.name)
    return frozenset(found)


def _divided_by(op: Op) -> int | None:
    """Number of the operand whose relative error counts."""
    if op.kind in RECIPROCALS:
        return 0
    if op.kind not in _DIVISIONS:
        return None
    floats = [operand for operand in op.operands if operand.is_float]
    # x / 2 has one tensor, and so has 2 / x, whose kind is another
    return _DIVISIONS[op.kind] if len(floats) > _DIVISIONS[op.kind] else None
