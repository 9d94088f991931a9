"""Recognizing additive masks by their values: fills that mean "never attend here"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from lightning_qat.quantization.modules.tensor_leaves import is_float

MASK_FILL = -1e4
"""Fills at or below this value (``-1e4``, ``-1e9``, ``finfo.min``, ``-inf``) mean "never attend here"."""

_SMALL_FILL = -50.0  # exp(-50) is nothing; Swin masks with -100
_MASK_MAKERS = {"masked_fill", "where", "full", "full_like", "new_full", "fill", "setitem", "mul", "tensor"}


def is_mask_fill(value: object) -> bool:
    """Whether a scalar is the fill of an additive mask rather than data."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value <= MASK_FILL


def makes_mask(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[Tensor]) -> bool:
    """Whether an op makes an additive mask: it fills with huge negative numbers, or turns zeros and ones into fills.

    Args:
        kind: canonical torch function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        outputs: the tensors that it returned.

    Example:
        >>> kept = torch.tensor([0.0, 1.0])
        >>> makes_mask("mul", (kept - 1, 1e9), {}, [(kept - 1) * 1e9]), makes_mask("log", (kept,), {}, [kept.log()])
        (True, True)
    """
    if kind == "log":  # of zeros and ones, or (m + 1e-45).log()
        return any(_is_readable(t) and _is_switch(t, *_extremes(t)) for t in outputs)
    if kind not in _MASK_MAKERS:
        return False
    scalars = [v for v in (*args, *kwargs.values()) if isinstance(v, (int, float))]
    if any(map(is_mask_fill, scalars)):
        return True
    return any(abs(v) >= -_SMALL_FILL for v in scalars) and any(map(has_mask_values, outputs))


def subtracts_mask(kind: str, operands: Sequence[Tensor]) -> bool:
    """Whether an op subtracts huge positive fills: ``scores - 1e9 * (1 - m)``."""
    if kind != "sub" or len(operands) != 2 or not _is_readable(operands[1]):
        return False
    subtracted = -operands[1].detach()
    return _has_fills(subtracted, *_extremes(subtracted))


def has_mask_values(tensor: Tensor) -> bool:
    """Whether a tensor looks like an additive mask.

    It then holds a few huge negative fills and otherwise moderate values, with nothing in between; or only zeros and
    one negative number whose exponential is practically zero.
    """
    if not _is_readable(tensor):
        return False
    extremes = _extremes(tensor)
    return _is_switch(tensor, *extremes) or _has_fills(tensor, *extremes)


def _is_readable(tensor: Tensor) -> bool:
    """Whether a tensor has several floating-point values that can be looked at."""
    is_dense = tensor.layout is torch.strided and not tensor.is_nested
    is_plain = is_dense and not tensor.is_meta and not is_functorch_wrapped_tensor(tensor)
    return is_plain and is_float(tensor) and tensor.numel() > 1


def _is_switch(tensor: Tensor, lowest: float, highest: float) -> bool:
    """Whether there are only zeros and one negative number."""
    return lowest <= _SMALL_FILL and highest == 0.0 and bool(((tensor == 0.0) | (tensor == lowest)).all())


def _has_fills(tensor: Tensor, lowest: float, highest: float) -> bool:
    """Whether there are a few huge negative numbers, and otherwise moderate ones."""
    if not is_mask_fill(lowest) or highest > -MASK_FILL / 10:
        return False
    if bool(((tensor > MASK_FILL) & (tensor < MASK_FILL / 10)).any()):
        return False
    return int(tensor[tensor <= MASK_FILL].unique().numel()) <= 4


def _extremes(tensor: Tensor) -> tuple[float, float]:
    lowest, highest = tensor.detach().aminmax()
    return float(lowest), float(highest)
