"""Which points hold values that something divides by: there the error relative to each value counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.tracing.op_graph import Op
from lightning_qat.quantization.tracing.tensor_origins import TensorOrigins

LEAST_DIVISOR_PRECISION = 1 / 32
"""Relative error of a divisor's small values: with less than four significant bits, quotients are off by percents."""
RECIPROCALS = frozenset({"reciprocal", "rsqrt", "log", "log2", "log10"})
"""Kinds that answer to the *relative* error of their operand, as a divisor does."""
_DIVISIONS = {"div": 1, "rdiv": 0, "floor_divide": 1, "remainder": 1, "fmod": 1, "addcdiv": 2}
"""Number of the divisor among the operands."""
_SINGULAR_AT_ZERO = frozenset({"sqrt"})
"""Kinds whose derivative is infinite at zero, besides those that divide."""
_ZERO_FROM_ZERO = {"div": (0,), "mul": (0, 1), **dict.fromkeys(("abs", "neg", "square", "sqrt", "pow"), (0,))}
"""Operands that make the result zero by being zero."""


def divisors(region: Region) -> dict[str, tuple[str, ...]]:
    """Map each point that holds a divisor to the names of the ops that divide by it."""
    found: dict[str, list[str]] = {}
    for use in _uses(region, zeros=False):
        found.setdefault(use.point, []).append(use.dividing)
    return {point: tuple(dict.fromkeys(ops)) for point, ops in found.items()}


def zeros_divided_by(region: Region) -> dict[str, tuple[DivisorUse, ...]]:
    """Map each point whose zeros make a result or a derivative infinite to the uses of its values on the way there.

    More than :func:`divisors`: where ``x`` is zero, ``log(x / y)`` and ``1 / sqrt(x)`` are infinite, and so is the
    derivative of ``sqrt(x)``.
    """
    found: dict[str, list[DivisorUse]] = {}
    for use in _uses(region, zeros=True):
        found.setdefault(use.point, []).append(use)
    return {point: tuple(dict.fromkeys(uses)) for point, uses in found.items()}


@dataclass(frozen=True)
class DivisorUse:
    """A point on the way to a division.

    Args:
        point: the point.
        reader: the op that reads its values, as a divisor or on the way to one.
        operand: which operand of the reader they are.
        dividing: the op that divides by them, or takes their logarithm or root.
    """

    point: str
    reader: str
    operand: int
    dividing: str


def _uses(region: Region, zeros: bool) -> Iterable[DivisorUse]:
    graph, plan = region.graph, region.plan
    passing = {o.name for o in plan.ops if o.status == "passes" and graph.by_name[o.name].role == "join"}
    origins = TensorOrigins(graph, passing)
    inputs = {(p.op, p.operand): p.name for p in plan.points if p.role == "input"}
    outputs = {p.op: p.name for p in plan.points if p.role == "output"}
    for op in graph.ops:
        pending = [(op, 0 if zeros and op.kind in _SINGULAR_AT_ZERO else divided_operand(op))]
        seen = set()
        while pending:
            reader, index = pending.pop()
            operand = next((o for o in reader.operands if o.index == index), None)
            if index is None or operand is None or not operand.is_float or (reader.name, index) in seen:
                continue
            seen.add((reader.name, index))
            sources = [s.name for s in origins.of(operand.sources) if s.kind == "op"]
            for point in (inputs.get((reader.name, index)), *map(outputs.get, sources)):
                if point is not None:
                    yield DivisorUse(point, reader.name, index, op.name)
            if zeros:
                behind = [graph.by_name[name] for name in sources]
                pending += [(o, number) for o in behind for number in _ZERO_FROM_ZERO.get(o.kind, ())]


def divided_operand(op: Op) -> int | None:
    """Return the number of the operand whose relative error counts: the divisor; None if there is none."""
    if op.kind in RECIPROCALS:
        return 0
    if op.kind not in _DIVISIONS:
        return None
    floats = [operand for operand in op.operands if operand.is_float]
    # x / 2 has one tensor, and so has 2 / x, whose kind is another
    return _DIVISIONS[op.kind] if len(floats) > _DIVISIONS[op.kind] else None


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
