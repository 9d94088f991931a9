"""What goes where and why: ``make_plan(OpGraph, QConfig, overrides) -> QuantPlan``. Plain frozen data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from lightning_qat.quantization.fusion import FusionGroup, FusionMiss
from lightning_qat.quantization.op_graph import OpGraph
from lightning_qat.quantization.qconfig import Override, QConfig

PointRole = Literal["output", "weight", "input"]
OpStatus = Literal["quantized", "fused", "passes", "float", "constant"]
PLAN_VERSION = 1


@dataclass(frozen=True)
class PointPlan:
    """One quantization point.

    Args:
        name: ``<op>.output``, ``<op>.weight`` or ``<op>.inputN``.
        op: the op it belongs to.
        role: what it quantizes.
        operand: number of the tensor leaf among the op's arguments; -1 for outputs.
        dtype: quantized type.
        scheme: ``symmetric`` or ``affine``.
        axis: channel axis, None for one scale per tensor.
        channels: size of that axis.
        observer: how the scale is found.
        percentile: for the percentile observer.
        fixed_scale: scale given by the user.
        narrow_range: symmetric codes (-127..127), the default for weights.
        reason: the rule that decided the configuration, and why the point exists where that is not obvious.
        same_as: for a weight that is used twice: the point whose quantizer it shares.
    """

    name: str
    op: str
    role: PointRole
    operand: int
    dtype: str
    scheme: str = "symmetric"
    axis: int | None = None
    channels: int | None = None
    observer: str = "mse"
    percentile: float = 99.99
    fixed_scale: float | None = None
    narrow_range: bool = False
    reason: str = ""
    same_as: str | None = None

    @property
    def is_weight(self) -> bool:
        """Whether the point quantizes a weight."""
        return self.role == "weight"


@dataclass(frozen=True)
class OpPlan:
    """What happens to one op, and why."""

    name: str
    status: OpStatus
    reason: str = ""


@dataclass(frozen=True)
class QuantPlan:
    """All decisions for one region.

    Args:
        points: the quantization points, in execution order.
        ops: one entry per op of the graph.
        float_points: places that could carry a quantizer and do not, with the reason.
        fusions: groups computed as one.
        misses: groups that match a pattern and are not fused.
        qconfig: the defaults it was made from.
        overrides: the rules it was made from.
    """

    points: tuple[PointPlan, ...]
    ops: tuple[OpPlan, ...]
    float_points: dict[str, str]
    fusions: tuple[FusionGroup, ...]
    misses: tuple[FusionMiss, ...]
    qconfig: dict[str, Any]
    overrides: tuple[dict[str, Any], ...]

    @cached_property
    def by_name(self) -> dict[str, PointPlan]:
        """Points by name."""
        return {point.name: point for point in self.points}

    @cached_property
    def by_op(self) -> dict[str, tuple[PointPlan, ...]]:
        """Points of each op."""
        found: dict[str, list[PointPlan]] = {}
        for point in self.points:
            found.setdefault(point.op, []).append(point)
        return {op: tuple(points) for op, points in found.items()}

    @cached_property
    def status(self) -> dict[str, OpPlan]:
        """Op decisions by op name."""
        return {op.name: op for op in self.ops}

    def to_dict(self) -> dict[str, Any]:
        """Return primitives only (JSON, ``weights_only`` checkpoints)."""
        data: dict[str, Any] = {"version": PLAN_VERSION}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            data[field.name] = [_plain(v) for v in value] if isinstance(value, tuple) else dict(value)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantPlan:
        """Rebuild a plan from :meth:`to_dict`."""
        return cls(
            points=tuple(PointPlan(**p) for p in data["points"]),
            ops=tuple(OpPlan(**o) for o in data["ops"]),
            float_points=dict(data["float_points"]),
            fusions=tuple(FusionGroup(tuple(f["ops"]), tuple(f["kinds"])) for f in data["fusions"]),
            misses=tuple(
                FusionMiss(tuple(m["ops"]), tuple(m["kinds"]), m["cause"], m["location"]) for m in data["misses"]
            ),
            qconfig=dict(data["qconfig"]),
            overrides=tuple(dict(o) for o in data["overrides"]),
        )

    def to_json(self, indent: int | None = 2) -> str:
        """Return the plan as JSON."""
        return json.dumps(self.to_dict(), indent=indent)


def make_plan(
    graph: OpGraph,
    qconfig: QConfig | Mapping[str, Any] | None = None,
    overrides: Iterable[Override | Mapping[str, Any]] = (),
) -> QuantPlan:
    """Decide for every op of a graph what is quantized, how, and why.

    Args:
        graph: the traced ops.
        qconfig: defaults, or their dictionary.
        overrides: rules from general to specific; the last one that matches wins, field by field.

    Raises:
        ConfigurationError: unknown names, or a rule that matches nothing.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.tracing import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> plan = make_plan(trace(net, [torch.ones(1, 4)]))
        >>> [point.name for point in plan.points]
        ['0.input0', '0.weight', '1.output', '2.weight']
    """
    return make_plans({"": graph}, qconfig, overrides)[""]


def make_plans(
    graphs: Mapping[str, OpGraph],
    qconfig: QConfig | Mapping[str, Any] | None = None,
    overrides: Iterable[Override | Mapping[str, Any]] = (),
) -> dict[str, QuantPlan]:
    """Plan several targets with one configuration; a rule has to match in at least one of them.

    Args:
        graphs: the traced ops of each target, by its path.
        qconfig: as for :func:`make_plan`.
        overrides: as for :func:`make_plan`.

    Raises:
        ConfigurationError: unknown names, or a rule that matches nothing in any target.
    """
    from lightning_qat.quantization.planning import Planner

    defaults, rules = QConfig.of(qconfig), Override.list_of(overrides)
    planners = {path: Planner(graph, defaults, rules) for path, graph in graphs.items()}
    plans = {path: planner.plan() for path, planner in planners.items()}
    unused = [planner.unused_overrides() for planner in planners.values()]
    for index in range(len(rules)):
        errors = [found[index] for found in unused if index in found]
        if len(errors) == len(planners):
            raise max(errors, key=lambda error: len(str(error)))  # the one that says most
    return plans


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value
