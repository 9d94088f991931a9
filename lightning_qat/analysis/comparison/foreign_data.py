"""Whether calibration saw the data that the model is trained on: what its points hold, on both."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.analysis.captured_calls import RepeatableForward, analysis_mode
from lightning_qat.analysis.comparison.compared_forward import ComparedForward
from lightning_qat.analysis.statistics.point_statistics import CHUNK
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.region.region import Region

APART = 2.0
"""A bit of the range: augmentation, and batches of one data set, differ by less at most points."""
MOST = 0.5
"""Share of the points that differ: other data change what nearly all points hold."""


@dataclass(frozen=True)
class Moments:
    """What a point holds in the float model.

    Args:
        means: mean of its values in each forward.
        deviations: their standard deviation.
    """

    means: tuple[float, ...] = ()
    deviations: tuple[float, ...] = ()

    def differs(self, other: Moments) -> bool:
        """Whether each forward is a bit or more from each of the other ones, in deviation or in mean.

        Example:
            >>> data, zeros = Moments((0.1, -0.1), (1.0, 1.1)), Moments((0.0,), (0.0,))
            >>> data.differs(zeros), data.differs(Moments((0.0,), (1.5,))), data.differs(Moments((9.0,), (1.0,)))
            (True, False, True)
        """
        if not self.means or not other.means:
            return False
        unit = max(*self.deviations, *other.deviations)
        narrower = any(APART * max(a.deviations) < min(b.deviations) for a, b in ((self, other), (other, self)))
        shifted = max(min(self.means) - max(other.means), min(other.means) - max(self.means)) > unit
        return narrower or shifted

    def __str__(self) -> str:
        count = max(1, len(self.means))
        return f"mean {sum(self.means) / count:.3g} and standard deviation {sum(self.deviations) / count:.3g}"


@dataclass(frozen=True)
class ForeignPoints:
    """The points of a region that hold other values in calibration.

    Args:
        differing: their names, in execution order, with what they hold in calibration and in the other data.
        compared: names of all points that depend on data.
    """

    differing: Mapping[str, tuple[Moments, Moments]]
    compared: frozenset[str]


def moments_of(region: Region, calls: Iterable[Call], seed: int = 0) -> dict[str, Moments]:
    """Measure what every activation point holds when the float model runs in evaluation mode.

    Args:
        region: a calibrated region.
        calls: the forwards.
        seed: of the random numbers that a forward draws.
    """
    found: dict[str, Moments] = {}
    with analysis_mode(region):
        for call in calls:
            listener = _Sums()
            with RepeatableForward(region.target, call, seed) as forward, ComparedForward(region, listener, False):
                forward()
            for name, (count, total, squares) in listener.sums.items():
                plan = region.plan.by_name.get(name)
                if plan is None or plan.is_weight or not count:
                    continue
                mean = total / count
                deviation = math.sqrt(max(0.0, squares / count - mean**2))
                known = found.get(name, Moments())
                found[name] = Moments((*known.means, mean), (*known.deviations, deviation))
    return found


def foreign_points(
    calibration: Mapping[str, Moments], data: Mapping[str, Moments], given: Collection[str]
) -> ForeignPoints | None:
    """Compare what points hold in calibration and in other data; None if they hold the same at most points.

    Args:
        calibration: of each point.
        data: of each point, in the data that the model is for.
        given: points that hold an input of the region: at least one of them has to differ.

    Example:
        >>> zeros, ones = Moments((0.0,), (0.0,)), Moments((0.1,), (1.0,))
        >>> found = foreign_points({"in": zeros, "out": zeros}, {"in": ones, "out": ones}, ["in"])
        >>> list(found.differing)
        ['in', 'out']
        >>> foreign_points({"in": ones, "out": zeros}, {"in": ones, "out": ones}, ["in"]) is None
        True
    """
    compared = [name for name in calibration if name in data and calibration[name] != data[name]]  # no constants
    differing = {name: (calibration[name], data[name]) for name in compared if calibration[name].differs(data[name])}
    inputs = [name for name in given if name in calibration]
    if len(differing) < max(1, MOST * len(compared)) or (inputs and not any(name in differing for name in inputs)):
        return None
    return ForeignPoints(differing, frozenset(compared))


class _Sums:
    """The listener of a float forward."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[int, float, float]] = {}

    def on_value(self, name: str, value: Tensor) -> None:
        count, total, squares = self.sums.get(name, (0, 0.0, 0.0))
        for part in value.detach().reshape(-1).split(CHUNK):
            finite = part[part.isfinite()].double()
            added = torch.stack([finite.sum(), finite.square().sum()]).tolist()
            count, total, squares = count + finite.numel(), total + added[0], squares + added[1]
        self.sums[name] = count, total, squares

    def on_own(self, name: str, base: Tensor, analy: Tensor, direct: Tensor | None) -> None:
        raise AssertionError("only asked for with own=True")
