"""The plan that ``make_plan`` returns: which points and ops are quantized how, and why. Plain frozen data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from lightning_qat.quantization.numerics.percentile import DEFAULT_PERCENTILE
from lightning_qat.quantization.planning.fusion import FusionGroup, FusionMiss
from lightning_qat.quantization.tracing.op_graph import Op, primitives

PointRole = Literal["output", "weight", "input"]
ScaleRole = Literal["weight", "activation"]
OpStatus = Literal["quantized", "fused", "passes", "float", "constant"]
PLAN_VERSION = 1


@dataclass(frozen=True)
class PointPlan:
    """One quantization point.

    Args:
        name: ``<op>.output``, ``<op>.weight`` or ``<op>.inputN``.
        op: the op it belongs to.
        role: ``output``, ``weight`` or ``input``: the tensor of the op that it quantizes.
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
        same_as: for a weight that is used twice, the point whose quantizer it shares.
        batch_norm: name of the batch norm op that is folded into the weight before quantization, as it is when
            deployed. Set where a fused batch norm multiplies channels that share a scale by different factors.
            Statistics and sensitivities of the point are those of the folded weight.
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
    percentile: float = DEFAULT_PERCENTILE
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

    @property
    def scale_role(self) -> ScaleRole:
        """``weight``, or ``activation`` for inputs and outputs: which of the two configurations applies."""
        return "weight" if self.is_weight else "activation"


@dataclass(frozen=True)
class OpPlan:
    """The decision about one op, with its reason."""

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
        return {"version": PLAN_VERSION, **primitives(self)}

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
            qconfig=_qconfig(data["qconfig"]),
            overrides=tuple(map(_override, data["overrides"])),
            profile=data["profile"],
        )

    def to_json(self, indent: int | None = 2) -> str:
        """Return the plan as JSON."""
        return json.dumps(self.to_dict(), indent=indent)


def _qconfig(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Add the percentile of weights to plans from before it existed: weights took that of activations."""
    activation, weight = stored["activation"], stored["weight"]
    used = activation["percentile"] if weight["observer"] == "percentile" else DEFAULT_PERCENTILE
    return {**stored, "weight": {"percentile": used, **weight}}


def _override(stored: Mapping[str, Any]) -> dict[str, Any]:
    weight = stored.get("weight")
    return {**stored, "weight": None if weight is None else {"percentile": None, **weight}}


def _point(item: Mapping[str, Any]) -> PointPlan:
    sizes = item.get("split_sizes")
    return PointPlan(**{**item, "split_sizes": None if sizes is None else tuple(sizes)})
