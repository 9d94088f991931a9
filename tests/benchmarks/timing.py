"""Timing several things against each other: in turns, so that all of them meet the same load of the machine."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """How long one thing took, and how long relative to the reference.

    Attributes:
        seconds: median over the rounds.
        ratio: median over the rounds of its time by the reference's time in the same round.
        ratio_low: lower quartile of that.
        ratio_high: upper quartile of that.
        extra: median over the rounds of the difference to the reference, in seconds.
    """

    seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    extra: float


def once(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def cpu_once(function: Callable[[], object]) -> float:
    """Seconds of processor time of one call: for work on one thread, this does not depend on the load."""
    start = time.process_time()
    function()
    return time.process_time() - start


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread in the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    reference: str,
    rounds: int,
    repeats: int,
    clock: Callable[[Callable[[], object]], float] = once,
) -> dict[str, Timing]:
    """Time functions in turns: ABC, BCA, CAB, ... with one untimed call before each turn.

    Args:
        functions: what to time.
        reference: the name of the one that the ratios refer to.
        rounds: number of turns of each.
        repeats: timed calls per turn; their mean is the time of the turn.
        clock: how to time a function.
    """
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # otherwise the objects of all the others would be searched in each one's turn
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                function = functions[name]
                function()
                gc.collect()
                times[name].append(clock(lambda call=function: [call() for _ in range(repeats)]) / repeats)
    finally:
        gc.unfreeze()
    return {name: _timing(times[name], times[reference]) for name in names}


def _timing(own: list[float], reference: list[float]) -> Timing:
    ratios = [a / b for a, b in zip(own, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    extra = statistics.median(a - b for a, b in zip(own, reference, strict=True))
    return Timing(statistics.median(own), middle, low, high, extra)
