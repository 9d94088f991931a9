"""What insertion and calibration cost, and how that grows with the number of ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lightning_qat.quantization.insertion import attach
from lightning_qat.quantization.plan import make_plan
from lightning_qat.quantization.tracing import trace
from tests.benchmarks.models import BATCH, Chain
from tests.benchmarks.timing import Timing, interleaved, once
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


def insertion(ops: int) -> InsertionRow:
    """Insert into a fresh chain and time every stage once, on one thread: its tensors are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _insertion(ops)
    finally:
        torch.set_num_threads(threads)


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
    with torch.no_grad():
        timings = interleaved({n: lambda m=m: m(x) for n, m in models.items()}, "float", rounds, 3)
    seconds = {name: once(lambda n=name: region.compute_scales(n)) for name in ("minmax", "percentile", "mse", "kl")}
    return CalibrationRow(len(region.fake_quants), timings["observe"], seconds)


def _insertion(ops: int) -> InsertionRow:
    model, x = Chain(ops).eval(), torch.randn(2, Chain.WIDTH)
    found: dict[str, object] = {}
    with torch.no_grad():
        model(x)
        float_forward = once(lambda: model(x))
        traced = once(lambda: found.update(graph=trace(model, [x])))
        graph = found["graph"]
        planned = once(lambda: found.update(plan=make_plan(graph)))
        attached = once(lambda: found.update(region=attach(model, graph, found["plan"])))
        region = found["region"]
        region.set_state("observe")
        model(x)  # a first pass fills the caches of the call tree
        observed = once(lambda: model(x))
        computed = once(lambda: region.compute_scales("minmax"))
        region.set_state("quantize")
        model(x)
        quantized = once(lambda: model(x))
    return InsertionRow(
        len(graph.ops),
        len(region.points),
        float_forward,
        traced,
        planned,
        attached,
        observed,
        computed,
        quantized,
    )
