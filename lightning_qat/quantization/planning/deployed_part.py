"""Which ops of a traced graph are part of the deployed model: ``deployed_part(graph)``.

Code that only trains the model shares its forward: stochastic depth and noise run in train mode only, and models that
take labels compute their loss themselves. The device never runs such code. So it is not quantized, and no tensor is
quantized only because such code reads or writes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_qat.quantization.modules.tensor_leaves import is_float_name
from lightning_qat.quantization.tracing.op_graph import Op, OpGraph, Source

TRAIN_ONLY = "runs in train mode only: not part of the deployed model"
LOSS = "part of the loss: leads to scalar outputs only"


@dataclass(frozen=True)
class DeployedPart:
    """The part of a traced graph that the device runs.

    Args:
        graph: the graph without the ops that only serve training.
        left_out: maps the name of each op that was left out to the reason.
    """

    graph: OpGraph
    left_out: dict[str, str]


def deployed_part(graph: OpGraph) -> DeployedPart:
    """Remove the ops that only serve training from a graph.

    Args:
        graph: the traced ops.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.tracing.tracer import trace
        >>> class Noisy(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.relu(x + torch.randn_like(x) if self.training else x)
        >>> part = deployed_part(trace(Noisy(), [torch.ones(2)]))
        >>> [op.kind for op in part.graph.ops], list(part.left_out)
        (['relu'], ['randn_like_0', 'add_0'])
    """
    left_out = {op.name: TRAIN_ONLY for op in graph.ops if op.train_only}
    if left_out:
        graph = _without(graph, left_out)
    loss = _loss(graph)
    if loss:
        left_out |= dict.fromkeys(loss, LOSS)
        graph = _without(graph, loss)
        graph = dataclasses.replace(graph, outputs=tuple(o for o in graph.outputs if not o.is_scalar))
    return DeployedPart(graph, left_out)


def _loss(graph: OpGraph) -> set[str]:
    """Ops that lead to scalar outputs only, and ops that read the model's outputs and lead to no output.

    The latter are parts of a loss that leave torch, such as the matching of a detector's predictions and labels.
    """
    scalars = [o for o in graph.outputs if o.is_scalar and is_float_name(o.dtype)]
    tensors = [o for o in graph.outputs if not o.is_scalar and is_float_name(o.dtype)]
    if not scalars or not tensors:
        return set()
    model = _ancestors(graph, (s for o in graph.outputs if not o.is_scalar for s in o.sources))
    loss = _ancestors(graph, (s for o in scalars for s in o.sources)) - model
    leaving = _moved_from(graph, {s for o in tensors for s in o.sources})
    found = set(loss)
    for op in graph.ops:
        if op.name in model or op.name in loss or not op.data_dependent:
            continue
        sources = {s for operand in op.operands for s in operand.sources if s.kind in ("op", "mutated")}
        if any(s.name in found or s in leaving for s in sources):
            found.add(op.name)
    read = (s for name in found for operand in graph.by_name[name].operands for s in operand.sources)
    return found | (_ancestors(graph, read) - model)


def _ancestors(graph: OpGraph, sources: Iterable[Source]) -> set[str]:
    """Names of all ops that the tensors are computed from."""
    found: set[str] = set()
    pending = list(sources)
    while pending:
        source = pending.pop()
        if source.kind in ("op", "mutated") and source.name not in found:
            found.add(source.name)
            pending.extend(s for operand in graph.by_name[source.name].operands for s in operand.sources)
    return found


def _moved_from(graph: OpGraph, sources: set[Source]) -> set[Source]:
    """The tensors, and those that their values were moved from without change (``split``, ``reshape``, ``stack``)."""
    found = set(sources)
    pending = list(sources)
    while pending:
        source = pending.pop()
        op = graph.by_name.get(source.name) if source.kind == "op" else None
        if op is not None and op.role in ("pass", "join"):
            before = {s for operand in op.operands for s in operand.sources if s.kind == "op"} - found
            found |= before
            pending.extend(before)
    return found


def _without(graph: OpGraph, names: Iterable[str]) -> OpGraph:
    gone = set(names)

    def kept(sources: tuple[Source, ...]) -> tuple[Source, ...]:
        return tuple(s for s in sources if not (s.kind in ("op", "mutated") and s.name in gone))

    def trimmed(op: Op) -> Op:
        operands = tuple(dataclasses.replace(o, sources=kept(o.sources)) for o in op.operands)
        return dataclasses.replace(op, operands=operands)

    outputs = tuple(dataclasses.replace(o, sources=kept(o.sources)) for o in graph.outputs)
    ops = tuple(trimmed(op) for op in graph.ops if op.name not in gone)
    return dataclasses.replace(graph, ops=ops, outputs=outputs)
