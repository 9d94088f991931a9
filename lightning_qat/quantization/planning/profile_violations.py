"""Find everything in a plan that the hardware does not support: ``find_violations(plan, graph, profile)``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_qat.quantization.planning.deployed_part import deployed_part
from lightning_qat.quantization.planning.external_operands import external_operands
from lightning_qat.quantization.planning.hardware_profile import (
    FLOAT,
    HardwareProfile,
    OpRule,
    Signature,
    nearest_dtype,
)
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile
from lightning_qat.quantization.planning.plan import PointPlan, QuantPlan
from lightning_qat.quantization.tracing.op_graph import Op, Operand, OpGraph, Source
from lightning_qat.quantization.tracing.tensor_origins import TensorOrigins, moved

Subject = Literal["op", "input dtype", "weight dtype", "output dtype", "scheme", "granularity", "fusion"]


@dataclass(frozen=True)
class ProfileViolation:
    """One thing that the hardware cannot do as planned.

    Args:
        point: name of the point to change; name of the op if there is no point.
        op: name of the op.
        op_type: its kind.
        subject: the part of the plan that does not fit.
        used: the value in the plan.
        allowed: the values that the hardware supports.
        advice: what to write instead.
    """

    point: str
    op: str
    op_type: str
    subject: Subject
    used: str
    allowed: str
    advice: str

    def __str__(self) -> str:
        return f"{self.point}: {self.op_type} {self.subject} {self.used}; allowed: {self.allowed}. {self.advice}"


def find_violations(
    plan: QuantPlan, graph: OpGraph, profile: HardwareProfile | str | Path
) -> tuple[ProfileViolation, ...]:
    """Find everything in a plan that the hardware cannot do. A plan made under the profile has no violation.

    An op without any quantization point runs in float, which is no violation.

    Args:
        plan: a plan made without a profile, or under another one.
        graph: the graph it was made for.
        profile: a profile, the name of a shipped one, or the path of a YAML file.

    Returns:
        The violations, in execution order.

    Raises:
        ConfigurationError: there is no such profile.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.planning.make_plan import make_plan
        >>> from lightning_qat.quantization.tracing.tracer import trace
        >>> graph = trace(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ELU()), [torch.ones(1, 3, 2, 2)])
        >>> for violation in find_violations(make_plan(graph), graph, "onnxruntime_qdq"):
        ...     print(violation)
        1: elu op quantized; allowed: float32. Add an override: {match: '1', activation: {dtype: float32}}.
    """
    hardware = hardware_profile(profile)
    assert hardware is not None
    return tuple(_Checker(plan, deployed_part(graph).graph, hardware).rows())


class _Checker:
    def __init__(self, plan: QuantPlan, graph: OpGraph, profile: HardwareProfile) -> None:
        self.plan = plan
        self.graph = graph
        self.profile = profile
        self.groups = {name: group for group in plan.fusions for name in group.ops}
        self.float_weights: dict[str, list[str]] = {}
        for name in plan.float_points:
            if ".weight" in name:
                self.float_weights.setdefault(name.rpartition(".")[0], []).append(name)
        joins = {op.name for op in graph.ops if plan.only_moves(op)}
        self.origins = TensorOrigins(graph, joins)

    def rows(self) -> Iterator[ProfileViolation]:
        for group in self.plan.fusions:
            computes = any(name in self.plan.by_op for name in group.ops)
            if computes and group.sequence not in self.profile.patterns.sequences:
                yield ProfileViolation(
                    group.ops[-1],
                    group.ops[-1],
                    group.kinds[-1],
                    "fusion",
                    " + ".join(group.sequence),
                    self._patterns(group.sequence[0]),
                    f"Plan with profile: {self.profile.name}, which gives each of them an output of its own.",
                )
        for op in self.graph.ops:
            if not op.data_dependent or op.name not in self.plan.status:
                continue
            if op.role == "pass" or self.plan.only_moves(op):
                yield from self._movement(op)
            elif op.role in ("quantize", "join") and self.plan.status[op.name].status in ("quantized", "fused"):
                yield from self._computation(op)

    # -- data movement

    def _movement(self, op: Op) -> Iterator[ProfileViolation]:
        rule = self.profile.rules.get(op.kind)
        if rule is None:
            return
        if op.role == "join":
            sources = tuple(s for operand in op.operands if operand.is_float for s in operand.sources)
        else:
            sources = tuple(s for output in range(max(1, len(op.outputs))) for s in moved(op, output))
        for point in self._made(sources):
            if not rule.moves(point.dtype):
                allowed = tuple(d for d in rule.inputs() if rule.moves(d))
                yield self._row(point, op, "input dtype", point.dtype, allowed)

    # -- ops that compute

    def _computation(self, op: Op) -> Iterator[ProfileViolation]:
        group = self.groups.get(op.name)
        names = group.ops if group else (op.name,)
        head, last = self.graph.by_name[names[0]], names[-1]
        if not any(name in self.plan.by_op for name in names):
            return  # all of it runs in float
        rule = self.profile.rules.get(op.kind)
        if rule is None and op is not head:
            rule = self.profile.rules.get(head.kind)
        if rule is None:
            if op is head:
                yield self._unsupported(op)
            return
        inputs = [list(self._read(op, operand)) for operand in self._inputs(op)]
        yield from self._types(op, rule, inputs, self._output(last) if op is head else None)
        for points in inputs:
            for point in points:
                if point.scheme not in rule.schemes and FLOAT not in rule.inputs():
                    yield self._row(point, op, "scheme", point.scheme, rule.schemes)
        output = self.plan.by_name.get(f"{last}.output") if op is head else None
        if output is not None and output.scheme not in rule.schemes:
            yield self._row(output, op, "scheme", output.scheme, rule.schemes)
        for point in self._weights(op):
            granularity = "per_tensor" if point.axis is None else "per_channel"
            if granularity not in rule.weight_granularity:
                yield self._row(point, op, "granularity", granularity, rule.weight_granularity)

    def _types(
        self, op: Op, rule: OpRule, inputs: list[list[PointPlan]], output: tuple[str, str] | None
    ) -> Iterator[ProfileViolation]:
        """Compare with the signature that fits best."""
        rows = [list(self._against(op, rule, s, inputs, output)) for s in rule.signatures]
        yield from min(rows, key=len)

    def _against(
        self, op: Op, rule: OpRule, signature: Signature, inputs: list[list[PointPlan]], output: tuple[str, str] | None
    ) -> Iterator[ProfileViolation]:
        beside = f" ({signature})"
        for points in inputs:
            for point in points:
                if not signature.takes(point.dtype):
                    anywhere = point.dtype in rule.inputs()
                    allowed = signature.input if anywhere else rule.inputs()
                    yield self._row(point, op, "input dtype", point.dtype, allowed, beside if anywhere else "")
        for name in self._float_inputs(op):
            if FLOAT not in signature.input:
                yield self._float_row(name, op, "input dtype", rule.inputs())
        for point in self._weights(op):
            if not signature.takes_weight(point.dtype):
                anywhere = point.dtype in rule.weights()
                allowed = signature.weight if anywhere else rule.weights()
                yield self._row(point, op, "weight dtype", point.dtype, allowed, beside if anywhere else "")
        for name in self.float_weights.get(op.name, ()):
            if FLOAT not in signature.weight:
                yield self._float_row(name, op, "weight dtype", rule.weights())
        if output is not None:
            name, dtype = output
            if dtype not in signature.output:
                anywhere = dtype in rule.outputs()
                allowed = signature.output if anywhere else rule.outputs()
                result = self.plan.by_name.get(name)
                if result is not None:
                    yield self._row(result, op, "output dtype", dtype, allowed, beside if anywhere else "")
                else:
                    yield self._float_row(name, op, "output dtype", allowed)

    def _inputs(self, op: Op) -> list[Operand]:
        group = self.groups.get(op.name)
        return external_operands(op, group.ops if group is not None else (), self.origins)[0]

    def _float_inputs(self, op: Op) -> Iterator[str]:
        """The inputs that no point quantizes, except masks and constants that are folded into the op."""
        for operand in self._inputs(op):
            name = f"{op.name}.input{operand.index}"
            if name in self.plan.by_name:
                continue
            reason = self.plan.float_points.get(name, "float32")
            if not reason.startswith("float32") or operand.mask:
                continue
            if self.origins.is_single_constant(operand) or self.origins.is_zero(operand):
                continue
            origins = self.origins.of(operand.sources)
            if not all(o.kind == "op" and f"{o.name}.output" in self.plan.by_name for o in origins):
                yield name

    def _read(self, op: Op, operand: Operand) -> Iterator[PointPlan]:
        """The last quantizers of an operand: its own, or those of its producers."""
        own = self.plan.by_name.get(f"{op.name}.input{operand.index}")
        if own is not None:
            yield own
        else:
            yield from self._made(operand.sources)

    def _made(self, sources: tuple[Source, ...]) -> Iterator[PointPlan]:
        for origin in self.origins.of(sources):
            point = self.plan.by_name.get(f"{origin.name}.output") if origin.kind == "op" else None
            if point is not None:
                yield point

    def _weights(self, op: Op) -> list[PointPlan]:
        return [point for point in self.plan.by_op.get(op.name, ()) if point.is_weight]

    def _output(self, last: str) -> tuple[str, str] | None:
        """Name and type of the group's result; None if it is written into another tensor and quantized there."""
        name = f"{last}.output"
        if name in self.plan.by_name:
            return name, self.plan.by_name[name].dtype
        if self.plan.float_points.get(name, "").startswith("written in place"):
            return None
        return name, FLOAT

    # -- rows

    def _row(
        self, point: PointPlan, op: Op, subject: Subject, used: str, allowed: tuple[str, ...], beside: str = ""
    ) -> ProfileViolation:
        kind = point.scale_role
        field = subject if subject in ("scheme", "granularity") else "dtype"
        instead = nearest_dtype(used, allowed) if field == "dtype" and allowed else (*allowed, FLOAT)[0]
        advice = f"Add an override: {{match: {point.name!r}, {kind}: {{{field}: {instead}}}}}"
        if subject in ("input dtype", "scheme") and point.op != op.name:
            advice += f", or plan with profile: {self.profile.name}, which requantizes where this is read"
        text = "|".join(allowed) or FLOAT
        return ProfileViolation(point.name, op.name, op.kind, subject, used, f"{text}{beside}", f"{advice}.")

    def _float_row(self, name: str, op: Op, subject: Subject, allowed: tuple[str, ...]) -> ProfileViolation:
        advice = f"Give {name} one of these types, or take the whole op out: {{match: {op.name!r}, activation: "
        advice += "{dtype: float32}, weight: {dtype: float32}}."
        return ProfileViolation(name, op.name, op.kind, subject, FLOAT, "|".join(allowed), advice)

    def _unsupported(self, op: Op) -> ProfileViolation:
        weight = ", weight: {dtype: float32}" if self._weights(op) else ""
        advice = f"Add an override: {{match: {op.name!r}, activation: {{dtype: float32}}{weight}}}."
        given = self.profile.unsupported.get(op.kind)
        return ProfileViolation(
            op.name, op.name, op.kind, "op", "quantized", FLOAT, advice if not given else f"{advice} Reason: {given}."
        )

    def _patterns(self, kind: str) -> str:
        found = sorted(" + ".join(s) for s in self.profile.patterns.sequences if s[0] == kind)
        return ", ".join(found) or f"no fusion that begins with {kind}"
