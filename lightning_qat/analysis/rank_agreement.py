"""Giving up together: where one rank cannot analyse its batches, no other one waits for its share of the sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.numerics.histogram import reduce_device


@contextmanager
def failing_together(across_ranks: bool = True) -> Iterator[None]:
    """Run a block in which ranks do not communicate; a ConfigurationError on one of them becomes one on all.

    Args:
        across_ranks: whether all ranks enter this; else only this one is looked at.

    Raises:
        ConfigurationError: that of the block, or on another rank.

    Example:
        >>> with failing_together():
        ...     print("analysed")
        analysed
    """
    together = across_ranks and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    problem: ConfigurationError | None = None
    try:
        yield
    except ConfigurationError as error:
        problem = error
    if together:
        failed = torch.tensor(float(problem is not None), device=reduce_device(None))
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if failed:
            messages: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(messages, None if problem is None else str(problem))
            rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
            problem = problem or ConfigurationError(f"on rank {rank}: {message}")
    if problem is not None:
        raise problem
