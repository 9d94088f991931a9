"""Which type each tensor has: against the planner's own way of following tensors, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_qat.quantization.deployed_part import deployed_part
from lightning_qat.quantization.effective_dtypes import EffectiveDtypes, effective_dtypes
from lightning_qat.quantization.insertion import insert
from lightning_qat.quantization.plan import make_plan
from lightning_qat.quantization.tensor_origins import TensorOrigins
from lightning_qat.quantization.tracing import Call, trace
from tests.quantization.models import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_origins_are_those_that_the_planner_finds(name: str) -> None:
    """The planner asks tensor by tensor; here it is one pass over all ops."""
    module, args = ZOO[name].make()
    graph = deployed_part(trace(module, [Call(args)])).graph
    plan = make_plan(graph)
    joins = {op.name for op in graph.ops if plan.status[op.name].reason == "all inputs share one scale"}
    planner, dtypes = TensorOrigins(graph, joins), EffectiveDtypes(graph, plan)
    for op in graph.ops:
        for operand in op.operands:
            expected = {(s.kind, s.name) for s in planner.of(operand.sources)}
            assert {(s.kind, s.name) for s in dtypes.origins(operand.sources)} == expected


def test_an_operand_without_a_point_has_the_type_of_its_producer() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 2))
    overrides = [{"match": "1.output", "activation": {"dtype": "int16"}}]
    region = insert(model, (torch.randn(2, 4),), overrides=overrides)
    dtypes, ops = effective_dtypes(region), region.graph.by_name
    assert [dtypes.of_operand(ops[name], ops[name].operands[0]) for name in ("0", "1", "4")] == [
        "int8",
        "int8",
        "int16",
    ]
    assert [dtypes.of_output(ops[name]) for name in ("0", "1", "4")] == ["int8", "int16", "float32"]


def test_a_point_that_is_switched_off_leaves_float() -> None:
    region = insert(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), (torch.randn(2, 4),))
    region.points["1.output"].enabled = False
    dtypes, last = effective_dtypes(region), region.graph.by_name["2"]
    assert dtypes.of_operand(last, last.operands[0]) == "float32"


def test_a_dtype_changed_after_planning_counts() -> None:
    region = insert(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), (torch.randn(2, 4),))
    region.points["1.output"].set_dtype("int4")
    dtypes, last = effective_dtypes(region), region.graph.by_name["2"]
    assert dtypes.of_operand(last, last.operands[0]) == "int4"
