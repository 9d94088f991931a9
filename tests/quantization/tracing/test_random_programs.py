"""Random small programs against a hand-written interpreter that applies fake-quant at the planned points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize, fake_quantize
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.quantization.models import MINMAX

KINDS = ("linear", "add", "mul", "relu", "tanh", "scale", "view")
WIDTH = 4


@dataclass(frozen=True)
class Step:
    """One line of a program: ``values.append(kind(values[a], values[b]))``, only in some forwards if ``branch``."""

    kind: str
    a: int
    b: int
    branch: bool


@st.composite
def programs(draw: st.DrawFn) -> list[Step]:
    steps = []
    for known in range(1, draw(st.integers(2, 9))):
        index = st.integers(0, known - 1)
        steps.append(Step(draw(st.sampled_from(KINDS)), draw(index), draw(index), draw(st.booleans())))
    return steps


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return layer(x)


def compute(step: Step, a: Tensor, b: Tensor, layer: nn.Linear) -> Tensor:
    # each op has its own line of code, and the loop below gives each step its own round
    if step.kind == "linear":
        return linear(a, layer)
    if step.kind == "add":
        return a + b
    if step.kind == "mul":
        return a * b
    if step.kind == "relu":
        return F.relu(a)
    if step.kind == "tanh":
        return torch.tanh(a)
    if step.kind == "scale":
        return a * 0.5
    return a.flip(0)


class Program(nn.Module):
    """Runs the steps; a step in a branch that is not taken hands its first operand on."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in steps])
        self.runs = nn.ModuleList([Run(step, layer) for step, layer in zip(steps, self.layers, strict=True)])

    def forward(self, x: Tensor, taken: bool) -> Tensor:
        values = [x]
        for step, run in zip(self.steps, self.runs, strict=True):
            a, b = values[step.a], values[step.b]
            values.append(run(a, b) if taken or not step.branch else a)
        return torch.stack(values).sum(0)


class Run(nn.Module):
    def __init__(self, step: Step, layer: nn.Linear) -> None:
        super().__init__()
        self.step = step
        self.layer = layer

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return compute(self.step, a, b, self.layer)


def apply(region: Region, point: str, value: Tensor) -> Tensor:
    fake_quant = region.points.get(point)
    if fake_quant is None or fake_quant.scale_source is None:
        return value
    return quantized(fake_quant, value)


def quantized(f: FakeQuantize, value: Tensor) -> Tensor:
    return fake_quantize(value, f.scale, 0, f.quant_min, f.quant_max, f.axis)


def interpret(program: Program, region: Region, x: Tensor, taken: bool) -> Tensor:
    """What the plan means, written down without any interception: points by op name, op names by step."""
    values = [x]
    for k, step in enumerate(program.steps):
        a, b = values[step.a], values[step.b]
        if step.branch and not taken:
            values.append(a)
            continue
        if step.kind == "view":
            values.append(a.flip(0))
            continue
        name = _name(region, k, step)
        a = apply(region, f"{name}.input0", a)
        b = apply(region, f"{name}.input1", b)
        if step.kind == "linear":
            layer = program.layers[k]
            out = F.linear(a, apply(region, f"{name}.weight", layer.weight), layer.bias)  # type: ignore[arg-type]
        elif step.kind in ("add", "mul"):
            out = a + b if step.kind == "add" else a * b
        else:
            out = {"relu": torch.relu, "tanh": torch.tanh, "scale": lambda t: t * 0.5}[step.kind](a)
        values.append(apply(region, f"{name}.output", out))
    stacked = apply(region, "stack_0.output", torch.stack(values))
    return apply(region, "sum_0.output", apply(region, "sum_0.input0", stacked).sum(0))


def _name(region: Region, k: int, step: Step) -> str:
    (op,) = [op for op in region.graph.ops if op.scope == f"runs.{k}" or op.scope == f"layers.{k}"]
    return op.name


def build(steps: list[Step]) -> tuple[Program, Region, Tensor]:
    torch.manual_seed(len(steps))
    program, x = Program(steps).eval(), torch.randn(3, WIDTH)
    region = insert(program, batches=[(x, True), (x, False)], qconfig=MINMAX)
    calibrate(region, [Call((x, True)), Call((x, False))])
    return program, region, x


SETTINGS: Any = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@given(steps=programs())
@SETTINGS
def test_quantized_program_equals_the_hand_written_reference(steps: list[Step]) -> None:
    program, region, x = build(steps)
    with torch.no_grad():
        for taken in (True, False, True):
            for scale in (1.0, 1.7):
                assert torch.equal(program(x * scale, taken), interpret(program, region, x * scale, taken))
    assert region.unplanned == {}


@given(steps=programs())
@SETTINGS
def test_program_that_is_off_equals_float_with_gradients(steps: list[Step]) -> None:
    program, region, x = build(steps)
    torch.manual_seed(len(steps))
    reference = Program(steps).eval()
    region.set_state("off")
    for taken in (True, False):
        gradients = []
        for module in (program, reference):
            module.zero_grad(set_to_none=True)
            out = module(x, taken)
            if out.requires_grad:
                out.square().sum().backward()
            gradients.append([out.detach(), *(p.grad for p in module.parameters() if p.grad is not None)])
        assert len(gradients[0]) == len(gradients[1])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
