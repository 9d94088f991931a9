"""The rules behind :func:`lightning_qat.quantization.plan.make_plan`."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

from lightning_qat.quantization.errors import ConfigurationError, near_names
from lightning_qat.quantization.fusion import find_fusions
from lightning_qat.quantization.op_graph import Op, Operand, OpGraph, Source
from lightning_qat.quantization.plan import OpPlan, PointPlan, PointRole, QuantPlan
from lightning_qat.quantization.point_config import PointConfigs
from lightning_qat.quantization.qconfig import Override, QConfig
from lightning_qat.quantization.torch_functions import PARALLEL

_WITH_ADDEND = frozenset(["addmm", "baddbmm", "addbmm", "addmv"])
_MATRIX_PRODUCTS = frozenset(["matmul", "rmatmul", "bmm", "addmm", "baddbmm", "addbmm"])


class Planner:
    """Makes one plan; the passes share the look-ups below."""

    def __init__(self, graph: OpGraph, qconfig: QConfig, overrides: list[Override]) -> None:
        self.graph = graph
        self.qconfig = qconfig
        self.overrides = overrides
        self.configs = PointConfigs(qconfig, overrides)
        self.groups, self.misses = find_fusions(graph)
        self.group = {name: group for group in self.groups for name in group.ops}
        self.used = {s for op in graph.ops for o in op.operands for s in o.sources}
        self.used |= {s for output in graph.outputs for s in output.sources}
        self.points: dict[str, PointPlan] = {}
        self.float_points: dict[str, str] = {}
        self.status: dict[str, OpPlan] = {}
        self.quantized_outputs: set[str] = set()
        self.passing_joins: set[str] = set()
        self._weights: dict[tuple[Any, ...], str] = {}

    def plan(self) -> QuantPlan:
        """Decide outputs first: whether an operand needs a quantizer depends on its producer.

        Whether every rule matched is asked afterwards, with :meth:`unused_overrides`.
        """
        high_precision = self._high_precision()
        for op in self.graph.ops:
            self._decide_output(op, high_precision)
        for op in self.graph.ops:
            if self.status[op.name].status in ("quantized", "fused") and op.role == "quantize":
                self._decide_operands(op)
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
        )

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
        elif op.role == "join" and self._is_passing_join(op):
            self.passing_joins.add(op.name)
            self._status(op, "passes", "all inputs share one scale")
        elif op.mask:
            self._float_output(op, name, "mask: holds additive mask values")
        elif op.name in self.group and self.group[op.name].ops[-1] != op.name:
            self._status(op, "fused", f"fused into {self.group[op.name].ops[-1]}")
        elif op.inplace and Source("op", op.name) not in self.used:
            self._float_output(op, name, "written in place and the result is not used: quantized where it is read")
        elif op.name in high_precision and not self._forced(op, name):
            self._float_output(op, name, high_precision[op.name])
        else:
            self._add_point(op, name, "output", -1)
            self._status(op, "quantized", "" if name in self.points else self.float_points[name])

    def _float_output(self, op: Op, name: str, reason: str) -> None:
        self.float_points[name] = reason
        if reason.startswith("mask"):
            self._status(op, "float", reason)
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
                pending.extend(self._moved(op, source.output))
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
        origins = {o for operand in op.operands if operand.is_float for o in self._origins(operand.sources)}
        return len(origins) == 1 and self._is_quantized(next(iter(origins)))

    def _forced(self, op: Op, point: str) -> bool:
        return any(o.names_exactly(point) and o.activation and o.activation.dtype for o in self.overrides)

    # -- operands

    def _decide_operands(self, op: Op) -> None:
        group = self.group.get(op.name)
        for operand in op.operands:
            if operand.role == "weight" or (op.gemm and operand.role == "data" and self._is_constant(operand)):
                self._decide_weight(op, operand)
            elif operand.role == "data":
                inside = group is not None and all(s.kind == "op" and s.name in group.ops for s in operand.sources)
                if not inside:
                    self._decide_input(op, operand)

    def _decide_input(self, op: Op, operand: Operand) -> None:
        name = f"{op.name}.input{operand.index}"
        origins = self._origins(operand.sources)
        if all(self._is_quantized(o) for o in origins):
            return
        if operand.mask and op.kind not in ("mul",):
            self.float_points[name] = "mask: additive mask values are neither quantized nor observed"
        elif self._is_constant(operand) and _size(operand.shape) == 1:
            self.float_points[name] = "a single constant is folded into the op"
        else:
            why = " or ".join(dict.fromkeys(self._why(o) for o in origins if not self._is_quantized(o)))
            self._add_point(op, name, "input", operand.index, why)

    def _decide_weight(self, op: Op, operand: Operand) -> None:
        if not self._is_constant(operand):
            self._decide_input(op, operand)  # a weight computed from data is an activation
            return
        if op.kind in _WITH_ADDEND and operand.index == 0:
            return  # a bias, kept in the accumulator's type
        name = f"{op.name}.weight"
        if name in self.points:  # both operands of a product are constant
            name = f"{op.name}.weight{operand.index}"
        axis = op.weight_axis
        if axis is None and op.kind in _MATRIX_PRODUCTS and len(operand.shape) >= 2:
            # columns of a right operand and rows of a left one are the output channels
            is_left = (operand is op.operands[-2]) != (op.kind == "rmatmul")
            axis = len(operand.shape) - (2 if is_left else 1)
        self._add_point(op, name, "weight", operand.index, axis=axis, operand=operand)

    def _add_point(
        self,
        op: Op,
        name: str,
        role: PointRole,
        index: int,
        why: str = "",
        axis: int | None = None,
        operand: Operand | None = None,
    ) -> None:
        resolved = self.configs.resolve(name, op.kind, role)
        if resolved.dtype == "float32":
            self.float_points[name] = f"float32 by {resolved.rule}"
            return
        if operand is None or not resolved.per_channel:
            axis = None
        channels = operand.shape[axis] if operand is not None and axis is not None else None
        same_as = None
        if role == "weight" and operand is not None:
            parameters = [s.name for s in operand.sources if s.kind == "parameter"]
            if len(parameters) == len(operand.sources):
                key = (tuple(parameters), axis, resolved.dtype, resolved.observer)
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
        )
        if role == "output":
            self.quantized_outputs.add(op.name)

    # -- where tensors come from

    def _moved(self, op: Op, output: int) -> tuple[Source, ...]:
        """The sources of the tensor that a data movement op moves to one of its results."""
        floats = [operand for operand in op.operands if operand.is_float] or list(op.operands)
        if op.kind in PARALLEL and output < len(op.operands):
            return op.operands[output].sources
        return floats[0].sources if floats else ()

    def _origins(self, sources: tuple[Source, ...]) -> list[Source]:
        """Follow data movement back to where the values were made."""
        origins: dict[Source, None] = {}  # a set with the order of the program, so that plans are reproducible
        seen: set[Source] = set()
        pending = deque(sources)
        while pending:
            source = pending.popleft()
            if source in seen:
                continue
            seen.add(source)
            op = self.graph.by_name.get(source.name) if source.kind in ("op", "mutated") else None
            if op is not None and source.kind == "op" and op.data_dependent:
                if op.role == "pass":
                    pending.extend(self._moved(op, source.output))
                    continue
                if op.name in self.passing_joins:
                    pending.extend(s for operand in op.operands if operand.is_float for s in operand.sources)
                    continue
                source = Source("op", op.name)
            origins[source] = None
        return list(origins)

    def _is_quantized(self, source: Source) -> bool:
        return source.kind == "op" and source.name in self.quantized_outputs

    def _is_constant(self, operand: Operand) -> bool:
        for source in operand.sources:
            if source.kind in ("op", "mutated"):
                if self.graph.by_name[source.name].data_dependent:
                    return False
            elif source.kind not in ("parameter", "buffer", "constant"):
                return False
        return True

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
            return f"{source.name} is {'a constant' if constant else 'not quantized'}"
        return f"{source.kind} {source.name}"

    # -- rules that matched nothing

    def unused_overrides(self) -> dict[int, ConfigurationError]:
        """The rules that matched no point, by number, each with the error that says why."""
        return {i: self._unused(rule) for i, rule in enumerate(self.overrides) if i not in self.configs.used_overrides}

    def _unused(self, override: Override) -> ConfigurationError:
        names = [*self.points, *self.float_points]
        matching = [n for n in self.float_points if override.selects(n, self._kind_of(n))]
        if matching:
            return ConfigurationError(
                f"override ({override.label}) matches only points that stay float: "
                + "; ".join(f"{n}: {self.float_points[n]}" for n in matching[:3])
            )
        floats = [o for o in self.status.values() if override.selects(f"{o.name}.output", self._kind_of(f"{o.name}."))]
        if floats:
            op = min(floats, key=lambda o: ("fused", "float", "passes", "quantized", "constant").index(o.status))
            return ConfigurationError(
                f"override ({override.label}) matches ops without quantization points, such as {op.name} "
                f"({op.status}{': ' + op.reason if op.reason else ''}), or changes only "
                f"{'weights' if override.weight else 'activations'} where there are none."
            )
        scopes = {op.scope for op in self.graph.ops if op.scope}
        choices = {*names, *self.status, *scopes}
        if override.match is None:
            choices = {op.kind for op in self.graph.ops if op.role in ("quantize", "join")}
        near = near_names(override.match or override.op_type, sorted(choices))
        hint = f" Near names: {', '.join(near)}." if near else ""
        return ConfigurationError(f"override ({override.label}) matches no quantization point.{hint}")

    def _kind_of(self, point: str) -> str:
        return self.graph.by_name[point.rpartition(".")[0]].kind

    def _status(self, op: Op, status: Any, reason: str = "") -> None:
        self.status[op.name] = OpPlan(op.name, status, reason)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
