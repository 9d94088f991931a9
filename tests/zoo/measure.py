"""What quantization does to one model of the zoo, in numbers."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_qat.analysis.metrics import sqnr
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.region import Region
from tests.zoo.models import Batch, ZooModel, inputs

CALIBRATION = (4, 8)
"""Batches, and samples in each."""
STEPS = 20
FLOOR = 50.0
"""dB at int16 below which the table has to name an op and the reason."""


@dataclass(frozen=True)
class Noise:
    """Signal to quantization noise of a calibrated model in dB: the worst of its main outputs.

    Args:
        calibrated: on the data it was calibrated with: what rounding does.
        unseen: on other data of the same kind, some of it outside the calibrated ranges: what clipping adds.
    """

    calibrated: float
    unseen: float


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    model: str
    parameters: int
    ops: int
    points: int
    float_ops: dict[str, int]
    noise: dict[str, Noise]
    limit: str
    seconds: float
    losses: tuple[float, float]


def measure(name: str, zoo_model: ZooModel) -> Row:
    """Measure everything about one model."""
    model = zoo_model.make()
    seconds = min(insertion_seconds(zoo_model, model) for _ in range(3))
    noise, limit = {}, ""
    for dtype in ("int8", "int16"):
        region = calibrated(zoo_model, model, dtype)
        noise[dtype] = measured_noise(zoo_model, model, region)
        if dtype == "int16" and noise[dtype].calibrated < FLOOR:
            limit = limiting_op(zoo_model, region)
        region.remove()
    losses = training_losses(zoo_model, zoo_model.make())
    region = zoo_model.insert(model)
    return Row(
        model=name,
        parameters=sum(p.numel() for n, p in model.named_parameters() if "_quantization" not in n),
        ops=len(region.graph.ops),
        points=len(region.plan.points),
        float_ops=dict(Counter(reason for reason in float_ops(region).values())),
        noise=noise,
        limit=limit,
        seconds=seconds,
        losses=(sum(losses[:5]) / 5, sum(losses[-5:]) / 5),
    )


def insertion_seconds(zoo_model: ZooModel, model: nn.Module) -> float:
    """Processor time to trace, plan and attach."""
    start = time.process_time()
    region = zoo_model.insert(model)
    seconds = time.process_time() - start
    region.remove()
    return seconds


def float_ops(region: Region) -> dict[str, str]:
    """The ops with a floating-point result that stay in float, each with the reason."""
    ops = region.graph.by_name
    return {op.name: op.reason for op in region.plan.ops if op.status == "float" and ops[op.name].has_float_output}


def calibrated(zoo_model: ZooModel, model: nn.Module, dtype: str) -> Region:
    """Insert and calibrate with the default observers."""
    region = zoo_model.insert(model, dtype)
    calibrate(region, [inputs(batch) for batch in zoo_model.batches(*CALIBRATION)])
    return region


def measured_noise(zoo_model: ZooModel, model: nn.Module, region: Region) -> Noise:
    """Compare the quantized with the float model, in eval mode."""
    seen = zoo_model.batches(*CALIBRATION)
    return Noise(
        *(worst_sqnr(zoo_model, model, region, batches) for batches in (seen, zoo_model.batches(2, 8, seed=1)))
    )


def worst_sqnr(zoo_model: ZooModel, model: nn.Module, region: Region, batches: list[Batch]) -> float:
    """SQNR of the quantized against the float model on some batches, in eval mode: the worst of the main outputs."""
    worst = float("inf")
    model.eval()
    for path in zoo_model.outputs:
        select = OutputSelector(path or None, None)
        found: dict[str, list[Tensor]] = {"off": [], "quantize": []}
        for state, tensors in found.items():
            with torch.no_grad(), region.state(state):  # type: ignore[arg-type]
                for batch in batches:
                    tensors.extend(t.flatten() for t in select(model(**inputs(batch))))
        worst = min(worst, float(sqnr(torch.cat(found["off"]), torch.cat(found["quantize"]))))
    return worst


def limiting_op(zoo_model: ZooModel, region: Region) -> str:
    """The point that alone costs the most at the first main output, with its own SQNR."""
    batches = [inputs(zoo_model.batches(1, 4)[0])]
    result = sensitivity(region, batches, zoo_model.outputs[0] or None, metric="SQNR", method="isolation")
    return f"{result.rows[0].point} ({result.rows[0].value:.0f} dB alone)"


def training_losses(zoo_model: ZooModel, model: nn.Module) -> list[float]:
    """The loss of each step of int8 training on one batch."""
    region = calibrated(zoo_model, model, "int8")
    region.set_state("quantize")
    model.train()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=zoo_model.lr)
    batch = zoo_model.batches(1, 8)[0]
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = zoo_model.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
