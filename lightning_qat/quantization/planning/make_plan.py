"""From graph and configuration to the plan: ``make_plan(OpGraph, QConfig, overrides) -> QuantPlan``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_qat.quantization.modules.garbage_collection import rare_garbage_collection
from lightning_qat.quantization.overrides import Override
from lightning_qat.quantization.planning.deployed_part import DeployedPart, deployed_part
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile
from lightning_qat.quantization.planning.plan import OpPlan, QuantPlan
from lightning_qat.quantization.planning.planner import Planner
from lightning_qat.quantization.planning.sensitivity_rules import plain_rules
from lightning_qat.quantization.planning.target_paths import local_rules
from lightning_qat.quantization.qconfig import QConfig
from lightning_qat.quantization.tracing.op_graph import Op, OpGraph


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
        overrides: rules from general to specific; the last one that matches wins, field by field. Sensitivity tables
            that they name are read now.
        profile: the hardware the plan is for: a shipped profile's name, the path of a YAML file, or a profile. Where
            the defaults ask for a type that it does not support, the nearest type is taken. Ops that it does not
            compute stay float.

    Raises:
        ConfigurationError: a name is unknown, a rule matches nothing, or a rule asks for something that the hardware
            does not support.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.tracing.tracer import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> plan = make_plan(trace(net, [torch.ones(1, 4)]))
        >>> [point.name for point in plan.points]
        ['0.input0', '0.weight', '1.output', '2.weight']
    """
    return make_plans({"": graph}, qconfig, overrides, profile)[""]


@rare_garbage_collection()
def make_plans(
    graphs: Mapping[str, OpGraph],
    qconfig: QConfig | Mapping[str, Any] | None = None,
    overrides: Iterable[Override | Mapping[str, Any]] = (),
    profile: HardwareProfile | str | Path | None = None,
) -> dict[str, QuantPlan]:
    """Plan several targets with one configuration; a rule has to match in at least one of them.

    A rule's pattern may begin with the path of a target (``backbone.layers.0.*``): it then applies to that target
    alone.

    Args:
        graphs: the traced ops of each target, by its path.
        qconfig: as for :func:`make_plan`.
        overrides: as for :func:`make_plan`.
        profile: as for :func:`make_plan`.

    Raises:
        ConfigurationError: a name is unknown, a rule matches nothing in any target, or a rule asks for something that
            the hardware does not support; or a sensitivity table is damaged or of another model.
    """
    defaults, hardware = QConfig.of(qconfig), hardware_profile(profile)
    rules, _ = plain_rules(Override.list_of(overrides), graphs)
    parts = {path: deployed_part(graph) for path, graph in graphs.items()}
    local = local_rules(rules, graphs)
    planners = {path: Planner(part.graph, defaults, local[path], hardware) for path, part in parts.items()}
    written = tuple(rule.to_dict() for rule in rules)
    plans = {path: _completed(planner.plan(written), graphs[path], parts[path]) for path, planner in planners.items()}
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
