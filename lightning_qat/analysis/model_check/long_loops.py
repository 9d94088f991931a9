"""Loops in Python whose many rounds are ops of their own."""

from __future__ import annotations

from typing import NamedTuple

from lightning_qat.analysis.model_check.checked_region import without_call_numbers
from lightning_qat.quantization.tracing.op_graph import OpGraph

LONG_LOOP = 64
"""From this many rounds on, a loop probably runs over boxes, time steps or samples, not cameras, levels or heads."""
ANNOTATION = 'with dynamic_block(self, "name"):'


class LoopLine(NamedTuple):
    """One op in the body of a loop.

    Args:
        scope: path of the module that runs it, without call numbers.
        location: ``file.py:line``.
        kind: torch function.
    """

    scope: str
    location: str
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} in {self.location}{f' ({self.scope})' if self.scope else ''}"


def long_loops(graph: OpGraph) -> dict[LoopLine, tuple[str, ...]]:
    """Return the ops of long loops, by line.

    Args:
        graph: of a target.

    Returns:
        Names of the ops that are one round each, in execution order.
    """
    rounds: dict[LoopLine, list[str]] = {}
    for op in graph.ops:
        if op.data_dependent and op.role in ("quantize", "join"):
            line = LoopLine(without_call_numbers(op.scope), op.location, op.kind)
            rounds.setdefault(line, []).append(op.name)
    return {line: tuple(names) for line, names in rounds.items() if len(names) >= LONG_LOOP}
