"""Guess why a tensor differs from that of the float run: the usual mistakes, recognised by their traces."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from lightning_qat.analysis.fingerprint.difference import Suspicion
from lightning_qat.analysis.fingerprint.tensor_summary import TensorSummary
from lightning_qat.analysis.tolerance import tolerance

LEAST_SHIFT = 0.1
"""Means of shuffled or augmented batches vary; a tenth of the spread does not ruin a network."""
OTHER_SPREAD = 1.5
"""An augmentation may change the spread by up to this factor."""
CLOSE = 0.25
"""How exactly a trace has to fit, relatively: the samples are not the same."""
_FULL_SCALES = (255.0, 256.0, 65535.0)
_MOST_ORDERED = 4


def has_moved(before: TensorSummary, channel: int, now: TensorSummary, other: int) -> bool:
    """Whether mean or spread differ by more than those of other samples of the same data.

    Args:
        before: of the reference.
        channel: number of its channel.
        now: here.
        other: number of the channel to compare with.
    """
    least = max(LEAST_SHIFT * before.std[channel], 1e-6)
    tolerated = tolerance(before.mean_error[channel], now.mean_error[other], least=least)
    if abs(now.mean[other] - before.mean[channel]) > tolerated:
        return True
    low, high = sorted((before.std[channel], now.std[other]))
    return high > 1e-6 and low < high / OTHER_SPREAD


def guessed_cause(before: TensorSummary, now: TensorSummary, moved: Sequence[int]) -> tuple[Suspicion, str]:
    """Guess why channels have moved, from the most specific trace to the least.

    Args:
        before: of the reference.
        now: here, with as many channels.
        moved: numbers of the channels that have moved, at least one.

    Example:
        >>> clean = TensorSummary("0", "float32", (), 64, (0.0,), (1.0,), (0.01,), (-2.0,), (2.5,))
        >>> marked = TensorSummary("0", "float32", (), 64, (-9.9,), (29.71,), (0.5,), (-99.0,), (2.5,))
        >>> guessed_cause(clean, marked, [0])[1]
        'about 10% of the values are -99: a fill value for what is missing, that is not masked?'
    """
    first = moved[0]
    constant = [i for i in moved if now.min[i] == now.max[i] and before.min[i] != before.max[i]]
    if constant:
        several = "all channels are " if len(constant) == len(now.mean) else f"channel {constant[0]} is "
        return "strong", f"{several if len(now.mean) > 1 else ''}constant here: the input is destroyed?"
    if order := _channel_order(before, now):
        return "strong", order
    affine = all(_is_rescaled(before, now, i) for i in moved)
    if not affine and (fill := _fill_value(before, now, first)):
        share, value = fill
        what = f"about {100 * share:.2g}% of the values are {value:g}"
        return "strong", f"{what}: a fill value for what is missing, that is not masked?"
    if not affine and (fill := _fill_value(now, before, first)):
        share, value = fill
        return "strong", f"a fill value is missing here: {value:g}, about {100 * share:.2g}% of the reference?"
    ratio = now.std[first] / before.std[first] if before.std[first] > 0 else math.inf
    for factor in _FULL_SCALES:
        if abs(ratio / factor - 1) < 0.1 or abs(ratio * factor - 1) < 0.1:
            largest = 255 if factor < 300 else 65535
            return "strong", f"scaled by {factor:g}: 0..1 in one and 0..{largest} in the other?"
    if affine and _is_normalized(before) and not _is_centred(now):
        return "strong", "normalization missing here?"
    if affine and _is_normalized(now) and not _is_centred(before):
        return "strong", "normalization added here?"
    if not affine and all(_is_inverted(before, now, i) for i in moved):
        return "strong", "inverted, light for dark?"
    shifted = abs(now.mean[first] - before.mean[first]) > before.std[first]
    if shifted or not 1 / OTHER_SPREAD <= ratio <= OTHER_SPREAD:
        what = "other normalization" if affine else "an augmentation that destroys the input, or other preprocessing"
        return "strong", f"{what}?"
    return "possible", "other data or augmentation?"


def guessed_shape(before: tuple[int, ...], now: tuple[int, ...]) -> str:
    """Guess why two shapes differ.

    Example:
        >>> guessed_shape((3, 32, 32), (32, 32, 3)), guessed_shape((3, 32, 32), (3, 28, 28))
        ('axes in another order (channels first or last)?', 'resized, cropped or padded otherwise?')
    """
    if len(before) != len(now):
        return "other preprocessing?"
    if sorted(before) == sorted(now):
        return "axes in another order (channels first or last)?"
    changed = [i for i, (one, other) in enumerate(zip(before, now, strict=True)) if one != other]
    if len(before) == 3 and changed == [0] and max(before[0], now[0]) <= _MOST_ORDERED:
        return "other preprocessing: grey, colour or an alpha channel?"
    return "resized, cropped or padded otherwise?" if 0 not in changed or len(before) < 3 else "other preprocessing?"


def _channel_order(before: TensorSummary, now: TensorSummary) -> str:
    """Say how channels were reordered, if that alone explains the difference."""
    channels = len(now.mean)
    if not 2 <= channels <= _MOST_ORDERED:
        return ""
    straight = tuple(range(channels))
    orders = [straight[::-1], *itertools.permutations(straight)]
    for order in orders:
        if order != straight and not any(has_moved(before, j, now, i) for i, j in enumerate(order)):
            if channels == 3 and order == straight[::-1]:
                return "channels in reversed order (RGB and BGR)?"
            return f"channels in another order ({', '.join(map(str, order))} of the reference)?"
    if channels == 3 and _is_reversed_before_normalization(before, now):
        return "channels in reversed order before the normalization (RGB and BGR)?"
    return ""


def _is_reversed_before_normalization(before: TensorSummary, now: TensorSummary) -> bool:
    """Each outer channel is normalized with the mean of the other: they move apart, the middle one stays."""
    first, last = (now.mean[i] - before.mean[i] for i in (0, 2))
    if first * last >= 0 or has_moved(before, 1, now, 1) or not min(*before.std, *now.std) > 0:
        return False
    spread = now.std[0] * now.std[2] / (before.std[0] * before.std[2])
    return abs(first + last) <= CLOSE * max(abs(first), abs(last)) and 1 / (1 + CLOSE) < spread < 1 + CLOSE


def _is_rescaled(before: TensorSummary, now: TensorSummary, channel: int) -> bool:
    """Whether ``a * x + b`` explains the difference: it leaves the ends where they are in standard deviations."""
    ends = zip(_standardized_ends(before, channel), _standardized_ends(now, channel), strict=True)
    return all(_is_close(one, other) for one, other in ends)


def _is_inverted(before: TensorSummary, now: TensorSummary, channel: int) -> bool:
    """Whether ``b - x`` explains the difference: the lower end becomes the upper one."""
    low, high = _standardized_ends(before, channel)
    ends = zip((-high, -low), _standardized_ends(now, channel), strict=True)
    ratio = now.std[channel] / before.std[channel] if before.std[channel] > 0 else math.inf
    return abs(ratio - 1) < CLOSE and all(_is_close(one, other) for one, other in ends)


def _is_close(one: float, other: float) -> bool:
    return abs(one - other) <= CLOSE * (1 + abs(one))


def _standardized_ends(summary: TensorSummary, channel: int) -> tuple[float, float]:
    """The smallest and largest value, in standard deviations from the mean."""
    mean, std = summary.mean[channel], summary.std[channel]
    return ((summary.min[channel] - mean) / std, (summary.max[channel] - mean) / std) if std > 0 else (0.0, 0.0)


def _fill_value(before: TensorSummary, now: TensorSummary, channel: int) -> tuple[float, float] | None:
    """Find a fill value: one value outside the reference's range that replaces a share of the values.

    A share ``p`` of values ``f`` in the place of others moves the mean by ``p (f - mean)`` and makes the variance
    ``(1 - p) std**2 + p (1 - p) (f - mean)**2``: the first gives ``p``, and the second has to agree.

    Returns:
        Share and value; None if the two do not agree.
    """
    mean, std = before.mean[channel], before.std[channel]
    for value, outside in (
        (now.min[channel], before.min[channel] - now.min[channel]),
        (now.max[channel], now.max[channel] - before.max[channel]),
    ):
        if outside <= std:
            continue
        share = (now.mean[channel] - mean) / (value - mean)
        if not 0 < share < 1:
            continue
        spread = math.sqrt((1 - share) * std**2 + share * (1 - share) * (value - mean) ** 2)
        if abs(spread - now.std[channel]) <= CLOSE / 2 * now.std[channel]:
            return share, value
    return None


def _is_normalized(summary: TensorSummary) -> bool:
    """About zero mean and unit variance in every channel."""
    return all(abs(m) < 0.5 and 0.5 < s < 2 for m, s in zip(summary.mean, summary.std, strict=True))


def _is_centred(summary: TensorSummary) -> bool:
    """A mean about zero in every channel."""
    return all(abs(m) < 0.5 * s for m, s in zip(summary.mean, summary.std, strict=True))
