"""Loops in Python whose many rounds are ops of their own."""

from __future__ import annotations

from typing import NamedTuple

from lightning_qat.analysis.model_check.checked_region import without_call_numbers
from lightning_qat.quantization.tracing.op_graph import OpGraph

LONG_LOOP = 64
"""Rounds of a loop that are unlikely to be cameras, levels or heads: they are boxes, time steps or samples."""
ANNOTATION = 'with dynamic_block(self, "name"):'


class LoopLine(NamedTuple):
    """What a loop does again and again.

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
