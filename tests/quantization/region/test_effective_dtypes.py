"""Which type each tensor has: against the values that come out of quantized models, and by hand."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.modules.tensor_leaves import is_float, leaves
from lightning_qat.quantization.region.effective_dtypes import effective_dtypes
from lightning_qat.quantization.region.insertion import insert
from tests.quantization.models import ZOO, calibrated


class Moves(nn.Module):
    """Returns what several kinds of data movement make of quantized and of float results."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        y, (h, c) = self.lstm(x)
        y, c = torch.broadcast_tensors(y, c)
        std, mean = torch.std_mean(x, 1)
        joined = torch.cat([y.flip(0), y]).unbind(1)
        return [*joined, *y.chunk(2, dim=2), y.amax(0), h.permute(0, 2, 1), c.flatten(), std[None], mean]


MODELS = {name: example.make for name, example in ZOO.items()} | {"moves": lambda: (Moves(), (torch.randn(3, 5, 4),))}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_on_the_grid_of_the_type_they_are_said_to_have(name: str) -> None:
    """Against the values: codes of a point behind an output if it is said to be quantized, else not."""
    torch.manual_seed(0)
    module, args = MODELS[name]()
    region = calibrated(module.eval(), *args, qconfig={"activation": {"observer": "minmax"}})
    dtypes = effective_dtypes(region)
    values = leaves(module(*args))
    assert len(values) == len(region.graph.outputs)
    for value, output in zip(values, region.graph.outputs, strict=True):
        if is_float(value):
            made = [f"{s.name}.output" for s in dtypes.origins(output.sources)]
            points = [region.points[point] for point in made if point in region.points]
            on_a_grid = any(_is_on_grid(value, point) for point in points)
            expected = points[0].dtype if on_a_grid else "float32"
            assert dtypes.of_tensor(output.sources) == expected, (output.path, made)


def _is_on_grid(value: Tensor, point: FakeQuantize) -> bool:
    codes = value.detach() / point.scale
    return torch.allclose(codes, codes.round(), atol=1e-3, rtol=0)


@pytest.mark.skipif(
    sys.version_info < (3, 11),
    reason="Python 3.10 compiles what stands behind `a if b else c` once for each branch: two places, so two ops",
)
def test_the_type_of_a_tensor_from_several_places_is_the_widest() -> None:
    class Either(nn.Module):
        def forward(self, x: Tensor, sine: bool) -> Tensor:
            return torch.relu((x.sin() if sine else x.cos()).flatten())

    overrides = [{"op_type": "sin", "activation": {"dtype": "int16"}}]
    region = insert(Either(), batches=[(torch.randn(2, 3), True), (torch.randn(2, 3), False)], overrides=overrides)
    dtypes, relu = effective_dtypes(region), region.graph.by_name["relu_0"]
    assert {s.name for s in dtypes.origins(relu.operands[0].sources)} == {"sin_0", "cos_0"}
    assert dtypes.of_operand(relu, relu.operands[0]) == "int16"


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
