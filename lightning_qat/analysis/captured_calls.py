"""Capture the forwards of a region's target from a user's step, and run one forward repeatably.

An analysis compares forwards that differ in one thing. Everything else (inputs, random numbers, buffers) must be the
same each time, and nothing may be left changed at the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.module_walk import modules_outside_regions
from lightning_qat.quantization.modules.preservation import TensorContents, preserved, replaced_attribute
from lightning_qat.quantization.modules.tensor_leaves import leaves, map_call_leaves
from lightning_qat.quantization.region.region import Region


def capture_calls(regions: Mapping[str, Region], run: Callable[[], Any]) -> dict[str, list[Call]]:
    """Record the arguments of every forward of some regions' targets that happens while ``run`` runs.

    Recursive entries are part of the outer forward and not recorded. The tensors are the originals; if ``run`` writes
    into them, their contents are put back at its end, also if it fails.

    Args:
        regions: the regions whose targets are watched, by any name.
        run: a function that calls the targets, such as a validation step.

    Returns:
        For each region one Call per forward, in order; empty if its target was not called.

    Example:
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> region = insert(model, (torch.ones(1, 2),))
        >>> capture_calls({"": region}, lambda: model(torch.zeros(1, 2)))[""][0].args
        (tensor([[0., 0.]]),)
    """
    calls: dict[str, list[Call]] = {name: [] for name in regions}
    watch_calls(regions, run, lambda name, call, _: calls[name].append(call))
    return calls


def watch_calls(regions: Mapping[str, Region], run: Callable[[], Any], note: Callable[[str, Call, Any], None]) -> None:
    """Call ``note(name, call, result)`` after every forward of some regions' targets that happens while ``run`` runs.

    Recursive entries and written inputs are treated as in :func:`capture_calls`.

    Args:
        regions: the regions whose targets are watched, by any name.
        run: a function that calls the targets.
        note: is given the name of the region, the arguments and the result; it must not change them.
    """
    contents: list[TensorContents] = []
    try:
        with ExitStack() as stack:
            for name, region in regions.items():
                stack.enter_context(_watched(region, contents, partial(note, name)))
            run()
    finally:
        for content in reversed(contents):  # a tensor that several calls share gets what the first call saw
            content.restore()


@contextmanager
def _watched(region: Region, contents: list[TensorContents], note: Callable[[Call, Any], None]) -> Iterator[None]:
    """Note the forwards of a region's target inside the block, and keep the contents of their tensors."""
    target = region.target
    forward = target.forward
    depth = 0

    def watching(*args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        outermost = depth == 0
        if outermost:
            contents.append(TensorContents(leaves((args, kwargs))))
        depth += 1
        try:
            result = forward(*args, **kwargs)
        finally:
            depth -= 1
        if outermost:  # a step that cannot read the batch may fail in the forward, before another step takes it
            note(Call(args, kwargs), result)
        return result

    with replaced_attribute(target, "forward", watching):
        yield


@contextmanager
def analysis_mode(region: Region, buffers: bool = True) -> Iterator[None]:
    """Switch to evaluation mode without gradients; the region quantizes and no scale moves. Exit restores everything.

    Args:
        region: the region to analyse.
        buffers: also restore the target's buffers; not needed if every forward is a :class:`RepeatableForward`.
    """
    with (
        preserved(region.target, buffers),
        region.state("quantize", updates=()),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        if any(module.training for module in region.target.modules()):  # quicker than setting it again
            region.target.eval()
        yield


class RepeatableForward:
    """Runs one forward repeatedly with the same inputs, buffers and random numbers.

    A context manager: inputs and buffers are as before at its end. Use it inside :func:`analysis_mode`, which puts the
    random state back.

    Args:
        target: the module.
        call: its arguments.
        seed: seed of the random numbers that the forward draws.
        copies: give each run its own copies of inputs and buffers, so that they can become part of an autograd graph.

    Example:
        >>> with RepeatableForward(torch.nn.Dropout(), Call.of(torch.ones(100))) as forward:
        ...     torch.equal(forward(), forward())
        True
    """

    def __init__(self, target: nn.Module, call: Call, seed: int = 0, copies: bool = False) -> None:
        self.target = target
        self.call = call
        self.seed = seed
        self.copies = copies
        modules = modules_outside_regions(target)  # no scale moves in an analysis
        self._buffers = [(m, name, b) for m in modules for name, b in m._buffers.items()]
        self._contents = TensorContents(
            [*leaves((call.args, call.kwargs)), *(b for _, _, b in self._buffers if b is not None)]
        )

    def __enter__(self) -> RepeatableForward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def __call__(self) -> Any:
        """Run the forward. The next run may change the returned tensors: copy those that you keep."""
        self._restore()
        seed_generators(self.seed)
        if not self.copies:
            return self.call.run(self.target)
        copied: dict[int, Tensor] = {}

        def copy(tensor: Tensor) -> Tensor:
            return copied.setdefault(id(tensor), tensor.detach().clone())

        for module, name, buffer in self._buffers:
            if buffer is not None:
                module._buffers[name] = copy(buffer)
        args, kwargs = map_call_leaves(self.call.args, self.call.kwargs, lambda _, tensor: copy(tensor))
        return Call(args, kwargs).run(self.target)

    def _restore(self) -> None:
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        self._contents.restore()


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, numpy and torch that are in use. ``torch.manual_seed`` is slower: it also stores
    the seed for devices that are not in use."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
