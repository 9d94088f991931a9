"""Data that the checks of a region share: its graph and plan, the types in effect, and the training options."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from lightning_qat.analysis.model_check.finding import Finding
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.quantization.overrides import Override
from lightning_qat.quantization.planning.deployed_part import deployed_part
from lightning_qat.quantization.planning.fusion import FusionGroup
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.hardware_profile_files import planned_profile
from lightning_qat.quantization.planning.target_paths import local_rules
from lightning_qat.quantization.region.effective_dtypes import FLOAT, EffectiveDtypes, effective_dtypes
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.tracing.op_graph import Op, Operand
from lightning_qat.quantization.tracing.tensor_origins import TensorOrigins


@dataclass(frozen=True)
class CheckOptions:
    """The options of a check that are not about one region; see
    :func:`~lightning_qat.analysis.model_check.model_check.check`."""

    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    precision: str = "32-true"
    batch_size: int | None = None
    profile: HardwareProfile | None = None


class CheckedRegion:
    """A region and the look-ups that several checks need, each made once.

    Args:
        region: the region.
        options: the options of the check.
        rules: the overrides, made relative to this region.

    Attributes:
        graph: the ops that the device runs, without those that only serve training.
        whole_graph: all traced ops.
    """

    def __init__(self, region: Region, options: CheckOptions, rules: Sequence[Override] = ()) -> None:
        self.region = region
        self.options = options
        self.rules = tuple(rules)
        self.whole_graph = region.graph
        self.graph = deployed_part(region.graph).graph
        self.plan = region.plan
        self.points = region.points

    @cached_property
    def dtypes(self) -> EffectiveDtypes:
        """The types that are in effect now."""
        return effective_dtypes(self.region)

    @cached_property
    def groups(self) -> dict[str, FusionGroup]:
        """The fused group of each op that is in one."""
        return {name: group for group in self.plan.fusions for name in group.ops}

    @cached_property
    def is_calibrated(self) -> bool:
        """Whether the region has calibrated ranges."""
        return self.region.is_calibrated

    def head(self, op: Op) -> Op:
        """Return the first op of the group an op is fused into; else the op itself."""
        group = self.groups.get(op.name)
        return self.graph.by_name[group.ops[0]] if group else op

    def is_inside_group(self, op: Op) -> bool:
        """Whether the result of an op stays inside the group it is fused into."""
        return op.name in self.groups and self.groups[op.name].ops[-1] != op.name

    def group_type(self, op: Op) -> str:
        """Return the kinds of the group that ends with an op, such as ``conv2d+batch_norm+relu``."""
        group = self.groups.get(op.name)
        return "+".join(group.sequence) if group else op.kind

    @cached_property
    def profile(self) -> HardwareProfile | None:
        """The hardware: that of the options, or that of the plan if it can be found by its name."""
        return self.options.profile or planned_profile(self.plan)

    @cached_property
    def computing(self) -> tuple[Op, ...]:
        """The ops that compute or join floating-point data; of a fused group the last one."""
        return tuple(
            op
            for op in self.graph.ops
            if op.data_dependent
            and op.role in ("quantize", "join", "float")
            and op.has_float_output
            and not self.is_inside_group(op)
        )

    @cached_property
    def float_weights(self) -> dict[str, list[str]]:
        """Weights that are not quantized, as point names by op."""
        off = (p.name for p in self.plan.points if p.is_weight and self.dtypes.points[p.name] == FLOAT)
        found: dict[str, list[str]] = {}
        for name in (*self.plan.float_points, *off):
            if role_of(name) == "weight":
                found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def data(self, op: Op) -> tuple[tuple[Op, Operand], ...]:
        """Return the floating-point data that an op, or the group that ends with it, reads from outside.

        Returns:
            Each operand with the op of the group that reads it.
        """
        group = self.groups.get(op.name)
        inside = frozenset(group.ops if group else (op.name,))
        members = [self.graph.by_name[name] for name in (group.ops if group else (op.name,))]
        return tuple((m, operand) for m in members for operand in m.operands if self._is_data(m, operand, inside))

    def inputs(self, op: Op) -> tuple[tuple[Op, Operand], ...]:
        """Return the operands that have to be quantized: :meth:`data` without biases, masks and operands folded into
        the op."""
        return tuple((m, operand) for m, operand in self.data(op) if self._is_input(m, operand))

    def _is_data(self, op: Op, operand: Operand, inside: frozenset[str]) -> bool:
        if not operand.is_float or operand.role not in ("data", "weight"):
            return False
        point = self.dtypes.point_of(op, operand)
        if point is not None:
            return not self.plan.by_name[point].is_weight
        if op.role == "join" and operand.written:
            return False
        return not all(s.kind == "op" and s.name in inside for s in operand.sources)

    def _is_input(self, op: Op, operand: Operand) -> bool:
        if self.dtypes.point_of(op, operand) is not None:
            return True
        if self._origins.is_single_constant(operand) or (op.gemm and self._origins.is_constant(operand)):
            return False
        return not self.plan.float_points.get(f"{op.name}.input{operand.index}", "").startswith(_LEFT_OUT)

    @cached_property
    def _origins(self) -> TensorOrigins:
        return TensorOrigins(self.graph, ())


def rules_of(regions: Mapping[str, Region]) -> dict[str, list[Override]]:
    """Return the overrides that each region was planned with, made relative to it.

    Args:
        regions: all regions of the model, by the paths of their targets.
    """
    graphs = {path: region.graph for path, region in regions.items()}
    return {
        path: local_rules(Override.list_of(region.plan.overrides), graphs)[path] for path, region in regions.items()
    }


_LEFT_OUT = ("mask", "a single constant", "zeros are exact")

Check = Callable[[CheckedRegion], tuple[Iterable[Finding], Iterable[Section]]]
"""One check: its findings and its tables, without the region's path."""


def module_type(op: Op) -> str:
    """Return the readable type of an op: the class of its module if it is one, else its torch function."""
    return op.module_type if op.name == op.scope else op.kind


def role_of(point: str) -> Literal["activation", "weight"]:
    """Return which part of the configuration a point follows, by its name (float points have no plan).

    Example:
        >>> role_of("fc.weight"), role_of("fc.input0")
        ('weight', 'activation')
    """
    return "weight" if point.rpartition(".")[2].startswith("weight") else "activation"


def without_call_numbers(name: str) -> str:
    """Return the name that all calls of a module share.

    Example:
        >>> without_call_numbers("decoder.sine_embed@1.mul_0.output")
        'decoder.sine_embed.mul_0.output'
    """
    return re.sub(r"@\d+", "", name)
