"""The data movement behind an op: the ops that its result goes through before another op computes with it."""

from __future__ import annotations

import heapq

from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.tracing.op_graph import Op, OpGraph
from lightning_qat.quantization.tracing.tensor_origins import TensorOrigins, moved


def types_of_movement(profile: HardwareProfile, graph: OpGraph, op: Op) -> dict[str, frozenset[str]]:
    """Map the kinds of data movement behind an op to the types that they can move. Kinds without a rule are left out.

    Args:
        profile: what the hardware can do.
        graph: the traced ops.
        op: the op whose result is moved.
    """
    joins: set[str] = set()
    origins = TensorOrigins(graph, joins)
    pending = [graph.position[c.name] for c in graph.consumers.get(op.name, ())]
    heapq.heapify(pending)
    seen: set[int] = set()
    found: dict[str, frozenset[str]] = {}
    while pending:
        index = heapq.heappop(pending)
        consumer = graph.ops[index]
        if index in seen or not consumer.data_dependent or consumer.role not in ("pass", "join"):
            continue
        seen.add(index)
        if consumer.role == "join":
            operands = [operand for operand in consumer.operands if operand.is_float]
            if {s.name for operand in operands for s in origins.of(operand.sources)} != {op.name}:
                continue
            joins.add(consumer.name)  # all its inputs share one scale: it only moves
        elif op.name not in {s.name for o in range(len(consumer.outputs)) for s in origins.of(moved(consumer, o))}:
            continue
        rule = profile.rules.get(consumer.kind)
        if rule is not None:
            found[consumer.kind] = frozenset(d for d in rule.inputs() if rule.moves(d))
        for following in graph.consumers.get(consumer.name, ()):
            heapq.heappush(pending, graph.position[following.name])
    return found
