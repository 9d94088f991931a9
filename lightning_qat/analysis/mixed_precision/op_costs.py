"""What a choice of types costs: points, ops, bit operations, or time by a table of the hardware."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_qat.analysis.flops import is_product, op_flops
from lightning_qat.quantization.errors import ConfigurationError, unknown_choice
from lightning_qat.quantization.region.effective_dtypes import FLOAT, EffectiveDtypes, bits, widest
from lightning_qat.quantization.region.region import Region

CostName = Literal["points", "ops", "bops", "latency"]

LatencyRatios = Mapping[str, Mapping[str, float]]
"""Time per operation by kind of op and type, in any unit; ``*`` stands for every kind without an entry."""


@dataclass(frozen=True)
class OpCost:
    """What of an op decides how much it costs.

    Args:
        name: name of the op.
        kind: its canonical torch function.
        flops: floating-point operations for the batch it was traced with.
        is_product: it is a matrix product, a convolution, attention or a recurrent layer: it has bit operations.
        operands: for each floating-point operand the points that give it its type; empty where it is float32.
        points: the points that belong to the op.
    """

    name: str
    kind: str
    flops: int
    is_product: bool
    operands: tuple[tuple[str, ...], ...]
    points: tuple[str, ...]

    def operand_dtypes(self, dtypes: Mapping[str, str]) -> list[str]:
        """Return the type of each operand, given the type of each point."""
        return [widest(dtypes[point] for point in points) if points else FLOAT for points in self.operands]


def op_costs(region: Region) -> tuple[OpCost, ...]:
    """Return the ops of a region that have quantized operands or points."""
    plan, graph = region.plan, region.graph
    owner = {point.name: point.same_as or point.name for point in plan.points}
    effective = EffectiveDtypes(graph, plan)
    found = []
    for op in graph.ops:
        operands = []
        for operand in op.operands:
            if not operand.is_float or operand.role not in ("data", "weight"):
                continue
            own = effective.point_of(op, operand)
            names = [own] if own is not None else [f"{o.name}.output" for o in effective.origins(operand.sources)]
            operands.append(tuple(dict.fromkeys(owner[name] for name in names if name in owner)))
        points = tuple(dict.fromkeys(owner[point.name] for point in plan.by_op.get(op.name, ())))
        if (op.role == "quantize" and any(operands)) or points:
            found.append(OpCost(op.name, op.kind, op_flops(op), is_product(op), tuple(operands), points))
    return tuple(found)


class CostOfTypes:
    """Computes one kind of cost for any choice of types.

    ``points``: share of the points that have a wider type than the narrowest. ``ops``: share of the ops with such a
    point. ``bops``: bit operations, multiply-accumulates times the bits of both operands (Baskin et al., "UNIQ", 2018),
    relative to the narrowest types. ``latency``: the sum over ops of their operations times the time of the widest
    type among their operands, relative to the narrowest types.

    Args:
        name: which cost.
        ops: what :func:`op_costs` returns.
        narrowest: the narrowest type of each point.
        latency: for ``latency``: time per operation, by kind of op and type.

    Raises:
        ConfigurationError: there is no such cost, or the table for ``latency`` is missing or has no entry for an op.
    """

    def __init__(
        self,
        name: CostName,
        ops: Iterable[OpCost],
        narrowest: Mapping[str, str],
        latency: LatencyRatios | None = None,
    ) -> None:
        if name not in get_args(CostName):
            raise unknown_choice("cost", name, get_args(CostName))
        if name == "latency" and not latency:
            raise ConfigurationError(
                "cost 'latency' needs the time of each op and type: add `cost:` to the hardware profile, or pass "
                "latency={'*': {'int8': 1.0, 'int16': 2.0}}."
            )
        if not all(isinstance(times, Mapping) for times in (latency or {}).values()):
            raise ConfigurationError(
                "latency is a table of times by kind of op and type, such as {'*': {'int8': 1.0, 'int16': 2.0}}, not "
                f"{latency!r}."
            )
        self.name = name
        self._narrowest = dict(narrowest)
        self._latency = latency or {}
        known = [op for op in ops if set(op.points) | {p for names in op.operands for p in names} <= set(narrowest)]
        self._ops = [op for op in known if op.points] if name == "ops" else known
        self._affected: dict[str, list[OpCost]] = {point: [] for point in narrowest}
        for op in self._ops:
            for point in dict.fromkeys((*op.points, *(p for names in op.operands for p in names))):
                self._affected[point].append(op)
        self._whole = float(len(narrowest)) if name == "points" else sum(self._of(op, narrowest) for op in self._ops)
        if name == "ops":
            self._whole = float(len(self._ops))

    def of(self, dtypes: Mapping[str, str]) -> float:
        """Return the cost of a choice: the type of every point."""
        if self.name == "points":
            total = float(sum(dtypes[point] != least for point, least in self._narrowest.items()))
        else:
            total = sum(self._of(op, dtypes) for op in self._ops)
        return total / (self._whole or 1.0)

    def of_change(self, dtypes: dict[str, str], changes: Mapping[str, str]) -> float:
        """Return how much the cost rises if some points get other types, without counting everything again."""
        if self.name == "points":
            before = sum(dtypes[point] != self._narrowest[point] for point in changes)
            after = sum(dtype != self._narrowest[point] for point, dtype in changes.items())
            return (after - before) / (self._whole or 1.0)
        affected = {op.name: op for point in changes for op in self._affected[point]}
        merged = {point: changes.get(point, dtypes[point]) for op in affected.values() for point in self._of_op(op)}
        rise = sum(self._of(op, merged) - self._of(op, dtypes) for op in affected.values())
        return rise / (self._whole or 1.0)

    @property
    def is_share(self) -> bool:
        """Whether the cost is a share of all, 0 with the narrowest types; else it is relative to these, and 1 there."""
        return self.name in ("points", "ops")

    def _of_op(self, op: OpCost) -> list[str]:
        return [*op.points, *(point for names in op.operands for point in names)]

    def _of(self, op: OpCost, dtypes: Mapping[str, str]) -> float:
        if self.name == "ops":
            return float(any(dtypes[point] != self._narrowest[point] for point in op.points))
        operands = op.operand_dtypes(dtypes)
        if self.name == "latency":
            return op.flops * self._time(op.kind, widest(operands))
        if not op.is_product:
            return 0.0
        first, second = (*operands, FLOAT, FLOAT)[:2]
        return op.flops / 2 * bits(first) * bits(second)

    def _time(self, kind: str, dtype: str) -> float:
        for entry in (self._latency.get(kind, {}), self._latency.get("*", {})):
            if dtype in entry:
                return entry[dtype]
        raise ConfigurationError(
            f"the latency table has no time for {kind} at {dtype}: add {{{kind!r}: {{{dtype!r}: ...}}}}, or an entry "
            "'*' for all other kinds."
        )
