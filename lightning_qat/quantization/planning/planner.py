"""The rules behind :func:`lightning_qat.quantization.planning.make_plan.make_plan`."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.overrides import Override
from lightning_qat.quantization.planning.external_operands import external_operands
from lightning_qat.quantization.planning.fusion import find_fusions
from lightning_qat.quantization.planning.fusion_patterns import DEFAULT_PATTERNS
from lightning_qat.quantization.planning.hardware_profile import FLOAT, HardwareProfile, Signature
from lightning_qat.quantization.planning.high_precision import HighPrecision, high_precision_outputs
from lightning_qat.quantization.planning.plan import OpPlan, OpStatus, QuantPlan
from lightning_qat.quantization.planning.planned_points import Place, PlannedPoints
from lightning_qat.quantization.planning.point_config import PointConfig, PointConfigs
from lightning_qat.quantization.planning.profile_planning import InputDemand, ProfileChoices, RunsInFloat
from lightning_qat.quantization.planning.unmatched_overrides import unmatched_override
from lightning_qat.quantization.planning.weight_channels import weight_channels
from lightning_qat.quantization.qconfig import QConfig
from lightning_qat.quantization.tracing.op_graph import Op, Operand, OpGraph, Source
from lightning_qat.quantization.tracing.tensor_origins import TensorOrigins

FUSED_INTO = "fused into "
"""Begins the reason of an op that runs in another one; the name of that op follows."""
_COMPUTED_MOVES = ("max_pool", "adaptive_max_pool", "fractional_max_pool", "interpolate", "upsample_", "amax", "amin")


class Planner:
    """Makes the plan of one target. Its steps share the look-ups that the constructor makes.

    Args:
        graph: the traced ops that are deployed.
        qconfig: the defaults.
        overrides: the rules, relative to the target.
        profile: the hardware the plan is for.
    """

    def __init__(
        self, graph: OpGraph, qconfig: QConfig, overrides: list[Override], profile: HardwareProfile | None = None
    ) -> None:
        self.graph = graph
        self.qconfig = qconfig
        self.overrides = overrides
        self.profile = profile
        self.configs = PointConfigs(qconfig, overrides)
        self.groups, self.misses = find_fusions(graph, profile.patterns if profile is not None else DEFAULT_PATTERNS)
        self.group = {name: group for group in self.groups for name in group.ops}
        self.choices = ProfileChoices(profile, graph, self.configs, self.group) if profile is not None else None
        self.used = {s for op in graph.ops for o in op.operands for s in o.sources}
        self.used |= {s for output in graph.outputs for s in output.sources}
        self._forget()

    def _forget(self) -> None:
        self.points = PlannedPoints(self.graph, self.group)
        self.configs.first_uses.clear()
        self.status: dict[str, OpPlan] = {}
        self.passing_joins: set[str] = set()
        self.origins = TensorOrigins(self.graph, self.passing_joins)

    def plan(self, written: tuple[dict[str, Any], ...] = ()) -> QuantPlan:
        """Return the plan. Outputs come first: whether an operand needs a quantizer depends on its producer.

        Afterwards, :meth:`unused_overrides` returns the rules that matched nothing.

        Args:
            written: the rules as the user wrote them, which the plan shows.
        """
        while not self._decide():
            self._forget()
        rank = {"input": 0, "weight": 1, "output": 2}
        points = sorted(
            self.points.by_name.values(), key=lambda p: (self.graph.position[p.op], rank[p.role], p.operand)
        )
        return QuantPlan(
            points=tuple(points),
            ops=tuple(self.status[op.name] for op in self.graph.ops),
            float_points=self.points.in_float,
            fusions=self.groups,
            misses=self.misses,
            qconfig=dataclasses.asdict(self.qconfig),
            overrides=written,
            profile=self.profile.identity() if self.profile is not None else None,
        )

    def _decide(self) -> bool:
        """Decide everything once. False if some ops turned out to run in float, which changes what others read."""
        settled = True
        high_precision = high_precision_outputs(
            self.graph, self.group, self._is_float, self._gives_float, self._moves_float
        )
        for op in self.graph.ops:
            try:
                self._decide_output(op, high_precision)
            except RunsInFloat as error:
                self._run_in_float(op, error)
                settled = False
        if not settled:
            return False
        for op in self.graph.ops:
            computes = op.role == "quantize" or (op.role == "join" and self.choices is not None)
            if self.status[op.name].status in ("quantized", "fused") and computes:
                try:
                    self._decide_operands(op)
                except RunsInFloat as error:
                    self._run_in_float(op, error)
                    settled = False
        return settled

    def _run_in_float(self, op: Op, error: RunsInFloat) -> None:
        assert self.choices is not None
        self.choices.run_in_float(op, str(error))

    # -- outputs

    def _decide_output(self, op: Op, high_precision: HighPrecision) -> None:
        name = f"{op.name}.output"
        if not op.data_dependent:
            self._status(op, "constant", "depends on no input of the region: computed exactly")
        elif op.role in ("pass", "create"):
            self._status(op, "passes")
        elif not op.has_float_output:
            self._status(op, "float", "returns no floating-point tensor")
        elif op.role == "float":
            self._status(op, "float", op.reason)
        elif op.index_only and not op.mask:
            self._status(op, "float", "computed from integer inputs alone (positions, masks): exact")
        elif op.role == "join" and self._is_passing_join(op):
            self.passing_joins.add(op.name)
            self._status(op, "passes", "all inputs share one scale")
        elif self.choices is not None and op.name in self.choices.floats:
            self._status(op, "float", self.choices.floats[op.name])
        elif op.mask:
            self.points.in_float[name] = reason = "mask: holds additive mask values"
            if op.gemm and self._can_leave(op):  # a product that a mask is added to (baddbmm) is one on codes
                self._status(op, "quantized", reason)
                self._note_output(op, "float32")
            else:
                self._status(op, "float", reason)
        elif op.name in self.group and self.group[op.name].ops[-1] != op.name:
            self._status(op, "fused", f"{FUSED_INTO}{self.group[op.name].ops[-1]}")
        elif op.inplace and Source("op", op.name) not in self.used:
            self._float_output(op, name, "written in place and the result is not used: quantized where it is read")
            self._note_output(op, None)
        elif op.name in high_precision.float32 and not self._forced(op, name) and self._can_leave(op):
            self._float_output(op, name, high_precision.float32[op.name])
            self._note_output(op, "float32")
        else:
            config, changed = self._output_config(op, name)
            why = high_precision.quantized.get(op.name, "")
            if op.name in high_precision.float32 and not self._can_leave(op):
                why = self._no_float(op)
            self.points.add(Place(op, name, "output"), config, why, changed)
            self._status(op, "quantized", op.reason if name in self.points.by_name else self.points.in_float[name])

    def _status(self, op: Op, status: OpStatus, reason: str = "") -> None:
        self.status[op.name] = OpPlan(op.name, status, reason)

    def _float_output(self, op: Op, name: str, reason: str) -> None:
        self.points.in_float[name] = reason
        self._status(op, "quantized" if op.role == "quantize" else "passes", reason)

    def _is_passing_join(self, op: Op) -> bool:
        origins = {o for operand in op.operands if operand.is_float for o in self.origins.of(operand.sources)}
        return len(origins) == 1 and self.points.is_quantized(next(iter(origins)))

    def _forced(self, op: Op, point: str) -> bool:
        return any(o.names_exactly(point) and o.activation and o.activation.dtype for o in self.overrides)

    def _is_float(self, op: Op) -> bool:
        """Whether an op computes in float wherever it is: nobody has it on the hardware, or somebody wants it so."""
        if op.role == "float" or op.mask or op.index_only or not op.has_float_output:
            return True
        if op.role == "pass":
            return False
        on_host = self.choices is not None and op.name in self.choices.floats
        return on_host or self.configs.is_float(f"{op.name}.output", op.kind, "output")

    def _gives_float(self, op: Op) -> bool:
        return self._can_leave(op) and not self._forced(op, f"{op.name}.output")

    def _moves_float(self, op: Op) -> bool:
        """Whether data movement takes float32: pooling and resizing are computed with the types that a profile has."""
        rule = self.profile.rules.get(op.kind) if self.profile is not None else None
        return rule is None or not op.kind.startswith(_COMPUTED_MOVES) or rule.moves(FLOAT)

    def _can_leave(self, op: Op) -> bool:
        """Whether the hardware can give the result as float32; a join of such results happens behind it."""
        return self.choices is None or op.role == "join" or self.choices.has_float_output(op)

    def _no_float(self, op: Op) -> str:
        assert self.choices is not None
        return f"profile {self.choices.profile.name}: {self.choices.head(op).kind} has no float32 output"

    def _note_output(self, op: Op, dtype: str | None) -> None:
        if self.choices is not None and op.role == "quantize":
            self.choices.note_output(op, dtype)

    def _output_config(self, op: Op, name: str) -> tuple[PointConfig, str]:
        """The configuration of an output and, if the hardware changed it, why."""
        if self.choices is None:
            return self.configs.resolve(name, op.kind, "output"), ""
        return self.choices.settle_output(op, name)

    # -- operands

    def _decide_operands(self, op: Op) -> None:
        group = self.group.get(op.name)
        inputs, weights = external_operands(op, group.ops if group is not None else (), self.origins)
        places = _weight_places(op, weights)
        for place in places:
            first = self.points.first_use(place, self.configs.resolve(place.name, op.kind, "weight"))
            if first is not None:
                self.configs.first_uses[place.name] = first
        signature = None
        if self.choices is not None:
            demands = [demand for demand in (self._demand(op, o) for o in inputs) if demand is not None]
            signature = self.choices.signature(op, demands, f"{op.name}.weight" if weights else None)
        for place in places:
            self._decide_weight(place, signature)
        for operand in inputs:
            self._decide_input(op, operand, signature)

    def _demand(self, op: Op, operand: Operand) -> InputDemand | None:
        """What the hardware must be able to read; None for an operand that is folded into the op or not quantized."""
        origins = self.origins.of(operand.sources)
        name = f"{op.name}.input{operand.index}"
        if not origins:
            return None
        if all(self.points.is_quantized(o) for o in origins):
            return InputDemand(name, tuple(self.points.by_name[f"{o.name}.output"] for o in origins))
        return InputDemand(name, ()) if self._left_out(op, operand) is None else None

    def _left_out(self, op: Op, operand: Operand) -> str | None:
        """Why an input that no quantized op made needs no quantizer."""
        if operand.mask and op.kind != "mul":
            return "mask: additive mask values are neither quantized nor observed"
        if self.origins.is_single_constant(operand):
            return "a single constant is folded into the op"
        if self.origins.is_zero(operand):
            return "zeros are exact on every grid"
        return None

    def _decide_input(self, op: Op, operand: Operand, signature: Signature | None) -> None:
        name = f"{op.name}.input{operand.index}"
        origins = self.origins.of(operand.sources)
        requantizes = all(self.points.is_quantized(o) for o in origins)
        if requantizes:
            made = [self.points.by_name[f"{o.name}.output"] for o in origins]
            if self.choices is None or signature is None or self.choices.accepts(op, signature, made):
                return
            given = ", ".join(dict.fromkeys(f"{point.op} gives {point.dtype} {point.scheme}" for point in made))
            why = f"requantized: {given}"
        else:
            left_out = self._left_out(op, operand)
            if left_out is not None:
                self.points.in_float[name] = left_out
                return
            others = (o for o in origins if not self.points.is_quantized(o))
            why = " or ".join(dict.fromkeys(map(self.points.why_needed, others)))
        if self.choices is None or signature is None:
            config, changed = self.configs.resolve(name, op.kind, "input"), ""
        else:
            config, changed = self.choices.settle_input(op, name, signature, requantizes)
        self.points.add(Place(op, name, "input", operand), config, why, changed)

    def _decide_weight(self, place: Place, signature: Signature | None) -> None:
        op = place.op
        if self.choices is None or signature is None:
            config, changed = self.configs.resolve(place.name, op.kind, "weight"), ""
        else:
            has_axis = place.held.axis is not None
            config, changed = self.choices.settle_weight(op, place.name, signature, has_axis)
        self.points.add(place, config, "", changed)

    # -- rules that matched nothing

    def unused_overrides(self) -> dict[int, ConfigurationError]:
        """Map the number of each rule that matched no point to the error that says why."""
        return {
            i: unmatched_override(rule, self.graph, self.points.by_name, self.points.in_float, self.status)
            for i, rule in enumerate(self.overrides)
            if i not in self.configs.used_overrides
        }


def _weight_places(op: Op, weights: list[Operand]) -> list[Place]:
    """The places of an op's weights. Two constants, or a recurrent layer's matrices, are told apart by numbers."""
    names = [f"{op.name}.weight" if i == 0 else f"{op.name}.weight{weight.index}" for i, weight in enumerate(weights)]
    return [Place(op, n, "weight", w, weight_channels(op, w)) for n, w in zip(names, weights, strict=True)]
