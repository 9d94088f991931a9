"""What goes where and why: ``make_plan(OpGraph, QConfig, overrides) -> QuantPlan``. Plain frozen data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning_qat.quantization.planning.deployed_part import DeployedPart, deployed_part
from lightning_qat.quantization.planning.fusion import FusionGroup, FusionMiss
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.target_paths import local_rules
from lightning_qat.quantization.qconfig import Override, QConfig
from lightning_qat.quantization.tracing.op_graph import Op, OpGraph

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
        split_sizes: lengths of groups along the axis that share a scale; None for one scale per channel.
        same_as: for a weight that is used twice: the point whose quantizer it shares.
        batch_norm: for a weight whose scale is shared by channels that a fused batch norm multiplies by different
            factors: that op. It is folded into the weight before quantization, as it is when deployed; statistics and
            sensitivities of the point are those of the folded weight.
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
    split_sizes: tuple[int, ...] | None = None
    batch_norm: str | None = None

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
        profile: ``name``, ``version`` and ``sha256`` of the hardware profile it was made under, None without one.
    """

    points: tuple[PointPlan, ...]
    ops: tuple[OpPlan, ...]
    float_points: dict[str, str]
    fusions: tuple[FusionGroup, ...]
    misses: tuple[FusionMiss, ...]
    qconfig: dict[str, Any]
    overrides: tuple[dict[str, Any], ...]
    profile: dict[str, str] | None = None

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

    def only_moves(self, join: Op) -> bool:
        """Whether a join (``cat``) needs no quantizer, as all of its inputs share one scale."""
        status = self.status.get(join.name)
        passes = join.role == "join" and status is not None and status.status == "passes"
        return passes and f"{join.name}.output" not in self.float_points

    def to_dict(self) -> dict[str, Any]:
        """Return primitives only (JSON, ``weights_only`` checkpoints)."""
        data: dict[str, Any] = {"version": PLAN_VERSION}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            data[field.name] = dict(value) if isinstance(value, dict) else _plain(value)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantPlan:
        """Rebuild a plan from :meth:`to_dict`."""
        return cls(
            points=tuple(_point(p) for p in data["points"]),
            ops=tuple(OpPlan(**o) for o in data["ops"]),
            float_points=dict(data["float_points"]),
            fusions=tuple(FusionGroup(tuple(f["ops"]), tuple(f["kinds"])) for f in data["fusions"]),
            misses=tuple(
                FusionMiss(tuple(m["ops"]), tuple(m["kinds"]), m["cause"], m["location"]) for m in data["misses"]
            ),
            qconfig=dict(data["qconfig"]),
            overrides=tuple(dict(o) for o in data["overrides"]),
            profile=data["profile"],
        )

    def to_json(self, indent: int | None = 2) -> str:
        """Return the plan as JSON."""
        return json.dumps(self.to_dict(), indent=indent)


def make_plan(
    graph: OpGraph,
    qconfig: QConfig | Mapping[str, Any] | None = None,
    overrides: Iterable[Override | Mapping[str, Any]] = (),
    profile: HardwareProfile | str | Path | None = None,
) -> QuantPlan:
    """Decide for every op of a graph what is quantized, how, and why.

    Args:
        graph: the traced ops.
        qconfig: defaults, or their dictionary.
        overrides: rules from general to specific; the last one that matches wins, field by field.
        profile: the hardware the plan is for: a shipped profile's name, the path of a YAML file, or a profile. Where
            the defaults ask for what it has not, the nearest type is taken; ops it does not compute stay float.

    Raises:
        ConfigurationError: unknown names, a rule that matches nothing, or one that asks for what the hardware has not.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.tracing.tracing import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> plan = make_plan(trace(net, [torch.ones(1, 4)]))
        >>> [point.name for point in plan.points]
        ['0.input0', '0.weight', '1.output', '2.weight']
    """
    return make_plans({"": graph}, qconfig, overrides, profile)[""]


def make_plans(
    graphs: Mapping[str, OpGraph],
    qconfig: QConfig | Mapping[str, Any] | None = None,
    overrides: Iterable[Override | Mapping[str, Any]] = (),
    profile: HardwareProfile | str | Path | None = None,
) -> dict[str, QuantPlan]:
    """Plan several targets with one configuration; a rule has to match in at least one of them.

    A rule's pattern may begin with the path of a target (``backbone.layers.0.*``): then it is about that target alone.

    Args:
        graphs: the traced ops of each target, by its path.
        qconfig: as for :func:`make_plan`.
        overrides: as for :func:`make_plan`.
        profile: as for :func:`make_plan`.

    Raises:
        ConfigurationError: unknown names, a rule that matches nothing in any target, or one that asks for what the
            hardware has not.
    """
    from lightning_qat.quantization.planning.planning import Planner

    defaults, rules, hardware = QConfig.of(qconfig), Override.list_of(overrides), HardwareProfile.of(profile)
    parts = {path: deployed_part(graph) for path, graph in graphs.items()}
    local = local_rules(rules, graphs)
    planners = {path: Planner(part.graph, defaults, local[path], hardware) for path, part in parts.items()}
    plans = {path: _completed(planner.plan(), graphs[path], parts[path]) for path, planner in planners.items()}
    written = tuple(dataclasses.asdict(rule) for rule in rules)
    plans = {path: dataclasses.replace(plan, overrides=written) for path, plan in plans.items()}
    unused = [planner.unused_overrides() for planner in planners.values()]
    for index in range(len(rules)):
        errors = [found[index] for found in unused if index in found]
        if len(errors) == len(planners):
            raise max(errors, key=lambda error: len(str(error)))  # the one that says most
    return plans


def _completed(plan: QuantPlan, graph: OpGraph, part: DeployedPart) -> QuantPlan:
    """Add the ops that are not part of the deployed model, in their places."""

    def status(op: Op) -> OpPlan:
        if op.name not in part.left_out:
            return plan.status[op.name]
        return OpPlan(op.name, "passes" if op.role in ("pass", "create") else "float", part.left_out[op.name])

    return dataclasses.replace(plan, ops=tuple(map(status, graph.ops)))


def _point(item: Mapping[str, Any]) -> PointPlan:
    sizes = item.get("split_sizes")
    return PointPlan(**{**item, "split_sizes": None if sizes is None else tuple(sizes)})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value
