"""What insertion and calibration cost, and how that grows with the number of ops: processor time on one thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_qat.quantization.planning.make_plan import make_plan
from lightning_qat.quantization.region.insertion import attach
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.tracing.tracer import trace
from tests.benchmarks.models import BATCH, Chain
from tests.benchmarks.timing import Timing, cpu_once, interleaved, one_thread
from tests.benchmarks.variants import ours_calibrated


@dataclass(frozen=True)
class InsertionRow:
    """Seconds by stage for a chain of ops. ``trace`` includes two forwards, one in eval and one in train mode."""

    ops: int
    points: int
    float_forward: float
    trace: float
    plan: float
    attach: float
    observe: float
    compute_scales: float
    quantized_forward: float

    @property
    def insertion(self) -> float:
        """Trace, plan and attach."""
        return self.trace + self.plan + self.attach


@dataclass(frozen=True)
class CalibrationRow:
    """A calibration pass and what follows it.

    Attributes:
        timing: a forward in state ``observe`` against a float one, both in eval mode without gradients.
        seconds_by_observer: ``compute_scales`` once for all points.
    """

    points: int
    timing: Timing
    seconds_by_observer: dict[str, float]


def insertion(ops: int, repeats: int = 3) -> InsertionRow:
    """Insert into a fresh chain several times and return the fastest."""
    with one_thread(), torch.no_grad():  # the tensors are too small for more threads
        return min((_insertion(ops) for _ in range(repeats)), key=lambda row: row.insertion)


def calibration(float_model: nn.Module, quantized_model: nn.Module, rounds: int) -> CalibrationRow:
    """Time a calibration pass over one batch, and the derivation of the scales.

    Args:
        float_model: the reference.
        quantized_model: a copy, into which fake-quant is inserted.
        rounds: number of turns of each.
    """
    x = torch.randn(BATCH)
    region = ours_calibrated(quantized_model, x)
    region.set_state("observe")
    models = {"float": float_model.eval(), "observe": quantized_model.eval()}
    observers = ("minmax", "percentile", "mse", "kl")
    with one_thread(), torch.no_grad():
        timings = interleaved({n: lambda m=m: m(x) for n, m in models.items()}, "float", rounds, 3, cpu_once)
        seconds = {name: cpu_once(lambda n=name: region.compute_scales(n)) for name in observers}
    return CalibrationRow(len(region.fake_quants), timings["observe"], seconds)


def _insertion(ops: int) -> InsertionRow:
    model, x = Chain(ops).eval(), torch.randn(2, Chain.WIDTH)
    found: dict[str, Any] = {}
    model(x)
    seconds = {"float_forward": cpu_once(lambda: model(x))}
    seconds["trace"] = cpu_once(lambda: found.update(graph=trace(model, [x])))
    seconds["plan"] = cpu_once(lambda: found.update(plan=make_plan(found["graph"])))
    seconds["attach"] = cpu_once(lambda: found.update(region=attach(model, found["graph"], found["plan"])))
    region: Region = found["region"]
    region.set_state("observe")
    model(x)  # a first pass fills the caches of the call tree
    seconds["observe"] = cpu_once(lambda: model(x))
    seconds["compute_scales"] = cpu_once(lambda: region.compute_scales("minmax"))
    region.set_state("quantize")
    model(x)
    seconds["quantized_forward"] = cpu_once(lambda: model(x))
    return InsertionRow(len(region.graph.ops), len(region.points), **seconds)
