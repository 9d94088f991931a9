"""What fake-quantization is compared with: the formula in numpy, and torch's own operators.

Torch's operators multiply by the inverse of the scale, we divide. So theirs may differ from ours by one code where
``x / scale`` is a tie within the rounding of that product, and nowhere else.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def bits(x: Tensor) -> Tensor:
    """The bit pattern, which also tells 0.0 from -0.0."""
    return x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.equal(bits(actual), bits(expected))


def along(values: Tensor | int, x: Tensor, axis: int | None) -> Tensor:
    """Scales or zero points so that they broadcast along an axis of ``x``."""
    values = torch.as_tensor(values).detach()
    return values if axis is None else values.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


def formula(
    x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int, axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """The quantized value, and where the code before clipping is in range: the gradient mask. In numpy."""
    values, zero = x.detach().numpy(), along(zero_point, x, axis).numpy().astype(x.numpy(force=True).dtype)
    steps = along(scale, x, axis).numpy().astype(values.dtype)
    with np.errstate(over="ignore"):
        codes = np.rint(values / steps) + zero
    inside = (codes >= quant_min) & (codes <= quant_max)
    result = (np.clip(codes, quant_min, quant_max) - zero) * steps + values.dtype.type(0)
    return torch.from_numpy(np.asarray(result)), torch.from_numpy(np.asarray(inside))


def at_tie(x: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    """Where ``x / scale`` is a tie, give or take the two roundings of ``x * (1 / scale)`` in float32."""
    quotient = x.detach().double() / along(scale, x, axis).double()
    distance = (quotient - (quotient.floor() + 0.5)).abs()
    return distance <= quotient.abs() * 2.0**-23 * 1.001


def assert_torchs_but_for_ties(
    actual: Tensor, torchs: Tensor, x: Tensor, scale: Tensor, axis: int | None = None
) -> None:
    """The bits of torch's operator, and at ties the same code or one of its neighbours."""
    ties = at_tie(x, scale, axis)
    assert actual.shape == torchs.shape
    assert actual.dtype == torchs.dtype
    assert torch.equal(bits(actual)[~ties], bits(torchs)[~ties])
    mine, theirs = (y.detach().double() / along(scale, x, axis).double() for y in (actual, torchs))
    assert bool(((mine.round() - theirs.round()).abs()[ties] <= 1).all())


def assert_torchs_gradient_but_for_ties(
    actual: Tensor,
    torchs: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> None:
    """The bits of torch's gradient, but for the ties at the two ends of the range: there one of the two may be zero."""
    quotient = x.detach().double() / along(scale, x, axis).double() + along(zero_point, x, axis)
    at_end = (quotient - (quant_min - 0.5)).abs().minimum((quotient - (quant_max + 0.5)).abs()) < 0.25
    uncertain = at_tie(x, scale, axis) & at_end
    assert torch.equal(bits(actual)[~uncertain], bits(torchs)[~uncertain])
    differ = actual != torchs
    assert bool(((actual == 0) | (torchs == 0))[differ].all())
