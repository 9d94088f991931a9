"""Where quantized and float ops meet: which ops compute in float32, and into how many pieces they cut a region."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lightning_qat.analysis.model_check.checked_region import CheckedRegion
from lightning_qat.quantization.region.effective_dtypes import FLOAT
from lightning_qat.quantization.tracing.op_graph import Op

Domain = Literal["float", "quantized"]
Place = Literal["head", "middle", "tail"]

_JOINED_OUTPUT = "joins results that leave the region"


@dataclass(frozen=True)
class FloatOp:
    """An op that computes in float32.

    Args:
        op: the op (of a fused group the last one).
        inputs: the float32 inputs, as point names.
        producers: the ops or inputs that they come from.
        reason: why it computes in float32.
        place: ``head``: nothing before it is quantized. ``tail``: nothing behind it is. ``middle``: the rest.
    """

    op: Op
    inputs: tuple[str, ...]
    producers: tuple[str, ...]
    reason: str
    place: Place


class Segments:
    """Cuts the ops of a region into runs of quantized and float ops.

    The stage of an op is one more than that of the ops it reads where quantized and float meet; the first quantized ops
    are at stage 1. Each stage with quantized ops is one segment for the accelerator.

    Args:
        checked: the region.
    """

    def __init__(self, checked: CheckedRegion) -> None:
        self.checked = checked
        self.domains: dict[str, Domain] = {}
        self.producers: dict[str, tuple[str, ...]] = {}
        self.stages: dict[str, int] = {}
        self.casts: set[tuple[str, Domain]] = set()
        for op in checked.computing:
            if checked.plan.float_points.get(f"{op.name}.output") == _JOINED_OUTPUT:
                continue  # it only places float32 results side by side in memory
            self._add(op)

    @property
    def accelerator_segments(self) -> int:
        """Number of runs of quantized ops."""
        return len({self.stages[name] for name, domain in self.domains.items() if domain == "quantized"})

    @property
    def boundary_casts(self) -> int:
        """Number of tensors that are quantized or dequantized between two ops."""
        return len(self.casts)

    @cached_property
    def float_ops(self) -> tuple[FloatOp, ...]:
        """The ops that compute in float, in execution order."""
        ops = (op for op in self.checked.computing if self.domains.get(op.name) == "float" or self._is_mask(op))
        return tuple(self._float_op(op) for op in ops)

    @cached_property
    def _feeds_quantized(self) -> frozenset[str]:
        found: set[str] = set()
        for name in reversed(self.domains):
            if self.domains[name] == "quantized" or name in found:
                found.update(self.producers[name])
        return frozenset(found)

    def _float_op(self, op: Op) -> FloatOp:
        checked = self.checked
        floats = [(m, o) for m, o in checked.inputs(op) if checked.dtypes.of_operand(m, o) == FLOAT]
        sources = [s for _, operand in floats for s in operand.sources]
        producers = tuple(f"{o.kind} {o.name}" if o.kind != "op" else o.name for o in checked.dtypes.origins(sources))
        weights = [name for member in self._members(op) for name in checked.float_weights.get(member, ())]
        names = (*(f"{m.name}.input{operand.index}" for m, operand in floats), *weights)
        place: Place = "middle" if op.name in self._feeds_quantized else "tail"
        if self.stages[op.name] == 0:
            place = "head"
        return FloatOp(op, names, producers, self._reason(op, names, producers), place)

    def _members(self, op: Op) -> tuple[str, ...]:
        group = self.checked.groups.get(op.name)
        return group.ops if group else (op.name,)

    def _reason(self, op: Op, inputs: tuple[str, ...], producers: tuple[str, ...]) -> str:
        plan, points = self.checked.plan, self.checked.points
        status = next((plan.status[m] for m in self._members(op) if plan.status[m].status == "float"), None)
        if status is not None:
            return status.reason
        makers = [f"{name}.output" for name in producers if name in plan.status]
        for name in (*inputs, *makers) if inputs else (f"{op.name}.output",):
            if name in points and not points[name].enabled:
                return f"{name} was switched off"
            if name in plan.float_points:
                return plan.float_points[name]
        return "its input comes from an op that is not quantized"

    def _add(self, op: Op) -> None:
        checked = self.checked
        sources = (s for _, operand in checked.data(op) for s in operand.sources)
        origins = (o.name for o in checked.dtypes.origins(sources) if o.kind in ("op", "mutated"))
        producers = tuple(dict.fromkeys(name for name in origins if name in self.stages))
        self.producers[op.name] = producers
        domain = self._domain(op)
        if self._is_mask(op) and any(self.domains[name] == "quantized" for name in producers):
            domain = "quantized"  # added on the way to a softmax, which tools take as one
        self.domains[op.name] = domain
        before = [self.stages[name] + (self.domains[name] != domain) for name in producers]
        self.stages[op.name] = max(before, default=0 if domain == "float" else 1)
        self.casts.update((name, domain) for name in producers if self.domains[name] != domain)

    def _is_mask(self, op: Op) -> bool:
        return self.checked.plan.status[op.name].reason.startswith("mask")

    def _domain(self, op: Op) -> Domain:
        checked, status = self.checked, self.checked.plan.status[op.name].status
        if op.role == "float" or status == "float":
            return "float"
        quantized_output = checked.dtypes.of_output(op) != FLOAT
        if op.role == "join":
            return "quantized" if quantized_output else "float"
        if any(checked.dtypes.of_operand(m, operand) == FLOAT for m, operand in checked.inputs(op)):
            return "float"
        if any(member in checked.float_weights for member in self._members(op)):
            return "float"
        in_place = checked.plan.float_points.get(f"{op.name}.output", "").startswith("written in place")
        return "quantized" if quantized_output or in_place or checked.head(op).gemm else "float"
