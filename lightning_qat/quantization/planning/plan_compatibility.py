"""Read a stored plan, and check whether it fits the code it is loaded into."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from lightning_qat.quantization.errors import PlanMismatchError
from lightning_qat.quantization.functions.function_lookup import is_interceptable
from lightning_qat.quantization.functions.op_spec import OpSpec
from lightning_qat.quantization.packed_text import pack_text, unpack_text
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.tracing.op_graph import Op, OpGraph

STATE_VERSION = 2
"""Of a region's extra state. In version 1, which is read too, graph and statistics took more room."""

_LONGEST_GRAPH = 2**28
"""In bytes; ten thousand ops have a twentieth of it."""

LOADING_NOTE = (
    "quantized by lightning_qat: load it with lightning_qat.load_quantized(YourModule, path), or with "
    "QuantizationAwareTraining in the Trainer's callbacks"
)
"""The first key of a region in a ``state_dict``. Who loads that without fake-quants, and perhaps without this package,
gets torch's list of unexpected keys, which begins with this one."""


def extra_state(graph: OpGraph, plan: QuantPlan) -> dict[str, Any]:
    """Return graph and plan for a checkpoint; the graph is packed, as the plan says all that people look for."""
    packed = pack_text(json.dumps(graph.to_dict()).encode())
    return {"version": STATE_VERSION, "graph": packed, "plan": plan.to_dict()}


def read_extra_state(state: dict[str, Any]) -> tuple[OpGraph, QuantPlan]:
    """Read graph and plan from a region's extra state in a checkpoint.

    Raises:
        PlanMismatchError: another release wrote them in another format.
        ConfigurationError: the packed graph is damaged.
    """
    if state.get("version") not in (1, STATE_VERSION):
        raise PlanMismatchError(
            f"the checkpoint holds a plan of version {state.get('version')!r}, this release reads versions up to "
            f"{STATE_VERSION}: use the release it was made with."
        )
    graph = state["graph"]
    if isinstance(graph, str):
        graph = json.loads(unpack_text(graph, _LONGEST_GRAPH))
    return OpGraph.from_dict(graph), QuantPlan.from_dict(state["plan"])


def rebound(saved: OpGraph, traced: OpGraph) -> OpGraph:
    """Return the saved graph with the run-time identities of the traced one.

    Ops of unchanged code are matched by identity. After a function was edited, or Python or torch was updated, the
    identities differ. Such ops are matched by name, and only if all their names and kinds are the same as before.

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
    gone, new = _unmatched(saved, traced), _unmatched(traced, saved)
    found = {op.key: op for op in traced.ops} | {op.key: new[name] for name, op in gone.items() if name in new}
    pairs = ((op, found.get(op.key, op)) for op in saved.ops)
    ops = tuple(dataclasses.replace(op, key=now.key, twins=now.twins) for op, now in pairs)
    return dataclasses.replace(saved, ops=ops)


def plan_differences(saved: OpGraph, traced: OpGraph) -> list[str]:
    """Describe the ops that differ, one line each.

    If ops are missing on one side only, those that do not run in every forward are left out: other batches may have
    been traced, or only one of the two modes.
    """
    gone, new = _unmatched(saved, traced), _unmatched(traced, saved)
    if not (gone and new):
        varies = bool(saved.varying or traced.varying)
        gone = {name: op for name, op in gone.items() if not varies and op.forwards == saved.forwards}
        new = {name: op for name, op in new.items() if not varies and op.forwards == traced.forwards}
    lines = []
    for name, op in gone.items():
        if name not in new:
            lines.append(f"{name}: {op.kind} is in the checkpoint, not in the code")
        elif new[name].kind != op.kind:
            lines.append(f"{name}: was {op.kind}, is {new[name].kind} ({new[name].location})")
    for name, op in new.items():
        if name not in gone:
            lines.append(f"{name}: {op.kind} is in the code ({op.location}), not in the checkpoint")
    return lines


def _unmatched(graph: OpGraph, other: OpGraph) -> dict[str, Op]:
    """Ops that matter to the plan and are not, under the same identity, in the other graph."""
    keys = {op.key for op in other.ops}
    return {op.name: op for op in graph.ops if op.key not in keys and _matters(op)}


def _matters(op: Op) -> bool:
    return op.data_dependent and is_interceptable(OpSpec(op.kind, op.role))
