"""Where a tensor's values were made: data movement is followed back to the op, parameter or input behind it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection

from lightning_qat.quantization.functions.function_lookup import PARALLEL
from lightning_qat.quantization.tracing.op_graph import Op, Operand, OpGraph, Source


class TensorOrigins:
    """Finds where the values of tensors in a graph were made.

    Args:
        graph: the traced ops.
        passing_joins: names of the joins that only move data, as their inputs share one scale. May grow while in use.
    """

    def __init__(self, graph: OpGraph, passing_joins: Collection[str]) -> None:
        self.graph = graph
        self.passing_joins = passing_joins

    def of(self, sources: tuple[Source, ...]) -> list[Source]:
        """Follow data movement back to where the values were made."""
        origins: dict[Source, None] = {}  # a set with the order of the program, so that plans are reproducible
        seen: set[Source] = set()
        pending = deque(sources)
        while pending:
            source = pending.popleft()
            if source in seen:
                continue
            seen.add(source)
            op = self.graph.by_name.get(source.name) if source.kind in ("op", "mutated") else None
            if op is not None and source.kind == "op" and op.data_dependent:
                if op.role == "pass" and (behind := moved(op, source.output)):
                    pending.extend(behind)
                    continue
                if op.name in self.passing_joins:
                    pending.extend(s for operand in op.operands if operand.is_float for s in operand.sources)
                    continue
            origins[source] = None
        return list(origins)

    def is_constant(self, operand: Operand) -> bool:
        """Whether the operand depends on no input of the region."""
        for source in operand.sources:
            if source.kind in ("op", "mutated"):
                if self.graph.by_name[source.name].data_dependent:
                    return False
            elif source.kind not in ("parameter", "buffer", "constant"):
                return False
        return True

    def is_single_constant(self, operand: Operand) -> bool:
        """Whether the operand is one number that does not depend on the data: it is folded into the op."""
        return math.prod(operand.shape) == 1 and self.is_constant(operand)

    def is_zero(self, operand: Operand) -> bool:
        """Whether the operand holds nothing but zeros, as the initial state of a recurrent layer often does."""
        ops = [self.graph.by_name[s.name] for s in operand.sources if s.kind == "op"]
        if len(ops) != len(operand.sources):
            return False
        return all(op.kind in _ZEROS or (op.role == "pass" and self._moves_zeros(op)) for op in ops)

    def _moves_zeros(self, op: Op) -> bool:
        return not op.data_dependent and not op.mask and bool(op.operands) and self.is_zero(op.operands[0])


_ZEROS = frozenset(["zeros", "zeros_like", "new_zeros"])


def moved(op: Op, output: int) -> tuple[Source, ...]:
    """Return the sources of the tensor that a data movement op moves to one of its results.

    Return nothing where floats are made from integers or complex numbers (``codes.float()``): these values are new.
    """
    if op.kind in PARALLEL and output < len(op.operands):
        return op.operands[output].sources
    floats = [operand for operand in op.operands if operand.is_float]
    return floats[0].sources if floats else ()
