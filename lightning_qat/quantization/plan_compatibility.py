"""Whether a stored plan fits the code it is loaded into."""

from __future__ import annotations

import dataclasses

from lightning_qat.quantization.errors import PlanMismatchError
from lightning_qat.quantization.op_graph import Op, OpGraph
from lightning_qat.quantization.torch_functions import OpSpec, is_interceptable


def rebound(saved: OpGraph, traced: OpGraph) -> OpGraph:
    """Return the saved graph with the run-time identities of the traced one, matched by op name.

    The identities differ when lines moved inside a function or the Python version changed; the names do not.

    Raises:
        PlanMismatchError: ops were added, removed or changed their kind.
    """
    differences = plan_differences(saved, traced)
    if differences:
        shown = "".join(f"\n  - {line}" for line in differences[:10])
        more = f"\n  - and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise PlanMismatchError(
            f"the quantization plan in the checkpoint does not fit the code of {traced.target_type}:{shown}{more}\n"
            "Restore the code the checkpoint was made with, or start from a float checkpoint "
            '(QuantizationAwareTraining(init_from="float.ckpt")) and calibrate anew.'
        )
    keys = {op.name: op.key for op in traced.ops}
    ops = tuple(dataclasses.replace(op, key=keys.get(op.name, op.key)) for op in saved.ops)
    return dataclasses.replace(saved, ops=ops)


def plan_differences(saved: OpGraph, traced: OpGraph) -> list[str]:
    """Describe the ops that differ; ops that run only in some forwards are not expected to match."""
    varies = bool(saved.varying or traced.varying)
    lines = []
    for op in saved.ops:
        now = traced.by_name.get(op.name)
        if now is not None and now.kind != op.kind:
            lines.append(f"{op.name}: was {op.kind}, is {now.kind} ({now.location})")
        elif now is None and not varies and _counts(op) and op.forwards == saved.forwards:
            lines.append(f"{op.name}: {op.kind} is in the checkpoint, not in the code")
    for op in traced.ops:
        if op.name not in saved.by_name and not varies and _counts(op) and op.forwards == traced.forwards:
            lines.append(f"{op.name}: {op.kind} is in the code ({op.location}), not in the checkpoint")
    return lines


def _counts(op: Op) -> bool:
    return op.data_dependent and is_interceptable(OpSpec(op.kind, op.role))
