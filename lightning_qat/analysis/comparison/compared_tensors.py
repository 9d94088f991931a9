"""The tensors that a layer comparison compares."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_qat.analysis.comparison.evidence_collector import loops_by_op
from lightning_qat.analysis.influence import influence_on
from lightning_qat.quantization.planning.deployed_part import deployed_part
from lightning_qat.quantization.region.region import Region


@dataclass(frozen=True)
class ComparedTensor:
    """The tensor of one row of the comparison, known before anything runs.

    Args:
        name: of the point, or ``<op>.output`` for a result without one.
        mod_name: name in the table.
        base_op_type: torch function; ``input`` and ``weight`` for what goes into one.
        analy_op_type: the same in the quantized model.
        point: name of the quantization point; empty for a tensor without one.
        loop: description of the line of which its op is one round; empty unless it is in a long loop.
    """

    name: str
    mod_name: str
    base_op_type: str
    analy_op_type: str
    point: str
    loop: str = ""


def compared_tensors(region: Region, output: str | None) -> list[ComparedTensor]:
    """Return per op its quantized inputs and weights, then its result unless it only moves data or is fused.

    Args:
        region: with a plan.
        output: path into the region's output, if only ops that act on it are compared.
    """
    graph, plan = region.graph, region.plan
    influence = influence_on(graph, output)
    deployed = {op.name for op in deployed_part(graph).graph.ops}
    fused = {group.ops[-1]: "+".join(group.sequence) for group in plan.fusions}
    loops = loops_by_op(region)
    found = []
    for op in graph.ops:
        if op.name not in deployed or (output is not None and not influence.reaches(op.name)):
            continue
        points = plan.by_op.get(op.name, ())
        operands = [p for p in points if p.role != "output"]
        loop = loops.get(op.name, "")
        found += [ComparedTensor(p.name, p.name, p.role, "fake_quantize", p.name, loop) for p in operands]
        name = f"{op.name}.output"
        computes = plan.status[op.name].status in ("quantized", "float") and op.data_dependent and op.role != "create"
        if name in plan.by_name or (computes and op.has_float_output and not op.mask):
            analy = fused.get(op.name, op.kind)
            found.append(ComparedTensor(name, op.name, op.kind, analy, name if name in plan.by_name else "", loop))
    return found
