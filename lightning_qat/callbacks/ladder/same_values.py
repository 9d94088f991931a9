"""When two tensors count as the same."""

from __future__ import annotations

from torch import Tensor


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and the same values; NaN is the same as NaN.

    Example:
        >>> import torch
        >>> same_values(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]))
        True
    """
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
