"""Choose types that the hardware supports: planning asks this module when it works under a profile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.numerics.dtypes import quant_dtype
from lightning_qat.quantization.planning.data_movement import types_of_movement
from lightning_qat.quantization.planning.fusion import FusionGroup
from lightning_qat.quantization.planning.hardware_profile import (
    FLOAT,
    HardwareProfile,
    OpRule,
    Signature,
    either,
    nearest_dtype,
    union,
)
from lightning_qat.quantization.planning.plan import PointPlan, PointRole
from lightning_qat.quantization.planning.point_config import PointConfig, PointConfigs
from lightning_qat.quantization.tracing.op_graph import Op, OpGraph


class RunsInFloat(Exception):
    """Raised where an op can only run in float; the message is the reason."""


@dataclass(frozen=True)
class InputDemand:
    """An input of an op from outside its fused group.

    Args:
        point: name of the input point it has or could have.
        origins: points that quantize it at its producers; empty if it needs a point of its own.
    """

    point: str
    origins: tuple[PointPlan, ...]


class ProfileChoices:
    """Picks types under a profile. A default gives way to the nearest type that the hardware supports. An override
    that asks for another type is an error, and an op that the hardware cannot compute runs in float.

    Args:
        profile: what the hardware can do.
        graph: the traced ops.
        configs: the configuration that the user wrote.
        groups: the fused group of each op that is in one.
    """

    def __init__(
        self, profile: HardwareProfile, graph: OpGraph, configs: PointConfigs, groups: Mapping[str, FusionGroup]
    ) -> None:
        self.profile = profile
        self.graph = graph
        self.configs = configs
        self.groups = groups
        self.floats: dict[str, str] = {}
        self._signatures: dict[str, tuple[Signature, ...]] = {}
        for op in graph.ops:
            computes = op.role in ("quantize", "join") and op.data_dependent
            if computes and self.head(op) is op and op.kind not in profile.rules:
                self.run_in_float(op, profile.why_unsupported(op.kind))

    def run_in_float(self, op: Op, reason: str) -> None:
        """Let an op and its fused group run in float, off the hardware."""
        group = self.groups.get(op.name)
        for name in group.ops if group else (op.name,):
            self.floats[name] = reason

    def head(self, op: Op) -> Op:
        """Return the op whose rule holds for the group: the first one."""
        group = self.groups.get(op.name)
        return self.graph.by_name[group.ops[0]] if group else op

    def rule(self, op: Op) -> OpRule:
        """Return the rule for an op's own inputs. A fused op without a rule has the rule of its group."""
        return self.profile.rules.get(op.kind) or self.profile.rules[self.head(op).kind]

    # -- outputs

    def has_float_output(self, op: Op) -> bool:
        """Whether the result can leave in float32."""
        return any(FLOAT in s.output for s in self._candidates(self.head(op)))

    def settle_output(self, op: Op, point: str) -> tuple[PointConfig, str]:
        """Return the configuration of an output point and, if the profile changed it, why.

        Raises:
            ConfigurationError: an override asks for something that the hardware does not support.
            RunsInFloat: the user asks for float32, and the op has no float32 result.
        """
        head = self.head(op)
        candidates = self._candidates(head)
        options = union(s.output for s in candidates)
        what = f"{head.kind} output only {either(options)}"
        for kind, moves in types_of_movement(self.profile, self.graph, op).items():
            if not moves >= {o for o in options if o != FLOAT}:
                options = tuple(o for o in options if o == FLOAT or o in moves)
                what = f"{kind}, which its result goes through, has only {either(sorted(moves))}"
        config, why = self._settle(_Question(op, point, "output", options, what))
        self.note_output(op, config.dtype)
        return config, why

    def note_output(self, op: Op, dtype: str | None) -> None:
        """Remember the type of a result, because it limits the types of the inputs; None stands for any type."""
        head = self.head(op)
        self._signatures[head.name] = tuple(s for s in self._candidates(head) if dtype is None or dtype in s.output)

    def _candidates(self, head: Op) -> tuple[Signature, ...]:
        """The signatures that have the weight type that an override gives, if one does."""
        signatures = self.profile.rules[head.kind].signatures
        point = f"{head.name}.weight"
        if self.configs.explicit_rule("dtype", point, head.kind, "weight") is None:
            return signatures
        wanted = self.configs.resolve(point, head.kind, "weight").dtype
        return tuple(s for s in signatures if wanted in s.weight) or signatures

    # -- operands

    def signature(self, op: Op, inputs: Sequence[InputDemand], weight: str | None) -> Signature:
        """Return the combination of types that needs the smallest changes of the configuration.

        Args:
            op: a quantized op.
            inputs: its inputs from outside the group.
            weight: name of its weight point, if it has a weight.
        """
        head = self.head(op)
        candidates = self._signatures[head.name] if op is head else self.rule(op).signatures

        def cost(signature: Signature) -> int:
            changes = sum(self._input_cost(op, demand, signature) for demand in inputs)
            return changes + (self._cost(op, weight, "weight", signature.weight) if weight is not None else 0)

        return min(candidates, key=cost)

    def accepts(self, op: Op, signature: Signature, origins: Iterable[PointPlan]) -> bool:
        """Whether the op can read an input that these points quantize, without another quantizer."""
        schemes = self.rule(op).schemes
        return FLOAT in signature.input or all(p.dtype in signature.input and p.scheme in schemes for p in origins)

    def settle_input(
        self, op: Op, point: str, signature: Signature, requantizes: bool = False
    ) -> tuple[PointConfig, str]:
        """Return the configuration of an input point and, if the profile changed it, why.

        Args:
            op: the reader.
            point: name of the point.
            signature: the combination that was picked.
            requantizes: the producer quantizes the input already. A general rule that covers the point, such as
                ``*``, was then not meant for it.

        Raises:
            ConfigurationError, RunsInFloat: as for outputs.
        """
        what = f"{op.kind} input only {either(signature.input)}"
        return self._settle(_Question(op, point, "input", signature.input, what, requantizes))

    def settle_weight(self, op: Op, point: str, signature: Signature, has_axis: bool) -> tuple[PointConfig, str]:
        """Return the configuration of a weight point and, if the profile changed it, why.

        Args:
            op: the op that uses the weight.
            point: name of the point.
            signature: the combination that was picked.
            has_axis: the weight has a channel axis.

        Raises:
            ConfigurationError, RunsInFloat: as for outputs.
        """
        what = f"{op.kind} weight only {either(signature.weight) or FLOAT}"
        if not has_axis and "per_tensor" not in self.rule(op).weight_granularity:
            raise RunsInFloat(f"profile {self.profile.name}: {what} per channel, and this one has no channel axis")
        return self._settle(_Question(op, point, "weight", signature.weight, what))

    def _input_cost(self, op: Op, demand: InputDemand, signature: Signature) -> int:
        if demand.origins:
            return 0 if self.accepts(op, signature, demand.origins) else 1
        return self._cost(op, demand.point, "input", signature.input)

    def _cost(self, op: Op, point: str, role: PointRole, options: tuple[str, ...]) -> int:
        """How much has to change: nothing, the width, the sign, something that the user has fixed."""
        wanted = self.configs.resolve(point, op.kind, role).dtype
        if wanted in options:
            return 0
        if wanted == FLOAT or not options or self.configs.explicit_rule("dtype", point, op.kind, role):
            return 1000
        return 10 if _loses_sign(wanted, nearest_dtype(wanted, options)) else 1

    # -- one point

    def _settle(self, question: _Question) -> tuple[PointConfig, str]:
        op, point, role = question.op, question.point, question.role
        config = self.configs.resolve(point, op.kind, role)
        required: dict[str, Any] = {}
        reasons: list[str] = []
        dtype = self._dtype(question, config)
        if dtype != config.dtype:
            required["dtype"] = dtype
            reasons.append(f"profile {self.profile.name}: {question.what}")
        if _loses_sign(config.dtype, dtype) and role != "weight" and "affine" in self._style(op, role)[1]:
            required["scheme"] = "affine"  # else all negative values would become zero
        elif dtype != FLOAT:
            given = config.scheme if role != "weight" else "per_channel" if config.per_channel else "per_tensor"
            field, allowed = self._style(op, role)
            if given not in allowed:
                rule = self.configs.explicit_rule(field, point, op.kind, role)
                what = f"{op.kind} {role} only {either(allowed)}"
                if rule is not None and not question.requantizes:
                    raise self._refusal(question, f"{rule} asks for {given}", what, f"{field}: {allowed[0]}")
                required[field] = allowed[0]
                reasons.append(f"profile {self.profile.name}: {what}")
        if required:
            config = self.configs.resolve(point, op.kind, role, required)
        return config, "; ".join(reasons)

    def _style(self, op: Op, role: PointRole) -> tuple[str, tuple[str, ...]]:
        if role == "weight":
            return "granularity", self.rule(op).weight_granularity
        return "scheme", self.rule(op if role == "input" else self.head(op)).schemes

    def _dtype(self, question: _Question, config: PointConfig) -> str:
        wanted, options, point = config.dtype, question.options, question.point
        if wanted in options:
            return wanted
        if question.role == "weight" and wanted != FLOAT:
            # weights are symmetric: an unsigned type would lose half of them
            options = tuple(o for o in options if not _loses_sign(wanted, o))
        if wanted == FLOAT or not options:
            by = f"{point.rpartition('.')[2]} is float32 by {config.rule}, and " if wanted == FLOAT else ""
            raise RunsInFloat(f"{by}profile {self.profile.name}: {question.what}: runs in float")
        nearest = nearest_dtype(wanted, options)
        rule = self.configs.explicit_rule("dtype", point, question.op.kind, question.role)
        exact = any(o.names_exactly(point) for o in self.configs.overrides)
        if rule is not None and (exact or not question.requantizes):
            raise self._refusal(question, f"{rule} asks for {wanted}", question.what, f"dtype: {nearest}")
        return nearest

    def _refusal(self, question: _Question, asked: str, what: str, instead: str) -> ConfigurationError:
        kind = "weight" if question.role == "weight" else "activation"
        return ConfigurationError(
            f"{asked} at {question.point}, which the hardware does not support: profile {self.profile.name}: {what}. "
            "Change the rule, or add one for this point after it: "
            f"{{match: {question.point!r}, {kind}: {{{instead}}}}}."
        )


@dataclass(frozen=True)
class _Question:
    """A point whose configuration has to be settled.

    Args:
        op: the op it belongs to.
        point: its name.
        role: ``output``, ``weight`` or ``input``.
        options: the types that the hardware supports there.
        what: the same as a text.
        requantizes: see :meth:`ProfileChoices.settle_input`.
    """

    op: Op
    point: str
    role: PointRole
    options: tuple[str, ...]
    what: str
    requantizes: bool = False


def _loses_sign(wanted: str, instead: str) -> bool:
    if FLOAT in (wanted, instead):
        return False
    return quant_dtype(wanted).signed and not quant_dtype(instead).signed
