"""The share of ops and FLOPs that each dtype computes."""

from __future__ import annotations

from collections import Counter

from lightning_qat.analysis.flops import op_flops
from lightning_qat.analysis.model_check.dtype_check import is_float_inside
from lightning_qat.analysis.model_check.float_segments import Segments
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.quantization.region.effective_dtypes import FLOAT, bits, widest
from lightning_qat.quantization.tracing.op_graph import Op


def flops_table(segments: Segments) -> Section:
    """Return ops and FLOPs of the deployed model by the type they are computed in.

    This is the widest type an op reads, weights included; ``float32`` for an op that computes in float, also between
    quantized tensors, as an LSTM and attention in one call do. Each op of a fused group counts; data movement and what
    does not depend on the data do not.
    """
    ops: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    checked = segments.checked
    for op in checked.graph.ops:
        if op.data_dependent and op.role in ("quantize", "join", "float") and op.has_float_output:
            dtype = _computed_in(segments, op)
            ops[dtype] += 1
            flops[dtype] += op_flops(op)
    rows = [
        (dtype, ops[dtype], _share(ops[dtype], ops), flops[dtype], _share(flops[dtype], flops))
        for dtype in sorted(ops, key=lambda name: (bits(name), name))
    ]
    rows.append(("total", sum(ops.values()), _share(1, Counter(a=1)), sum(flops.values()), _share(1, Counter(a=1))))
    note = "of the traced batch; a multiplication and an addition count as two."
    columns = ("dtype", "ops", "share of ops", "FLOPs", "share of FLOPs")
    return Section("Ops and FLOPs by dtype:", columns, tuple(rows), "A12", note)


def _computed_in(segments: Segments, op: Op) -> str:
    checked = segments.checked
    group = checked.groups.get(op.name)
    if segments.domains.get(group.ops[-1] if group else op.name) == "float" or is_float_inside(checked, op):
        return FLOAT
    weights = [checked.dtypes.points[p.name] for p in checked.plan.by_op.get(op.name, ()) if p.is_weight]
    read = [checked.dtypes.of_operand(op, operand) for member, operand in checked.inputs(op) if member is op]
    known = [dtype for dtype in (*weights, *read) if dtype != FLOAT]
    if not known:  # a fused op that reads only what is inside the group, or a join of float32 results
        return _computed_in(segments, checked.head(op)) if checked.head(op) is not op else FLOAT
    return widest(known)


def _share(part: int, counts: Counter[str]) -> str:
    total = sum(counts.values())
    return f"{100 * part / total:.1f} %" if total else ""
