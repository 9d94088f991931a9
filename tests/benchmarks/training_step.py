"""One training step of every variant: forward, loss, backward, SGD step."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.models import BATCH, CLASSES
from tests.benchmarks.timing import Timing, interleaved, once
from tests.benchmarks.variants import FLOAT, Prepared, Variant

PREPARATION_LIMIT = 300
"""Seconds after which preparing a variant counts as failed: compiling takes some, Brevitas may search for very long."""


@dataclass(frozen=True)
class Row:
    """A variant's result.

    Attributes:
        variant: which one.
        quantizers: how many it has.
        timing: None if it could not be measured.
        reason: why not.
    """

    variant: Variant
    quantizers: int
    timing: Timing | None
    reason: str = ""

    @property
    def us_per_quantizer(self) -> float | None:
        """Microseconds that the step takes longer than the float one, by the number of quantizers."""
        if self.timing is None or not self.quantizers:
            return None
        return self.timing.extra / self.quantizers * 1e6


def compare(
    model: nn.Module,
    variants: Sequence[Variant],
    rounds: int,
    repeats: int,
    clock: Callable[[Callable[[], object]], float] = once,
) -> list[Row]:
    """Measure all variants that can be prepared, in one run and in turns.

    Args:
        model: float model; it is trained for a few steps first, so that its BatchNorm statistics fit its data.
        variants: the float model must be among them.
        rounds: turns of each variant.
        repeats: steps per turn.
        clock: how to time a step.
    """
    x, y = torch.randn(BATCH), torch.randint(0, CLASSES, BATCH[:1])
    warm_up = training_step(model.train(), x, y)
    for _ in range(20):
        warm_up()
    prepared: dict[str, Prepared] = {}
    failed: dict[str, str] = {}
    steps: dict[str, Callable[[], object]] = {}
    for variant in variants:
        print(f"preparing {variant.name}", flush=True)
        try:
            with time_limit(PREPARATION_LIMIT):
                prepared[variant.name] = variant.prepare(copy.deepcopy(model), x)
                steps[variant.name] = training_step(prepared[variant.name].model, x, y)
                for _ in range(3):
                    steps[variant.name]()
        except Exception as error:  # somebody else's package may raise anything
            failed[variant.name] = _reason(variant, error)
            steps.pop(variant.name, None)
    timings = interleaved(steps, FLOAT.name, rounds, repeats, clock)
    return [
        Row(v, prepared[v.name].quantizers, timings[v.name]) if v.name in steps else Row(v, 0, None, failed[v.name])
        for v in variants
    ]


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """Return a function that does one step, always on the same batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block after some seconds (main thread, Unix)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not ready after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _reason(variant: Variant, error: Exception) -> str:
    if isinstance(error, ImportError) and variant.install:
        return f"not installed ({error}): `pip install {variant.install}`"
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"fails: {type(error).__name__}: {first_line}"
