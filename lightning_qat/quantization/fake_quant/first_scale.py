"""Points that do not vary until training moves a parameter: they take their first scale from training.

The second matrix of a LoRA adapter, the last layer of a residual branch, a ReZero or LayerScale factor: all begin at
zero, so that a branch begins as nothing. Calibration sees no range there. A stand-in scale would clip whatever training
makes of the branch, and with it the gradient. So such a point stays float at first, and then its scale follows the
values.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from lightning_qat.quantization import ranks
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.numerics.channel_groups import swap_within_groups
from lightning_qat.quantization.numerics.split_statistics import SplitStatistics

YOUTH = 100
"""For how many batches with values the range of a point widens at once; then scales that move on their own do so."""

_MOMENTUM = 1 / YOUTH


def takes_first_scale(fake_quant: FakeQuantize, moves: bool) -> bool:
    """Whether :func:`follow` finds a point's scale in the forward that runs.

    Args:
        fake_quant: the point.
        moves: the scale follows the data anyway.
    """
    waits = fake_quant.starts_at_zero and fake_quant.training and not fake_quant.frozen
    return waits and follows(fake_quant, moves)


def follows(fake_quant: FakeQuantize, moves: bool) -> bool:
    """Whether a point's scale is still found by :func:`follow`.

    Args:
        fake_quant: a point that began at zero.
        moves: the scale follows the data anyway.
    """
    return _follows_after(fake_quant.batches_from_zero, fake_quant, moves)


def _follows_after(batches: int, fake_quant: FakeQuantize, moves: bool) -> bool:
    return batches < YOUTH or not (moves or fake_quant.learned)


@torch.no_grad()
def await_values(fake_quant: FakeQuantize) -> None:
    """Let a point have no scale until training gives it values; calibration saw one value only."""
    fake_quant.starts_at_zero, fake_quant.batches_from_zero, fake_quant.agreed_batches = True, 0, 0
    fake_quant.scale_source = None
    fake_quant.scale.fill_(1.0)
    fake_quant.zero_point.zero_()


@torch.no_grad()
@torch.inference_mode(False)
def follow(fake_quant: FakeQuantize, x: Tensor, is_weight: bool) -> None:
    """Take the scale of a point that began at zero from the values of a training forward.

    The range is that of a weight; of an activation it widens at once and shrinks as a moving average. A learned scale
    is only ever raised. Zeros and values that are not finite change nothing.

    Args:
        fake_quant: the point.
        x: what flows through.
        is_weight: it quantizes a weight.
    """
    if x.numel() == 0 or is_functorch_wrapped_tensor(x):
        return
    x = x.detach()
    low, high = fake_quant.statistics.extremes(swap_within_groups(x, fake_quant.groups) if fake_quant.groups > 1 else x)
    batch = torch.stack([low, high])
    if not bool(batch.isfinite().all() & batch.any()):
        return
    if not is_weight and fake_quant.batches_from_zero:
        before = fake_quant.statistics.averages.to(batch.device)
        slowly = before + _MOMENTUM * (batch - before)
        batch = torch.stack([torch.minimum(batch[0], slowly[0]), torch.maximum(batch[1], slowly[1])])
    fake_quant.statistics.averages = batch
    statistics = fake_quant.statistics
    for part in statistics.groups if isinstance(statistics, SplitStatistics) else (statistics,):
        part.batches += 1  # so that a moving average goes on as one of many batches
    fake_quant.batches_from_zero += 1
    _take_scale(fake_quant)


def agree_over_ranks(points: Iterable[tuple[FakeQuantize, bool]]) -> None:
    """Give all ranks the widest range of each point that began at zero; every rank must call this after each batch.

    A point whose scale no rank finds by :func:`follow` any more is left out, and without such points nothing is
    exchanged. A rank may have met fewer batches with values than the others, so the count that decides is the one that
    the ranks agreed on before.

    Args:
        points: those of a region, in the same order on all ranks, and whether the scale follows the data anyway.
    """
    if ranks.count() == 1:
        return
    waiting = [(f, moves) for f, moves in points if f.starts_at_zero and not f.frozen]
    found = [f for f, moves in waiting if _follows_after(f.agreed_batches, f, moves)]
    if not found:
        return
    parts = []
    for fake_quant in found:
        low, high = fake_quant.statistics.averages.cpu()
        scale = fake_quant.scale.detach().cpu().double().reshape(-1) * (fake_quant.scale_source is not None)
        parts.append(torch.cat([-low, high, scale, torch.tensor([float(fake_quant.batches_from_zero)])]))
    widest = ranks.largest(torch.cat(parts)).split([len(part) for part in parts])
    for fake_quant, numbers in zip(found, widest, strict=True):
        size = fake_quant.scale.numel()
        low, high, scale, (batches,) = numbers.split([size, size, size, 1])
        if not batches:
            continue
        fake_quant.batches_from_zero = fake_quant.agreed_batches = int(batches)
        fake_quant.statistics.averages = torch.stack([-low, high])
        _take_scale(fake_quant)
        if fake_quant.learned:
            fake_quant.scale.detach().copy_(scale.reshape(fake_quant.scale.shape))


def _take_scale(fake_quant: FakeQuantize) -> None:
    present = fake_quant.scale.detach()  # in place also where it is a parameter
    before = present.clone() if fake_quant.learned and fake_quant.scale_source is not None else None
    fake_quant.write_range(*fake_quant.statistics.averages)
    if before is not None:
        torch.maximum(present, before, out=present)
    fake_quant.scale_source = "minmax"
