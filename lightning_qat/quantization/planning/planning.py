"""The rules behind :func:`lightning_qat.quantization.planning.plan.make_plan`."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.planning.folded_batch_norm import batch_norm_to_fold, statistics_path
from lightning_qat.quantization.planning.fusion import find_fusions
from lightning_qat.quantization.planning.fusion_patterns import DEFAULT_PATTERNS
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile, Signature
from lightning_qat.quantization.planning.plan import OpPlan, PointPlan, PointRole, QuantPlan
from lightning_qat.quantization.planning.point_config import PointConfig, PointConfigs
from lightning_qat.quantization.planning.profile_planning import InputDemand, ProfileChoices, RunsInFloat
from lightning_qat.quantization.planning.unmatched_overrides import unmatched_override
from lightning_qat.quantization.qconfig import Override, QConfig
from lightning_qat.quantization.tracing.op_graph import Op, Operand, OpGraph, Source
from lightning_qat.quantization.tracing.tensor_origins import TensorOrigins, moved

_WITH_ADDEND = frozenset(["addmm", "baddbmm", "addbmm", "addmv", "addr"])
_MATRIX_PRODUCTS = frozenset(["matmul", "rmatmul", "bmm", "addmm", "baddbmm", "addbmm"])


class Planner:
    """Makes one plan; the passes share the look-ups below."""

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
        self.points: dict[str, PointPlan] = {}
        self.float_points: dict[str, str] = {}
        self.status: dict[str, OpPlan] = {}
        self.quantized_outputs: set[str] = set()
        self.passing_joins: set[str] = set()
        self.origins = TensorOrigins(self.graph, self.passing_joins)
        self._weights: dict[tuple[Any, ...], str] = {}

    def plan(self) -> QuantPlan:
        """Decide outputs first: whether an operand needs a quantizer depends on its producer.

        Whether every rule matched is asked afterwards, with :meth:`unused_overrides`.
        """
        high_precision = self._high_precision()
        while not self._decide(high_precision):
            self._forget()
        order = {op.name: i for i, op in enumerate(self.graph.ops)}
        rank = {"input": 0, "weight": 1, "output": 2}
        points = sorted(self.points.values(), key=lambda p: (order[p.op], rank[p.role], p.operand))
        return QuantPlan(
            points=tuple(points),
            ops=tuple(self.status[op.name] for op in self.graph.ops),
            float_points=self.float_points,
            fusions=self.groups,
            misses=self.misses,
            qconfig=dataclasses.asdict(self.qconfig),
            overrides=tuple(dataclasses.asdict(o) for o in self.overrides),
            profile=self.profile.identity() if self.profile is not None else None,
        )

    def _decide(self, high_precision: dict[str, str]) -> bool:
        """Decide everything once. False if some ops turned out to run in float, which changes what others read."""
        settled = True
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

    def _decide_output(self, op: Op, high_precision: dict[str, str]) -> None:
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
            self._float_output(op, name, "mask: holds additive mask values")
            if op.gemm and self._can_leave(op):
                self._note_output(op, "float32")
        elif op.name in self.group and self.group[op.name].ops[-1] != op.name:
            self._status(op, "fused", f"fused into {self.group[op.name].ops[-1]}")
        elif op.inplace and Source("op", op.name) not in self.used:
            self._float_output(op, name, "written in place and the result is not used: quantized where it is read")
            self._note_output(op, None)
        elif op.name in high_precision and not self._forced(op, name) and self._can_leave(op):
            self._float_output(op, name, high_precision[op.name])
            self._note_output(op, "float32")
        else:
            config, changed = self._configured(op, name, "output")
            why = "" if op.name not in high_precision or self._can_leave(op) else self._no_float(op)
            self._add_point(op, name, "output", -1, config, "; ".join(filter(None, (changed, why))))
            self._status(op, "quantized", op.reason if name in self.points else self.float_points[name])

    def _float_output(self, op: Op, name: str, reason: str) -> None:
        self.float_points[name] = reason
        if reason.startswith("mask") and not (op.gemm and self._can_leave(op)):
            self._status(op, "float", reason)  # but a product that a mask is added to (baddbmm) is one on codes
        else:
            self._status(op, "quantized" if op.role == "quantize" else "passes", reason)

    def _high_precision(self) -> dict[str, str]:
        """GEMMs (with their batch norm) whose result leaves the region, and joins of nothing else."""
        found: dict[str, str] = {}
        pending = [s for output in self.graph.outputs for s in output.sources]
        seen: set[Source] = set()
        while pending:
            source = pending.pop()
            op = self.graph.by_name.get(source.name) if source.kind in ("op", "mutated") else None
            if source in seen or op is None or not op.data_dependent:
                continue
            seen.add(source)
            if op.role == "pass":
                pending.extend(moved(op, source.output))
            elif op.role == "join":
                if all(consumer.role == "pass" for consumer in self.graph.consumers.get(op.name, ())):
                    found[op.name] = "joins results that leave the region"
                    pending.extend(s for operand in op.operands if operand.is_float for s in operand.sources)
            elif op.gemm or (op.kind == "batch_norm" and self._follows_gemm(op)):
                found[op.name] = "high-precision output: a GEMM result that leaves the region stays float32"
        return found

    def _follows_gemm(self, op: Op) -> bool:
        group = self.group.get(op.name)
        return group is not None and self.graph.by_name[group.ops[0]].gemm and group.ops[-1] == op.name

    def _is_passing_join(self, op: Op) -> bool:
        origins = {o for operand in op.operands if operand.is_float for o in self.origins.of(operand.sources)}
        return len(origins) == 1 and self._is_quantized(next(iter(origins)))

    def _forced(self, op: Op, point: str) -> bool:
        return any(o.names_exactly(point) and o.activation and o.activation.dtype for o in self.overrides)

    def _can_leave(self, op: Op) -> bool:
        """Whether the hardware can give the result as float32; a join of such results happens behind it."""
        return self.choices is None or op.role == "join" or self.choices.has_float_output(op)

    def _no_float(self, op: Op) -> str:
        assert self.choices is not None
        return f"profile {self.choices.profile.name}: {self.choices.head(op).kind} has no float32 output"

    def _note_output(self, op: Op, dtype: str | None) -> None:
        if self.choices is not None and op.role == "quantize":
            self.choices.note_output(op, dtype)

    def _configured(self, op: Op, name: str, role: PointRole) -> tuple[PointConfig, str]:
        """The configuration of an output and, if the hardware changed it, why."""
        if self.choices is None:
            return self.configs.resolve(name, op.kind, role), ""
        return self.choices.settle_output(op, name)

    # -- operands

    def _decide_operands(self, op: Op) -> None:
        inputs, weights = self._external(op)
        signature = None
        if self.choices is not None:
            demands = [demand for demand in (self._demand(op, o) for o in inputs) if demand is not None]
            signature = self.choices.signature(op, demands, f"{op.name}.weight" if weights else None)
        for operand in op.operands:
            if operand in weights:
                self._decide_weight(op, operand, signature)
            elif operand in inputs:
                self._decide_input(op, operand, signature)

    def _external(self, op: Op) -> tuple[list[Operand], list[Operand]]:
        """The operands from outside the fused group that could be quantized: inputs, and weights."""
        group = self.group.get(op.name)
        inputs, weights = [], []
        for operand in op.operands:
            if operand.role == "weight" or (op.gemm and operand.role == "data" and self.origins.is_constant(operand)):
                if not self.origins.is_constant(operand):
                    inputs.append(operand)  # a weight computed from data is an activation
                elif op.kind not in _WITH_ADDEND or operand.index != 0:  # a bias is kept in the accumulator's type
                    weights.append(operand)
            elif operand.role == "data" and not (op.role == "join" and operand.written):
                inside = group is not None and all(s.kind == "op" and s.name in group.ops for s in operand.sources)
                if not inside:
                    inputs.append(operand)
        return inputs, weights

    def _demand(self, op: Op, operand: Operand) -> InputDemand | None:
        """What the hardware has to be able to read; None for what is folded into the op or not quantized anyway."""
        origins = self.origins.of(operand.sources)
        name = f"{op.name}.input{operand.index}"
        if not origins:
            return None
        if all(self._is_quantized(o) for o in origins):
            return InputDemand(name, tuple(self.points[f"{o.name}.output"] for o in origins))
        return InputDemand(name, ()) if self._left_out(op, operand) is None else None

    def _left_out(self, op: Op, operand: Operand) -> str | None:
        """Why an input that no quantized op made needs no quantizer."""
        if operand.mask and op.kind not in ("mul",):
            return "mask: additive mask values are neither quantized nor observed"
        if self.origins.is_single_constant(operand):
            return "a single constant is folded into the op"
        if self.origins.is_zero(operand):
            return "zeros are exact on every grid"
        return None

    def _decide_input(self, op: Op, operand: Operand, signature: Signature | None) -> None:
        name = f"{op.name}.input{operand.index}"
        origins = self.origins.of(operand.sources)
        requantizes = all(self._is_quantized(o) for o in origins)
        if requantizes:
            made = [self.points[f"{o.name}.output"] for o in origins]
            if self.choices is None or signature is None or self.choices.accepts(op, signature, made):
                return
            given = ", ".join(dict.fromkeys(f"{point.op} gives {point.dtype} {point.scheme}" for point in made))
            why = f"requantized: {given}"
        else:
            left_out = self._left_out(op, operand)
            if left_out is not None:
                self.float_points[name] = left_out
                return
            why = " or ".join(dict.fromkeys(self._why(o) for o in origins if not self._is_quantized(o)))
        if self.choices is None or signature is None:
            config = self.configs.resolve(name, op.kind, "input")
        else:
            config, changed = self.choices.settle_input(op, name, signature, requantizes)
            why = "; ".join(filter(None, (why, changed)))
        self._add_point(op, name, "input", operand.index, config, why)

    def _decide_weight(self, op: Op, operand: Operand, signature: Signature | None) -> None:
        name = f"{op.name}.weight"
        if name in self.points or name in self.float_points:  # of two constants, or a recurrent layer's matrices
            name = f"{op.name}.weight{operand.index}"
        axis = op.weight_axis
        if axis is None and op.kind in _MATRIX_PRODUCTS and len(operand.shape) >= 2:
            # columns of a right operand and rows of a left one are the output channels
            is_left = (operand is op.operands[-2]) != (op.kind == "rmatmul")
            axis = len(operand.shape) - (2 if is_left else 1)
        if self.choices is None or signature is None:
            config, why = self.configs.resolve(name, op.kind, "weight"), ""
        else:
            config, why = self.choices.settle_weight(op, name, signature, has_axis=axis is not None)
        self._add_point(op, name, "weight", operand.index, config, why, axis=axis, operand=operand)

    def _add_point(
        self,
        op: Op,
        name: str,
        role: PointRole,
        index: int,
        resolved: PointConfig,
        why: str = "",
        axis: int | None = None,
        operand: Operand | None = None,
    ) -> None:
        if resolved.dtype == "float32":
            self.float_points[name] = f"float32: {why}" if "profile" in why else f"float32 by {resolved.rule}"
            return
        if operand is None or not resolved.per_channel:
            axis = None
        channels = operand.shape[axis] if operand is not None and axis is not None else None
        shape = op.outputs[0][1] if role == "output" else next(o.shape for o in op.operands if o.index == index)
        sizes = resolved.split_sizes(name, shape)
        if resolved.split is not None and sizes is not None:
            axis, channels = resolved.split.axis, sum(sizes)
        same_as = norm = None
        if role == "weight" and operand is not None:
            norm, obstacle = batch_norm_to_fold(self.graph, self.group.get(op.name), op, operand, axis)
            folds = f"{norm} is folded into it" if norm is not None else obstacle if axis is None else ""
            why = "; ".join(filter(None, (why, folds)))
            parameters = [s.name for s in operand.sources if s.kind == "parameter"]
            if len(parameters) == len(operand.sources):
                folded = None if norm is None else statistics_path(self.graph.by_name[norm])
                key = (tuple(parameters), axis, resolved.dtype, resolved.observer, folded)
                same_as = self._weights.setdefault(key, name)
        self.points[name] = PointPlan(
            name=name,
            op=op.name,
            role=role,
            operand=index,
            dtype=resolved.dtype,
            scheme=resolved.scheme,
            axis=axis,
            channels=channels,
            observer=resolved.observer,
            percentile=resolved.percentile,
            fixed_scale=resolved.fixed_scale,
            narrow_range=role == "weight",
            reason=f"{resolved.rule}; {why}" if why else resolved.rule,
            same_as=None if same_as == name else same_as,
            split_sizes=sizes,
            batch_norm=norm,
        )
        if role == "output":
            self.quantized_outputs.add(op.name)

    # -- where tensors come from

    def _is_quantized(self, source: Source) -> bool:
        """Of several results only the first has a quantizer."""
        return source.kind == "op" and source.output == 0 and source.name in self.quantized_outputs

    def _why(self, source: Source) -> str:
        """Say why a tensor that comes from there needs a quantizer at its consumer."""
        if source.kind == "opaque":
            return "produced by code that cannot be traced" if source.name == "unknown" else source.name
        if source.kind == "mutated":
            op = self.graph.by_name[source.name]
            return (
                f"written in place by {op.name}" if op.inplace or not op.outputs else f"{op.name} is written in place"
            )
        if source.kind == "op":
            constant = not self.graph.by_name[source.name].data_dependent
            if source.output and source.name in self.quantized_outputs:
                return f"result {source.output} of {source.name} is not quantized"
            return f"{source.name} is {'a constant' if constant else 'not quantized'}"
        return f"{source.kind} {source.name}"

    # -- rules that matched nothing

    def unused_overrides(self) -> dict[int, ConfigurationError]:
        """The rules that matched no point, by number, each with the error that says why."""
        return {
            i: unmatched_override(rule, self.graph, self.points, self.float_points, self.status)
            for i, rule in enumerate(self.overrides)
            if i not in self.configs.used_overrides
        }

    def _status(self, op: Op, status: Any, reason: str = "") -> None:
        self.status[op.name] = OpPlan(op.name, status, reason)
