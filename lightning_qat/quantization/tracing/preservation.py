"""Extra forward passes that leave no trace: buffers, train/eval modes and random state are put back exactly."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from lightning_qat.quantization.tracing.module_walk import modules_outside_regions


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put back the random state of torch (CPU and, once in use, every CUDA device), numpy and Python on exit."""
    devices = (
        list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    )
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def preserved_modes(module: nn.Module) -> Iterator[None]:
    """Put back the train/eval flag of every submodule on exit (they may differ from each other)."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        yield
    finally:
        for m, training in flags:
            m.__dict__["training"] = training  # Module.__setattr__ would take most of the time of a small analysis


@contextmanager
def preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Put back every buffer on exit: the same tensor objects with the same contents.

    Not those of a region: whether scales move is for its state to say.
    """
    saved = [
        (owner, name, buffer, None if buffer is None or buffer.is_meta else buffer.detach().clone())
        for owner in modules_outside_regions(module)
        for name, buffer in owner._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad(), torch.inference_mode(False):
            for owner, name, buffer, content in saved:
                if buffer is not None and content is not None and not _equal(buffer, content):
                    buffer.copy_(content)
                owner._buffers[name] = buffer


@contextmanager
def preserved_tensors(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put back the contents of tensors that are written in the block (inputs of a forward that works in place)."""
    saved = [(t, t.detach().clone(), t._version) for t in tensors if not t.is_inference()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, content, version in saved:
                if tensor._version != version:
                    tensor.copy_(content)


@contextmanager
def preserved(module: nn.Module, buffers: bool = True) -> Iterator[None]:
    """Random state, modes and, unless somebody else sees to them, buffers."""
    with preserved_random_state(), preserved_modes(module), preserved_buffers(module) if buffers else nullcontext():
        yield


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are known to be equal; torch cannot tell for sparse ones."""
    return one.layout == torch.strided and torch.equal(one, other)
