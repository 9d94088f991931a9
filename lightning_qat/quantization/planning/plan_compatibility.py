"""Read a stored plan, and check whether it fits the code it is loaded into."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from lightning_qat.quantization.errors import ConfigurationError, PlanMismatchError, shown
from lightning_qat.quantization.functions.function_lookup import is_interceptable
from lightning_qat.quantization.functions.op_spec import OpSpec
from lightning_qat.quantization.packed_text import pack_text, unpack_text
from lightning_qat.quantization.planning.plan import PointPlan, QuantPlan
from lightning_qat.quantization.reading.plain_values import UnreadableValueError
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


def read_extra_state(state: Any) -> tuple[OpGraph, QuantPlan]:
    """Read graph and plan from a region's extra state in a checkpoint.

    Raises:
        PlanMismatchError: they are damaged, or another release wrote them in another format.
    """
    version = state.get("version") if isinstance(state, dict) else None
    if version not in (1, STATE_VERSION):
        raise PlanMismatchError(
            f"the checkpoint holds a plan of version {shown(version)}, this release reads versions up to "
            f"{STATE_VERSION}: use the release it was made with, or another checkpoint."
        )
    try:
        graph = OpGraph.from_dict(_unpacked(state.get("graph")))
        plan = QuantPlan.from_dict(state.get("plan"))
        _check_together(graph, plan)
    except ConfigurationError as error:
        raise damaged(error) from error
    return graph, plan


def damaged(error: ConfigurationError) -> PlanMismatchError:
    """Return the error for a checkpoint with a value that does not fit."""
    return PlanMismatchError(
        f"the quantizer state in the checkpoint is damaged: {str(error).rstrip('.')}; use another checkpoint, or start "
        'from a float one (QuantizationAwareTraining(init_from="float.ckpt")) and calibrate anew.'
    )


def _unpacked(graph: Any) -> Any:
    if not isinstance(graph, str):
        return graph
    try:
        return json.loads(unpack_text(graph, _LONGEST_GRAPH))
    except (ValueError, RecursionError) as error:  # ConfigurationError is a ValueError
        raise UnreadableValueError(f"is no packed JSON ({type(error).__name__})", ".graph") from error


def _check_together(graph: OpGraph, plan: QuantPlan) -> None:
    """Refuse a plan that is about other ops than the graph has, or about tensors that these do not have."""
    if len(plan.by_name) < len(plan.points):
        raise UnreadableValueError("holds two points of one name", ".points")
    named = [op.name for op in plan.ops]
    named += [name for group in plan.fusions for name in group.ops] + [name for m in plan.misses for name in m.ops]
    named += [point.batch_norm for point in plan.points if point.batch_norm is not None]
    for name in [*named, *(point.op for point in plan.points)]:
        if name not in graph.by_name:
            raise UnreadableValueError(f"is about {shown(name)}, which is no op of the graph", ".plan")
    for point in plan.points:
        try:
            _check_point(graph.by_name[point.op], point, plan)
        except UnreadableValueError as error:
            raise error.inside(f".points[{shown(point.name)}]") from None


def _check_point(op: Op, point: PointPlan, plan: QuantPlan) -> None:
    first = plan.by_name.get(point.same_as) if point.same_as is not None else None
    if point.same_as is not None and (first is None or first.same_as is not None):
        raise UnreadableValueError(f"is {shown(point.same_as)}, which has no quantizer of its own", ".same_as")
    if point.role == "output":
        shapes = [shape for _, shape in op.outputs[:1]]
    else:
        shapes = [operand.shape for operand in op.operands if operand.index == point.operand]
    if not shapes:
        raise UnreadableValueError(f"is a tensor that {op.name} does not have", ".role")
    if (point.axis is None) != (point.channels is None):
        raise UnreadableValueError("belong together", ".axis and .channels")
    if point.axis is not None and not -len(shapes[0]) <= point.axis < len(shapes[0]):
        raise UnreadableValueError(f"is {point.axis}, and its tensor has {len(shapes[0])} axes", ".axis")
    if point.axis is not None and point.is_weight and point.channels != point.groups * shapes[0][point.axis]:
        wanted = point.groups * shapes[0][point.axis]
        raise UnreadableValueError(f"must be {wanted}, as the weight has, not {point.channels}", ".channels")
    if point.split_sizes is not None and sum(point.split_sizes) != point.channels:
        raise UnreadableValueError(f"must add up to the {point.channels} channels", ".split_sizes")


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
