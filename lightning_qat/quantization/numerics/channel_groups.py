"""The output channels of a grouped transposed convolution, whose weight does not have them along one axis.

Its weight is ``(in, out / groups, *kernel)``: group ``g`` reads the rows ``g * in / groups ...`` of axis 0, and output
channel ``c = g * (out / groups) + j`` is column ``j`` of these rows. The convolution that belongs to it has the weight
``(out, in / groups, *kernel)``, with a channel in every row.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor


def swap_within_groups(weight: Tensor, groups: int) -> Tensor:
    """Swap the first two axes inside each group: from one of the two layouts to the other, and back.

    Args:
        weight: ``(groups * rows, columns, *kernel)``.
        groups: number of groups.

    Returns:
        ``(groups * columns, rows, *kernel)``.

    Example:
        >>> import torch
        >>> transposed = torch.randn(6, 2, 3, 3)  # ConvTranspose2d(6, 4, 3, groups=2)
        >>> convolution = swap_within_groups(transposed, 2)
        >>> convolution.shape, torch.equal(convolution[3], transposed[3:, 1])
        (torch.Size([4, 3, 3, 3]), True)
        >>> torch.equal(swap_within_groups(convolution, 2), transposed)
        True
    """
    return cast(Tensor, weight.unflatten(0, (groups, -1))).transpose(1, 2).flatten(0, 1)


def channel_rows(tensor: Tensor, axis: int | None, groups: int = 1) -> Tensor:
    """View a tensor as one row of values per scale, ``(channels, n)``; one row without an axis.

    Args:
        tensor: any tensor.
        axis: channel axis.
        groups: of a transposed convolution whose weight this is; the axis is that of the other layout then.
    """
    if axis is None:
        return tensor.reshape(1, -1)
    if groups > 1:
        tensor = swap_within_groups(tensor, groups)
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)
