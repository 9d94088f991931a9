"""The plan that ``make_plan`` returns: which points and ops are quantized how, and why. Plain frozen data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from lightning_qat.quantization.config_values import Scheme
from lightning_qat.quantization.numerics.dtypes import QuantizedDtypeName
from lightning_qat.quantization.numerics.observers import ObserverName
from lightning_qat.quantization.numerics.percentile import DEFAULT_PERCENTILE, PERCENTILE
from lightning_qat.quantization.overrides import Override
from lightning_qat.quantization.planning.fusion import FusionGroup, FusionMiss
from lightning_qat.quantization.qconfig import QConfig
from lightning_qat.quantization.reading.checks import AT_LEAST_ONE, POSITIVE, one_of
from lightning_qat.quantization.reading.plain_values import must
from lightning_qat.quantization.reading.schema import read_as
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
        channels: how many there are: the size of that axis, see ``groups``.
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
        groups: of the weight of a transposed convolution with a scale per output channel: ``channels`` is ``groups``
            times the length of the axis. Scale ``g * length + j`` is that of column ``j`` of group ``g``, whose rows
            are the ``g``-th part of axis 0.
    """

    name: str
    op: str
    role: PointRole
    operand: int
    dtype: Annotated[str, one_of(QuantizedDtypeName)]
    scheme: Annotated[str, one_of(Scheme)] = "symmetric"
    axis: int | None = None
    channels: Annotated[int, AT_LEAST_ONE] | None = None
    observer: Annotated[str, one_of(ObserverName)] = "mse"
    percentile: Annotated[float, PERCENTILE] = DEFAULT_PERCENTILE
    fixed_scale: Annotated[float, POSITIVE] | None = None
    narrow_range: bool = False
    reason: str = ""
    same_as: str | None = None
    split_sizes: tuple[Annotated[int, AT_LEAST_ONE], ...] | None = None
    batch_norm: str | None = None
    groups: Annotated[int, AT_LEAST_ONE] = 1

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
        profile: ``name``, ``version`` and ``sha256`` of the hardware profile it was made under, and its ``bias`` if
            that is int32; None without one.
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
        """Rebuild a plan from :meth:`to_dict`.

        Raises:
            UnreadableValueError: a value does not fit.
            ConfigurationError: ``qconfig`` or ``overrides`` are none.
        """
        if not isinstance(data, Mapping):
            raise must("a mapping", data)
        plan = read_as(cls, {name: value for name, value in data.items() if name != "version"})
        plan = replace(plan, qconfig=_qconfig(plan.qconfig), overrides=tuple(map(_override, plan.overrides)))
        QConfig.of(plan.qconfig)
        if any(rule.sensitivity is not None for rule in Override.list_of(plan.overrides)):
            raise must("rules with match or op_type", "one that names a sensitivity table", ".overrides")
        return plan

    def to_json(self, indent: int | None = 2) -> str:
        """Return the plan as JSON."""
        return json.dumps(self.to_dict(), indent=indent)


def _qconfig(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Add the percentile of weights to plans from before it existed: weights took that of activations."""
    activation, weight = stored.get("activation"), stored.get("weight")
    if not isinstance(activation, dict) or not isinstance(weight, dict):
        raise must("a mapping of activation and weight", stored, ".qconfig")
    used = activation.get("percentile") if weight.get("observer") == "percentile" else DEFAULT_PERCENTILE
    return {**stored, "weight": {"percentile": used, **weight}}


def _override(stored: Mapping[str, Any]) -> dict[str, Any]:
    weight = stored.get("weight")
    return {**stored, "weight": {"percentile": None, **weight} if isinstance(weight, dict) else weight}
