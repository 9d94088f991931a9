"""Results that leave the region as float32: a matrix product has them in its wide accumulator at no extra cost."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_qat.quantization.planning.fusion import FusionGroup
from lightning_qat.quantization.tracing.op_graph import Op, OpGraph, Source
from lightning_qat.quantization.tracing.tensor_origins import moved


def high_precision_outputs(graph: OpGraph, groups: Mapping[str, FusionGroup]) -> dict[str, str]:
    """Find the GEMMs (with their batch norm) whose result leaves the region, and the joins of such results only.

    Args:
        graph: the traced ops.
        groups: the fused group of each op that is in one.

    Returns:
        Maps the name of each of these ops to the reason.
    """
    found: dict[str, str] = {}
    pending = [s for output in graph.outputs for s in output.sources]
    seen: set[Source] = set()
    while pending:
        source = pending.pop()
        op = graph.by_name.get(source.name) if source.kind in ("op", "mutated") else None
        if source in seen or op is None or not op.data_dependent:
            continue
        seen.add(source)
        if op.role == "pass":
            pending.extend(moved(op, source.output))
        elif op.role == "join":
            if all(consumer.role == "pass" for consumer in graph.consumers.get(op.name, ())):
                found[op.name] = "joins results that leave the region"
                pending.extend(s for operand in op.operands if operand.is_float for s in operand.sources)
        elif op.gemm or (op.kind == "batch_norm" and _ends_gemm(graph, groups.get(op.name), op)):
            found[op.name] = "high-precision output: a GEMM result that leaves the region stays float32"
    return found


def _ends_gemm(graph: OpGraph, group: FusionGroup | None, op: Op) -> bool:
    """Whether an op is the last one of a group that begins with a GEMM."""
    return group is not None and graph.by_name[group.ops[0]].gemm and group.ops[-1] == op.name
