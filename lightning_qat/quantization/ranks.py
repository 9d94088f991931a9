"""Reductions over the ranks of a distributed run. No other module of the package uses torch.distributed.

A reduction returns a new tensor on the device of its argument, whatever device the backend works on. Without a process
group, or in a group of one rank, it returns its argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_qat.quantization.errors import ConfigurationError

T = TypeVar("T")


def count() -> int:
    """Return the number of ranks; 1 without a process group.

    Example:
        >>> count(), rank()
        (1, 0)
    """
    return dist.get_world_size() if _initialized() else 1


def rank() -> int:
    """Return the number of this rank; 0 without a process group."""
    return dist.get_rank() if _initialized() else 0


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over ranks. Every rank must call this with a tensor of the same shape and type.

    Args:
        tensor: this rank's summand; it is not changed.

    Example:
        >>> summed(torch.tensor([1, 2]))
        tensor([1, 2])
    """
    return _reduced(tensor, "sum")


def largest(tensor: Tensor) -> Tensor:
    """Return the elementwise maximum of a tensor over ranks; arguments as for :func:`summed`."""
    return _reduced(tensor, "max")


def averaged(tensor: Tensor) -> Tensor:
    """Return the mean of a floating-point tensor over ranks; arguments as for :func:`summed`."""
    ranks = count()
    return tensor if ranks == 1 else summed(tensor) / ranks


def gathered(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all ranks in their order, on the CPU; arguments as for :func:`summed`."""
    if count() == 1:
        return [tensor.cpu()]
    sent = tensor.to(reduce_device()).contiguous()
    received = [torch.empty_like(sent) for _ in range(count())]
    dist.all_gather(received, sent)
    return [t.cpu() for t in received]


def gathered_objects(value: T) -> list[T]:
    """Return what all ranks have, in their order. Every rank must call this with something that can be pickled.

    Example:
        >>> gathered_objects({"axis": 1})
        [{'axis': 1}]
    """
    if count() == 1:
        return [value]
    received: list[T] = [value] * count()
    dist.all_gather_object(received, value)
    return received


def of_first_rank(tensor: Tensor) -> Tensor:
    """Return the tensor that rank 0 has; arguments as for :func:`summed`."""
    if count() == 1:
        return tensor
    shared = _to_reduce(tensor)
    dist.broadcast(shared, src=0)
    return shared.to(tensor.device)


def reduce_device() -> torch.device:
    """Return the device on which the backend can reduce; the CPU without a process group."""
    if _initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def failing_together(across_ranks: bool = True) -> Iterator[None]:
    """Run a block without communication; if it raises a ConfigurationError on one rank, raise one on all ranks.

    Without this, the other ranks would wait for the failed rank in the next reduction.

    Args:
        across_ranks: True if all ranks enter the block. False looks at this rank only.

    Raises:
        ConfigurationError: the block raised one, on this rank or on another.

    Example:
        >>> with failing_together():
        ...     print("analysed")
        analysed
    """
    problem: ConfigurationError | None = None
    try:
        yield
    except ConfigurationError as error:
        problem = error
    if across_ranks and largest(torch.tensor(float(problem is not None))) and count() > 1:
        messages = gathered_objects(None if problem is None else str(problem))
        number, message = next((number, message) for number, message in enumerate(messages) if message is not None)
        problem = problem or ConfigurationError(f"on rank {number}: {message}")
    if problem is not None:
        raise problem


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _reduced(tensor: Tensor, operation: str) -> Tensor:
    if count() == 1:
        return tensor
    shared = _to_reduce(tensor)
    dist.all_reduce(shared, dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM)
    return shared.to(tensor.device)


def _to_reduce(tensor: Tensor) -> Tensor:
    return tensor.detach().to(reduce_device(), copy=True, memory_format=torch.contiguous_format)
