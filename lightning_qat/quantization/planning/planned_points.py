"""The points that planning has decided on so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_qat.quantization.planning.folded_batch_norm import batch_norm_to_fold, statistics_path
from lightning_qat.quantization.planning.fusion import FusionGroup
from lightning_qat.quantization.planning.plan import PointPlan, PointRole
from lightning_qat.quantization.planning.point_config import PointConfig
from lightning_qat.quantization.tracing.op_graph import Op, Operand, OpGraph, Source


class PlannedPoints:
    """The points of a plan in the making, and the places that stay float.

    Args:
        graph: the traced ops.
        groups: the fused group of each op that is in one.

    Attributes:
        by_name: the points.
        in_float: places that could carry a quantizer and do not, with the reason.
    """

    def __init__(self, graph: OpGraph, groups: Mapping[str, FusionGroup]) -> None:
        self.graph = graph
        self.groups = groups
        self.by_name: dict[str, PointPlan] = {}
        self.in_float: dict[str, str] = {}
        self._outputs: set[str] = set()
        self._weights: dict[tuple[Any, ...], str] = {}

    def __contains__(self, name: str) -> bool:
        """Whether it was decided what happens in a place."""
        return name in self.by_name or name in self.in_float

    def add(
        self,
        op: Op,
        name: str,
        role: PointRole,
        index: int,
        resolved: PointConfig,
        why: str,
        changed: str,
        axis: int | None = None,
        weight: Operand | None = None,
    ) -> None:
        """Add a point, or the reason why the place stays float.

        Args:
            op: the op it belongs to.
            name: its name.
            role: what it quantizes.
            index: number of the operand; -1 for outputs.
            resolved: its configuration.
            why: why there is a point, where that is not obvious.
            changed: what the hardware changed in the configuration, and why.
            axis: channel axis of a weight, if it has one.
            weight: the operand, if it is a weight.
        """
        reasons = [why, changed]
        if resolved.dtype == "float32":
            text = "; ".join(filter(None, reasons))
            self.in_float[name] = f"float32: {text}" if changed else f"float32 by {resolved.rule}"
            return
        shape = op.outputs[0][1] if role == "output" else next(o.shape for o in op.operands if o.index == index)
        axis = axis if resolved.per_channel else None
        channels = shape[axis] if axis is not None else None
        sizes = resolved.split_sizes(name, shape)
        if resolved.split is not None and sizes is not None:
            axis, channels = resolved.split.axis, sum(sizes)
        same_as = norm = None
        if weight is not None:
            norm, obstacle = batch_norm_to_fold(self.graph, self.groups.get(op.name), op, weight, axis)
            reasons.append(f"{norm} is folded into it" if norm is not None else obstacle if axis is None else "")
            same_as = self._first_use(name, weight, axis, resolved, norm)
        self.by_name[name] = PointPlan(
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
            reason="; ".join(filter(None, (resolved.rule, *reasons))),
            same_as=same_as,
            split_sizes=sizes,
            batch_norm=norm,
        )
        if role == "output":
            self._outputs.add(op.name)

    def is_quantized(self, source: Source) -> bool:
        """Whether a tensor was quantized where it was made; of several results only the first is."""
        return source.kind == "op" and source.output == 0 and source.name in self._outputs

    def why_needed(self, source: Source) -> str:
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
            if source.output and source.name in self._outputs:
                return f"result {source.output} of {source.name} is not quantized"
            return f"{source.name} is {'a constant' if constant else 'not quantized'}"
        return f"{source.kind} {source.name}"

    def _first_use(
        self, name: str, weight: Operand, axis: int | None, resolved: PointConfig, norm: str | None
    ) -> str | None:
        """The point of an earlier op that quantizes the same parameter in the same way, if there is one."""
        parameters = [s.name for s in weight.sources if s.kind == "parameter"]
        if len(parameters) != len(weight.sources):
            return None
        folded = None if norm is None else statistics_path(self.graph.by_name[norm])
        percentile = resolved.percentile if resolved.observer == "percentile" else None
        found_by = (resolved.dtype, resolved.observer, percentile)
        first = self._weights.setdefault((tuple(parameters), axis, *found_by, folded), name)
        return None if first == name else first
