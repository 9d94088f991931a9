"""Results that leave the region as float32, where a product's wide accumulator costs nothing.

A device can hand out the accumulator of a matrix product as it is. Whatever else it computes has an integer result, and
so has what it puts together of several tensors: a converter gives a ``cat`` one scale, also where it is the last op.
Only a join of nothing but float32 tensors is no computation: these lie beside each other in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from lightning_qat.quantization.functions.function_lookup import PARALLEL
from lightning_qat.quantization.planning.fusion import FusionGroup
from lightning_qat.quantization.tracing.op_graph import Op, OpGraph, Source
from lightning_qat.quantization.tracing.tensor_origins import moved

PRODUCT = "high-precision output: a GEMM result that leaves the region stays float32"
JOINED = "joins float32 results that leave the region"


@dataclass(frozen=True)
class HighPrecision:
    """What happens to results at the end of a region.

    Args:
        float32: the reason by name of each op whose result stays float32: matrix products (with their batch norm) that
            leave the region, and joins of nothing but float32 tensors.
        quantized: the reason by name of each join that leaves the region and does not stay float32.
    """

    float32: dict[str, str] = field(default_factory=dict)
    quantized: dict[str, str] = field(default_factory=dict)


def ends_product(graph: OpGraph, groups: Mapping[str, FusionGroup], op: Op) -> bool:
    """Whether an op's result is that of a matrix product, or of one with a batch norm fused behind it."""
    if op.gemm:
        return True
    group = groups.get(op.name) if op.kind == "batch_norm" else None
    return group is not None and graph.by_name[group.ops[0]].gemm and group.ops[-1] == op.name


def high_precision_outputs(
    graph: OpGraph,
    groups: Mapping[str, FusionGroup],
    is_float: Callable[[Op], bool] = lambda op: False,
    gives_float: Callable[[Op], bool] = lambda op: True,
    moves_float: Callable[[Op], bool] = lambda op: True,
) -> HighPrecision:
    """Find the results that leave the region as float32, and the joins that do not.

    Args:
        graph: the traced ops.
        groups: the fused group of each op that is in one.
        is_float: whether an op computes in float anyway, as the user or the hardware wants it so.
        gives_float: whether the result of a matrix product may be float32.
        moves_float: whether an op that moves data can do so in float32.
    """
    return _Search(graph, groups, is_float, gives_float, moves_float).found()


class _Search:
    """Walks from the outputs back to where their values are made; the functions are those of the caller."""

    def __init__(
        self,
        graph: OpGraph,
        groups: Mapping[str, FusionGroup],
        is_float: Callable[[Op], bool],
        gives_float: Callable[[Op], bool],
        moves_float: Callable[[Op], bool],
    ) -> None:
        self.graph = graph
        self.groups = groups
        self.is_float = is_float
        self.gives_float = gives_float
        self.moves_float = moves_float
        self._integer: dict[str, tuple[str, ...]] = {}  # by op: what of its operands is no float32
        for op in graph.ops:  # in execution order: what an op reads is known
            self._integer[op.name] = self._integer_parts(op)

    def found(self) -> HighPrecision:
        """Return what was found. Readers come before makers, so that it is known whether all of them agree."""
        result = HighPrecision()
        leaving: dict[str, set[int]] = {}  # by op: which of its results

        def leave(sources: Iterable[Source]) -> None:
            for source in sources:
                if source.kind in ("op", "mutated"):
                    leaving.setdefault(source.name, set()).add(source.output)

        leave(s for output in self.graph.outputs for s in output.sources)
        for op in reversed(self.graph.ops):
            if op.name not in leaving or not op.data_dependent:
                continue
            if op.role == "pass":
                if self.moves_float(op):
                    leave(s for number in leaving[op.name] for s in moved(op, number))
            elif op.role == "join":
                readers = self.graph.consumers.get(op.name, ())
                if not all(r.role == "pass" or r.name in result.float32 for r in readers):
                    continue  # computed with as well: a tensor like any other
                if parts := self._integer[op.name]:
                    result.quantized[op.name] = self._why(parts)
                    continue
                if not self.is_float(op):
                    result.float32[op.name] = JOINED
                leave(_read(op))
            elif ends_product(self.graph, self.groups, op):
                result.float32[op.name] = PRODUCT
        return result

    def _why(self, parts: tuple[str, ...]) -> str:
        names = ", ".join(parts[:3]) + (" and others" if len(parts) > 3 else "")
        verb = "is" if len(parts) == 1 else "are"
        return f"leaves the region quantized, as {names} that it joins {verb} no float32 result of a matrix product"

    def _integer_parts(self, op: Op) -> tuple[str, ...]:
        """What of an op's result has a scale: its own name, or for data movement and joins what these are made of."""
        if not op.data_dependent or self.is_float(op):
            return ()
        if op.role == "pass":
            if not self.moves_float(op):
                return (op.name,)
            return self._of(_read(op) if op.inplace or op.kind in PARALLEL else moved(op, 0))
        if op.role == "join":
            return self._of(_read(op))
        if ends_product(self.graph, self.groups, op) and self.gives_float(op):
            return ()
        return (op.name,)

    def _of(self, sources: Iterable[Source]) -> tuple[str, ...]:
        found: dict[str, None] = {}
        for source in sources:
            if source.kind in ("op", "mutated"):
                found.update(dict.fromkeys(self._integer.get(source.name, ())))
            elif source.kind in ("input", "opaque"):
                found[f"{source.kind} {source.name}"] = None
        return tuple(found)


def _read(op: Op) -> tuple[Source, ...]:
    return tuple(s for operand in op.operands if operand.is_float for s in operand.sources)
