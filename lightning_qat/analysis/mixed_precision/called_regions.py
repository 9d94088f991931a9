"""The regions of a module, what batches call them with, and which of their outputs count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_qat.analysis.captured_calls import RepeatableForward, capture_calls
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.quantization import ranks
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.preservation import preserved
from lightning_qat.quantization.region.region import Region, find_regions

Step = Callable[[], Any]
"""Runs all regions on one batch, the same way each time."""


@dataclass(frozen=True)
class CalledRegions:
    """The regions of a model, and what batches call them with.

    Args:
        regions: by the path of their target.
        calls: what each target is called with.
        steps: functions that run the whole model on a batch, in evaluation mode; of a region of its own there are none.
    """

    regions: Mapping[str, Region]
    calls: Mapping[str, Sequence[Call]]
    steps: Sequence[Step]


@contextmanager
def called_regions(region: Region | nn.Module, batches: Iterable[object], seed: int) -> Iterator[CalledRegions]:
    """Find out what batches call regions with. A module evaluates inside the block, and is as before at its end.

    Args:
        region: a calibrated region; or a module that contains calibrated regions.
        batches: those of the region's target, or of the module's forward.
        seed: of the random numbers that the forward draws.

    Raises:
        ConfigurationError: the module has no regions.
    """
    calls = [Call.of(batch) for batch in batches]
    if isinstance(region, Region):
        yield CalledRegions({"": region}, {"": calls}, ())
        return
    regions = find_regions(region)
    if not regions:
        raise ConfigurationError(f"{type(region).__name__} has no fake-quants: insert and calibrate them first.")
    steps = [partial(_run, region, call, seed) for call in calls]
    with _evaluating(region, regions):
        found: dict[str, list[Call]] = {path: [] for path in regions}
        for step in steps:
            for path, of_step in capture_calls(regions, step).items():
                found[path] += of_step
        yield CalledRegions(regions, found, steps)


def regions_that_ran(calls: Mapping[str, Sequence[Call]], final: str | None, across_ranks: bool = False) -> list[str]:
    """Return the regions that were called, on any rank.

    Args:
        calls: what each region was called with.
        final: the region whose output alone counts, if one was named.
        across_ranks: every rank has calls of its own.

    Raises:
        ConfigurationError: others were called, but not the final one.
    """
    called = {path for path, found in calls.items() if found}
    if across_ranks:
        called = set().union(*ranks.gathered_objects(called))
    ran = [path for path in calls if path in called]
    if final is not None and ran and final not in ran:
        raise ConfigurationError(f"output: {final!r} did not run on these batches; {', '.join(ran)} did.")
    return ran


def selectors_of(
    paths: list[str], output: str | Callable[[Any], Any] | None, post_process: Callable[[Any], Any] | None
) -> tuple[dict[str, OutputSelector], str | None]:
    """Return what is looked at of each region, and the region whose output alone counts, if one was named.

    Args:
        paths: of all regions.
        output: path into the output of a region, which begins with the region's path if there are several; or a
            callable on it, if there is one; None: all tensors of all outputs.
        post_process: applied to the chosen outputs.

    Raises:
        ConfigurationError: there are several regions, and the output names none of them.
    """
    if len(paths) == 1:
        return {paths[0]: OutputSelector(output, post_process)}, None
    selectors = {path: OutputSelector(None, post_process) for path in paths}
    if output is None:
        return selectors, None
    named = [p for p in paths if isinstance(output, str) and f"{output}.".startswith(f"{p}." if p else "")]
    if not isinstance(output, str) or not named:
        raise ConfigurationError(
            f"output {output!r}: there are several quantized parts ({', '.join(paths)}), so write the path of one of "
            f"them first, such as {paths[-1]}."
        )
    final = max(named, key=len)
    selectors[final] = OutputSelector(output[len(final) :].lstrip(".") or None, post_process)
    return selectors, final


@contextmanager
def _evaluating(module: nn.Module, regions: Mapping[str, Region]) -> Iterator[None]:
    """Evaluate in the block: no gradients, and regions get what the float ones before them give. Exit restores all."""
    with ExitStack() as stack:
        stack.enter_context(preserved(module))
        for region in regions.values():
            stack.enter_context(region.state("off"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        module.eval()
        yield


def _run(module: nn.Module, call: Call, seed: int) -> None:
    with RepeatableForward(module, call, seed) as forward:
        forward()
