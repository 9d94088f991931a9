"""Fake-quant for any module, without a Trainer: trace, plan, attach, calibrate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.garbage_collection import rare_garbage_collection
from lightning_qat.quantization.overrides import Override
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.make_plan import make_plan
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.qconfig import QConfig
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.region.regions import check_target
from lightning_qat.quantization.tracing.op_graph import OpGraph
from lightning_qat.quantization.tracing.tracer import trace


def insert(
    module: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    qconfig: QConfig | Mapping[str, Any] | None = None,
    overrides: Iterable[Override | Mapping[str, Any]] = (),
    profile: HardwareProfile | str | Path | None = None,
    batches: Iterable[Any] | None = None,
    train_mode: bool = True,
) -> Region:
    """Insert fake-quant into a module, in place. It stays float until calibrated.

    Several parts of a model may be regions of their own, as long as none contains another: ``insert(model.backbone,
    ...)`` and ``insert(model.head, ...)``. What lies between them stays float.

    Args:
        module: any module; its forward becomes the quantized region.
        example_args: positional arguments of one forward.
        example_kwargs: keyword arguments of one forward.
        qconfig: defaults, or their dictionary; int8 if not given.
        overrides: rules for single points, from general to specific. ``region.plan.overrides`` says which points a rule
            with ``sensitivity`` and ``top`` took from its table.
        profile: the hardware the plan is for, such as ``generic_int8_int16`` or the path of a YAML file.
        batches: more example batches, for forwards whose ops depend on the data.
        train_mode: also trace in train mode, as far as the module runs on the example there. Write False for a module
            that cannot (batch norm on a batch of one, targets that are missing) to trace in eval mode only.

    Returns:
        The region: ``region.graph``, ``region.plan``, ``region.points``; ``region.remove()`` gives the float module
        back.

    Raises:
        TracingError: the module does not run on the example.
        ConfigurationError: the configuration cannot work.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> region = insert(model, (torch.randn(16, 4),), qconfig={"activation": {"dtype": "int16"}})
        >>> sorted(region.points)
        ['0.input0', '0.weight', '1.output', '2.weight']
    """
    check_target(module)
    calls = [Call.of(batch) for batch in batches or ()]
    if example_args or example_kwargs or not calls:
        calls.insert(0, Call(tuple(example_args), dict(example_kwargs or {})))
    graph = trace(module, calls, train_mode)
    return attach(module, graph, make_plan(graph, qconfig, overrides, profile))


@rare_garbage_collection()
def attach(module: nn.Module, graph: OpGraph, plan: QuantPlan, traced: bool = True) -> Region:
    """Put a plan into effect on a module.

    Args:
        module: the target.
        graph: the traced ops.
        plan: the plan for them.
        traced: False if both come from a checkpoint and not from the code of this process.

    Raises:
        ConfigurationError: the module is quantized already, or its forward cannot be taken over.
    """
    check_target(module)
    return Region(module, graph, plan, traced).attach()
