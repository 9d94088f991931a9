"""The type that a tensor of a region has in effect: that of the point that quantized it, before any data movement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lightning_qat.quantization.numerics.dtypes import is_float, quant_dtype
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.tracing.op_graph import Op, Operand, OpGraph, Source
from lightning_qat.quantization.tracing.tensor_origins import TensorOrigins

if TYPE_CHECKING:
    from lightning_qat.quantization.region.region import Region

FLOAT = "float32"


class EffectiveDtypes:
    """Looks up the types of operands and results.

    Args:
        graph: the traced ops.
        plan: the plan for them.
        point_dtypes: types of points that replace the planned ones.

    Attributes:
        points: the type of every point; ``float32`` for a point that is switched off.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.planning.make_plan import make_plan
        >>> from lightning_qat.quantization.tracing.tracer import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> graph = trace(model, [torch.ones(1, 4)])
        >>> dtypes = EffectiveDtypes(graph, make_plan(graph))
        >>> last = graph.by_name["2"]
        >>> dtypes.of_operand(last, last.operands[0]), dtypes.of_output(last)
        ('int8', 'float32')
    """

    def __init__(self, graph: OpGraph, plan: QuantPlan, point_dtypes: Mapping[str, str] | None = None) -> None:
        self.graph = graph
        self.plan = plan
        self.points = {point.name: point.dtype for point in plan.points} | dict(point_dtypes or {})
        self._inputs = {(p.op, p.operand): p.name for p in plan.points if p.role != "output"}
        self._tensor_origins = TensorOrigins(graph, frozenset(op.name for op in graph.ops if plan.only_moves(op)))
        self._origins: dict[Source, tuple[Source, ...]] = {}

    def origins(self, sources: Iterable[Source]) -> tuple[Source, ...]:
        """Follow data movement back to where the values of a tensor were made."""
        found: dict[Source, None] = {}
        for source in sources:
            if source not in self._origins:
                self._origins[source] = tuple(self._tensor_origins.of((source,)))
            found.update(dict.fromkeys(self._origins[source]))
        return tuple(found)

    def of_origin(self, origin: Source) -> str:
        """Return the type of the tensor from an origin. Only the first of several results of an op has a point."""
        is_first_result = origin.kind == "op" and origin.output == 0
        return self.points.get(f"{origin.name}.output", FLOAT) if is_first_result else FLOAT

    def of_tensor(self, sources: Iterable[Source]) -> str:
        """Return the type of a tensor; the widest one if it comes from several places (``float32`` is the widest)."""
        return widest(map(self.of_origin, self.origins(sources)))

    def point_of(self, op: Op, operand: Operand) -> str | None:
        """Return the name of the point that quantizes an operand at its reader."""
        return self._inputs.get((op.name, operand.index))

    def of_operand(self, op: Op, operand: Operand) -> str:
        """Return the type in which an op reads an operand."""
        point = self.point_of(op, operand)
        own = FLOAT if point is None else self.points[point]
        return self.of_tensor(operand.sources) if is_float(own) else own

    def of_output(self, op: Op, output: int = 0) -> str:
        """Return the type of a result."""
        return self.of_tensor((Source("op", op.name, output),))


def effective_dtypes(region: Region) -> EffectiveDtypes:
    """Return the types that are in effect in a region now.

    A point counts with the type its fake-quant has now, and as ``float32`` if it is switched off. A point without a
    scale counts too: it will be calibrated, or it is on a branch that the data do not take.
    """
    present = {name: point.dtype if point.enabled else FLOAT for name, point in region.points.items()}
    return EffectiveDtypes(region.graph, region.plan, present)


def widest(dtypes: Iterable[str]) -> str:
    """Return the type with the most bits; ``float32`` counts as the widest, and is returned if there is no type.

    Example:
        >>> widest(["int8", "int16"]), widest(["int16", "float32"])
        ('int16', 'float32')
    """
    return max(dtypes, key=bits, default=FLOAT)


def bits(dtype: str) -> int:
    """Return the number of bits of a type: 32 for ``float32``.

    Example:
        >>> bits("uint4"), bits("float32")
        (4, 32)
    """
    return 32 if is_float(dtype) else quant_dtype(dtype).bits
