"""Which ops can act on a chosen output, found from the traced graph alone."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from lightning_qat.quantization.tracing.op_graph import Op, OpGraph

# fmt: off
_STEPS = frozenset({
    "floor", "ceil", "round", "trunc", "frac", "sign", "sgn", "floor_divide", "remainder", "fmod", "heaviside",
    "bernoulli", "histc",
})
# fmt: on
"""Kinds of ops whose floating-point result jumps."""


@dataclass(frozen=True)
class Influence:
    """Which ops act on the chosen output.

    Args:
        ops: names of the ops whose result reaches it, in any way.
        known: False if a tensor with an unknown producer reaches the output; then any op may act on it.
        picking: ``name at file:line`` of those ops whose result jumps: indices, comparisons, whole numbers.
    """

    ops: frozenset[str]
    known: bool
    picking: tuple[str, ...]

    def reaches(self, op: str) -> bool:
        """Whether an op may act on the chosen output."""
        return not self.known or op in self.ops


def influence_on(graph: OpGraph, output: str | None = None) -> Influence:
    """Walk back from an output of the region.

    Args:
        graph: the traced ops.
        output: path of the output; all of them if None, or if the graph has no such path.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.tracing.tracer import trace
        >>> class TwoHeads(torch.nn.Module):
        ...     def forward(self, x):
        ...         return {"a": x.sigmoid(), "b": x.tanh()}
        >>> graph = trace(TwoHeads(), [torch.ones(2)])
        >>> sorted(influence_on(graph, "a").ops), sorted(influence_on(graph).ops)
        (['sigmoid_0'], ['sigmoid_0', 'tanh_0'])
    """
    chosen = [o for o in graph.outputs if output is not None and f"{o.path}.".startswith(f"{output}.")]
    leaving = [s for o in chosen or graph.outputs for s in o.sources]
    waiting = list(leaving)
    found: set[str] = set()
    known = True
    while waiting:
        source = waiting.pop()
        known = known and source.kind != "opaque"
        if source.kind in ("op", "mutated") and source.name not in found:
            found.add(source.name)
            waiting += [s for operand in graph.by_name[source.name].operands for s in operand.sources]
    reaching = [op for op in graph.ops if op.name in found]
    read = {(s.name, s.output) for s in (*leaving, *(s for op in reaching for o in op.operands for s in o.sources))}
    picking = [op for op in reaching if _jumps(op, read)]
    return Influence(frozenset(found), known, tuple(f"{op.name} at {op.location}" for op in picking))


def _jumps(op: Op, read: Container[tuple[str, int]]) -> bool:
    """Whether an op turns floating-point data into a result that jumps, and another op reads it."""
    if not op.data_dependent or not any(operand.is_float for operand in op.operands):
        return False
    if op.kind in _STEPS or "rounding_mode" in op.options:
        return True
    return any(_is_discrete(dtype) and (op.name, index) in read for index, (dtype, _) in enumerate(op.outputs))


def _is_discrete(dtype: str) -> bool:
    return not dtype.startswith(("float", "bfloat", "complex"))
