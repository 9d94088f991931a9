"""Extra forwards that leave no trace: buffers, train/eval modes and random state are restored exactly."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_qat.quantization.modules.module_walk import modules_outside_regions


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

    Buffers of regions are not put back: the state of a region decides whether its scales move.
    What a lazy layer has not made yet is left to it.
    """
    saved = [
        (owner, name, buffer, None if buffer is None or buffer.is_meta else buffer.detach().clone())
        for owner in modules_outside_regions(module)
        for name, buffer in owner._buffers.items()
        if buffer is None or not is_lazy(buffer)
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
def preserved_parameters(module: nn.Module) -> Iterator[None]:
    """Put back the values of all parameters on exit: forwards in train mode may write them.

    A codebook may follow its vectors, a momentum encoder its online network, and torch's own embeddings limit the norm
    of their rows.
    """
    saved = [(p, p.data, p.detach().clone()) for p in module.parameters() if not (is_lazy(p) or p.is_meta)]
    try:
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():  # in this order: the former turns gradients on
            for parameter, data, content in saved:
                if parameter.data_ptr() != data.data_ptr():
                    parameter.data = data
                if not _equal(parameter, content):
                    parameter.copy_(content)


class TensorContents:
    """Copies of the contents of tensors, to restore those that are written later (inputs of a forward that works in
    place). Inference tensors are left out: nobody can write to them."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list({id(t): t for t in tensors if not t.is_inference()}.values())
        self._copies = [t.detach().clone() for t in self._tensors]
        self._versions = [t._version for t in self._tensors]

    def restore(self) -> None:
        """Restore the tensors that were written; may be called again."""
        with torch.no_grad():
            for index, (tensor, copy) in enumerate(zip(self._tensors, self._copies, strict=True)):
                if tensor._version != self._versions[index]:
                    tensor.copy_(copy)
                    self._versions[index] = tensor._version


@contextmanager
def preserved_tensors(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put back the contents of tensors that are written in the block."""
    contents = TensorContents(tensors)
    try:
        yield
    finally:
        contents.restore()


@contextmanager
def replaced_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute (such as a method) on this object alone, and restore the previous one on exit."""
    own, missing = vars(owner), object()
    before = own.get(name, missing)
    own[name] = value
    try:
        yield
    finally:
        if before is missing:
            own.pop(name, None)
        else:
            own[name] = before


@contextmanager
def preserved(module: nn.Module, buffers: bool = True) -> Iterator[None]:
    """Put back random state, train/eval modes and, if ``buffers`` is true, buffers on exit."""
    with preserved_random_state(), preserved_modes(module), preserved_buffers(module) if buffers else nullcontext():
        yield


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are known to be equal; torch cannot tell for sparse ones."""
    return one.layout == torch.strided and torch.equal(one, other)
