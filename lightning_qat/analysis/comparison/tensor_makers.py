"""Which op made the values of a point: the parts of a join, what a value cannot exceed, and what leaves the region."""

from __future__ import annotations

from functools import cached_property

from lightning_qat.analysis.comparison.populations import JoinedPart, joined_parts
from lightning_qat.quantization.planning.plan import PointPlan
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.tracing.op_graph import Op, Operand, Source
from lightning_qat.quantization.tracing.tensor_origins import TensorOrigins


class TensorMakers:
    """Looks through data movement, and through joins where it asks what all the values of a tensor are.

    Args:
        region: its graph is what is looked at.
    """

    def __init__(self, region: Region) -> None:
        self._graph = region.graph
        joins = [op.name for op in region.graph.ops if op.role == "join"]
        self._origins = TensorOrigins(region.graph, frozenset())
        self._behind_joins = TensorOrigins(region.graph, frozenset(joins))
        self._bounds: dict[str, float] = {}
        for op in region.graph.ops:  # in execution order: a value that comes back in a loop has no limit yet
            if (limit := self._bound(op)) is not None:
                self._bounds[op.name] = limit

    @cached_property
    def leaving(self) -> frozenset[str]:
        """Names of the ops whose values leave the region as they are, apart or joined with others."""
        sources = tuple(s for output in self._graph.outputs for s in output.sources)
        direct = {s.name for s in self._origins.of(sources) if s.kind == "op"}
        return frozenset(direct | {s.name for s in self._behind_joins.of(sources) if s.kind == "op"})

    @property
    def output_bound(self) -> float | None:
        """What :meth:`bound` is for a point, for all outputs of the region."""
        return self._bound_of(tuple(s for output in self._graph.outputs for s in output.sources))

    def parts(self, plan: PointPlan) -> list[JoinedPart]:
        """Return what the op of an output point joins, if it joins; along one axis, in order."""
        op = self._graph.by_name[plan.op]
        if plan.role != "output" or op.role != "join" or not op.outputs:
            return []
        operands = [o for o in op.operands if o.is_float]
        return joined_parts(op.outputs[0][1], [(o.shape, *self._maker(o)) for o in operands])

    def bound(self, plan: PointPlan) -> float | None:
        """Return the largest magnitude that the values of a point can have by what made them; None without a limit."""
        if plan.role == "output":
            return self._bounds.get(plan.op)
        return self._bound_of(self._graph.by_name[plan.op].operand(plan.operand).sources)

    def _maker(self, operand: Operand) -> tuple[str, float | None]:
        origins = self._origins.of(operand.sources)
        return " or ".join(dict.fromkeys(o.name for o in origins)), self._bound_of(operand.sources)

    def given(self, plan: PointPlan) -> bool:
        """Whether a point quantizes an input of the region."""
        if plan.role != "input":
            return False
        sources = self._graph.by_name[plan.op].operand(plan.operand).sources
        return any(s.kind == "input" for s in self._origins.of(sources))

    def _bound(self, op: Op) -> float | None:
        if op.kind in _BOUNDED or op.role == "float":
            return 1.0 if op.kind in _BOUNDED else None
        if op.role != "join" and op.kind not in _KEEPS_BOUND:
            return None
        return self._bound_of(tuple(s for o in op.operands if o.is_float for s in o.sources))

    def _bound_of(self, sources: tuple[Source, ...]) -> float | None:
        """The limit of all origins; None if one of them has none."""
        limits = []
        for origin in self._behind_joins.of(sources):
            limit = self._bounds.get(origin.name) if origin.kind == "op" else None
            if limit is None:
                return None
            limits.append(limit)
        return max(limits, default=None)


# fmt: off
_BOUNDED = frozenset([
    "sigmoid", "softmax", "softmin", "tanh", "hardsigmoid", "sin", "cos", "softsign", "normalize", "erf",
    "cosine_similarity",
])
"""Kinds whose values are at most 1: how many codes they have can be told without their neighbours."""
_KEEPS_BOUND = frozenset(["clamp", "clamp_min", "clamp_max", "relu", "abs", "neg", "rsub", "mul", "maximum", "minimum"])
"""Kinds of numbers up to 1 that give such again."""
# fmt: on
