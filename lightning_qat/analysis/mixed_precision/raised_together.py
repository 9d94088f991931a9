"""Which points the hardware can only raise together, such as the inputs of an addition that takes one type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_qat.quantization.planning.hardware_profile import HardwareProfile, OpRule, Signature
from lightning_qat.quantization.region.effective_dtypes import EffectiveDtypes
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.tracing.op_graph import Op

Slots = list[tuple[str, str]]
"""Points of an op and what they quantize there: ``input``, ``weight`` or ``output``."""


def raised_together(
    region: Region, profile: HardwareProfile | None, narrow: Mapping[str, str], wide: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Map each point to the points that have to be raised with it, itself included.

    Two points of an op (two inputs, an input and the weight, an input and the result) belong together if the profile
    has no combination of types in which the first is wide and the second narrow. Without a profile each point can be
    raised alone. (The planner would otherwise put another quantizer of the narrow type between the two.)

    Args:
        region: a planned region.
        profile: the hardware.
        narrow: the narrow type of each point that can be raised.
        wide: the wide type of each of them.

    Returns:
        The points in execution order. Points that cannot be raised are left out.
    """
    order = {point.name: i for i, point in enumerate(region.plan.points)}
    follow: dict[str, set[str]] = {name: set() for name in wide}
    if profile is not None:
        for rule, slots in _ops(region, profile):
            known = [(name, role) for name, role in slots if name in wide]
            for one, role in known:
                for other, other_role in known:
                    if one != other and not _possible(rule, role, wide[one], other_role, narrow[other]):
                        follow[one].add(other)
    return {name: tuple(sorted(_reached(name, follow), key=order.__getitem__)) for name in follow}


def _ops(region: Region, profile: HardwareProfile) -> Iterable[tuple[OpRule, Slots]]:
    """The rule of each op of the hardware, with the points at its inputs, its weight and its result.

    The first op of a fused group decides the type of the group's result; the others have rules for their own inputs.
    """
    graph, plan = region.graph, region.plan
    owner = {point.name: point.same_as or point.name for point in plan.points}
    effective = EffectiveDtypes(graph, plan)
    groups = {name: group.ops for group in plan.fusions for name in group.ops}
    for op in graph.ops:
        members = groups.get(op.name, (op.name,))
        rule = profile.rules.get(op.kind) or profile.rules.get(graph.by_name[members[0]].kind)
        if rule is None or plan.status[op.name].status in ("float", "constant"):
            continue
        slots = _inputs(op, effective, set(members))
        if op.name == members[0]:
            slots += [(f"{member}.output", "output") for member in members]
        yield rule, list(dict.fromkeys((owner[name], role) for name, role in slots if name in owner))


def _inputs(op: Op, effective: EffectiveDtypes, inside: set[str]) -> Slots:
    found: Slots = []
    for operand in op.operands:
        own = effective.point_of(op, operand)
        if own is not None:
            found.append((own, "weight" if effective.plan.by_name[own].is_weight else "input"))
        elif operand.is_float and operand.role in ("data", "weight"):
            origins = [o for o in effective.origins(operand.sources) if o.name not in inside]
            found += [(f"{origin.name}.output", "input") for origin in origins]
    return found


def _possible(rule: OpRule, role: str, dtype: str, other_role: str, other_dtype: str) -> bool:
    """Whether the hardware can compute the op with these two types."""
    return any(_takes(s, role, dtype) and _takes(s, other_role, other_dtype) for s in rule.signatures)


def _takes(signature: Signature, role: str, dtype: str) -> bool:
    if role == "input":
        return signature.takes(dtype)
    return dtype in (signature.weight if role == "weight" else signature.output)


def _reached(name: str, follow: Mapping[str, set[str]]) -> set[str]:
    found, waiting = {name}, [name]
    while waiting:
        for other in follow[waiting.pop()] - found:
            found.add(other)
            waiting.append(other)
    return found
