"""The points that planning has decided on so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_qat.quantization.planning.folded_batch_norm import batch_norm_to_fold, norm_behind, statistics_path
from lightning_qat.quantization.planning.fusion import FusionGroup
from lightning_qat.quantization.planning.plan import PointPlan, PointRole
from lightning_qat.quantization.planning.point_config import FirstUse, PointConfig
from lightning_qat.quantization.planning.weight_channels import SHARED, WeightChannels
from lightning_qat.quantization.tracing.op_graph import Op, Operand, OpGraph, Source

NO_CHANNELS = WeightChannels()


@dataclass(frozen=True)
class Place:
    """A place where a point can be.

    Args:
        op: the op it belongs to.
        name: name of the point.
        role: ``output``, ``weight`` or ``input``.
        operand: the operand that it quantizes; None for the output.
        held: where a weight holds the output channels.
    """

    op: Op
    name: str
    role: PointRole
    operand: Operand | None = None
    held: WeightChannels = NO_CHANNELS

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor, as traced."""
        return self.op.outputs[0][1] if self.operand is None else self.operand.shape


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
        self._first_uses: dict[tuple[Any, ...], FirstUse] = {}

    def __contains__(self, name: str) -> bool:
        """Whether there is a decision about a place."""
        return name in self.by_name or name in self.in_float

    def add(self, place: Place, config: PointConfig, why: str, changed: str) -> None:
        """Add a point, or the reason why the place stays float.

        Args:
            place: where it is.
            config: its configuration.
            why: the reason for a point, if it is not obvious.
            changed: the changes that the hardware made to the configuration, with the reason.
        """
        reasons = [why, changed]
        if config.dtype == "float32":
            text = "; ".join(filter(None, reasons))
            self.in_float[place.name] = f"float32: {text}" if changed else f"float32 by {config.rule}"
            return
        if config.per_channel and place.held.shared:
            reasons.append(f"{SHARED}: {place.held.shared}")
        axis, channels, groups, sizes = _channels(place, config)
        same_as = norm = None
        if place.role == "weight" and place.operand is not None:
            group = self.groups.get(place.op.name)
            norm, obstacle = batch_norm_to_fold(self.graph, group, place.op, place.operand, None if sizes else channels)
            reasons.append(f"{norm} is folded into it" if norm is not None else obstacle if axis is None else "")
            for tensor in self._tensors(place, config):
                self._first_uses.setdefault(tensor, FirstUse(place.name, place.op.kind))
            same_as = self._first_with(place.name, place.operand, (axis, groups), config, norm)
        self.by_name[place.name] = PointPlan(
            name=place.name,
            op=place.op.name,
            role=place.role,
            operand=place.operand.index if place.operand is not None else -1,
            dtype=config.dtype,
            scheme=config.scheme,
            axis=axis,
            channels=channels,
            observer=config.observer,
            percentile=config.percentile,
            fixed_scale=config.fixed_scale,
            narrow_range=place.role == "weight",
            reason="; ".join(filter(None, (config.rule, *reasons))),
            same_as=same_as,
            split_sizes=sizes,
            batch_norm=norm,
            groups=groups,
        )
        if place.role == "output":
            self._outputs.add(place.op.name)

    def is_quantized(self, source: Source) -> bool:
        """Whether the op that made a tensor quantizes it. Only the first of several results is quantized."""
        return source.kind == "op" and source.output == 0 and source.name in self._outputs

    def why_needed(self, source: Source) -> str:
        """Say why a tensor from this source needs a quantizer at its consumer."""
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

    def first_use(self, place: Place, config: PointConfig) -> FirstUse | None:
        """Return the first use of a parameter, if a later one would share its quantizer with the same configuration.

        Args:
            place: the later use.
            config: its configuration, by the rules that cover it alone.
        """
        found = (self._first_uses.get(tensor) for tensor in self._tensors(place, config))
        return next((use for use in found if use is not None), None)

    def _tensors(self, place: Place, config: PointConfig) -> list[tuple[Any, ...]]:
        """What a weight's quantizer quantizes with this configuration, and what it would quantize channel by channel.

        Two weights of which one of these is the same differ in nothing but what rules say.
        """
        assert place.operand is not None
        sources = place.operand.sources
        parameters = tuple(s.name for s in sources if s.kind == "parameter")
        if not parameters or len(parameters) != len(sources):
            return []
        axis, channels, groups, sizes = _channels(place, config)
        fused = self.groups.get(place.op.name)
        folded, _ = batch_norm_to_fold(self.graph, fused, place.op, place.operand, None if sizes else channels)
        behind, _ = norm_behind(self.graph, fused, place.op, place.operand)
        norm = self.graph.by_name[folded] if folded is not None else None
        as_planned = ("planned", parameters, axis, groups, statistics_path(norm) if norm is not None else None)
        static = (place.held.axis, place.held.groups, statistics_path(behind) if behind is not None else None)
        return [as_planned, ("channels", parameters, *static)]

    def _first_with(
        self, name: str, weight: Operand, held: tuple[int | None, int], config: PointConfig, norm: str | None
    ) -> str | None:
        """The point of an earlier op that quantizes the same parameter in the same way, if there is one."""
        parameters = [s.name for s in weight.sources if s.kind == "parameter"]
        if len(parameters) != len(weight.sources):
            return None
        folded = None if norm is None else statistics_path(self.graph.by_name[norm])
        percentile = config.percentile if config.observer == "percentile" else None
        found_by = (config.dtype, config.observer, percentile)
        first = self._weights.setdefault((tuple(parameters), held, *found_by, folded), name)
        return None if first == name else first


def _channels(place: Place, config: PointConfig) -> tuple[int | None, int | None, int, tuple[int, ...] | None]:
    """The axis along which a point has several scales, the number of channels, and what ``PointPlan`` says of them."""
    sizes = config.split_sizes(place.name, place.shape)
    if config.split is not None and sizes is not None:
        return config.split.axis, sum(sizes), 1, sizes
    held = place.held if config.per_channel else NO_CHANNELS
    return held.axis, held.count(place.shape), held.groups, None
