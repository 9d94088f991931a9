"""The numbers that a diagnosis needs: the distribution of a point's values, and their quantization errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_qat.analysis.comparison.populations import Population


@dataclass(frozen=True)
class Octave:
    """The values with a magnitude in ``[2**exponent, 2**(exponent + 1))``.

    Args:
        exponent: exponent of two.
        count: number of values.
        relative_error: root mean square of ``error / value``.
    """

    exponent: int
    count: int
    relative_error: float


@dataclass(frozen=True)
class AxisProfile:
    """The values along one axis, from which the best split follows.

    Args:
        axis: number of the axis.
        largest: largest magnitude at every index.
        inverse_squares: sum of ``1 / x**2`` over the values at every index that are not zero.
    """

    axis: int
    largest: tuple[float, ...]
    inverse_squares: tuple[float, ...]


@dataclass(frozen=True)
class PointEvidence:
    """The numbers behind the diagnosis of one point. Errors are those the point makes of the float model's values.

    Args:
        point: its name.
        op_type: torch function of its op.
        role: ``input``, ``weight`` or ``output``.
        dtype: quantized type; ``bits`` its width.
        scheme: ``symmetric`` or ``affine``.
        observer: how calibration finds the scale.
        fixed_scale: scale given by the user.
        scale: the largest scale of the point.
        quant_max: largest code.
        representable: smallest and largest value that the point represents.
        min, max: smallest and largest value seen, None without a value.
        count: finite values seen.
        signal: sum of their squares.
        rounding, clipping: sums of the squared errors of values inside and outside the range.
        clipped: number of values outside the range.
        used_share: part of the codes between the smallest and the largest one hit.
        codes: number of different codes hit.
        octaves: values by magnitude, the smallest first.
        vanished: share of the values other than zero that become zero.
        calibrated: range that calibration saw, None if it saw nothing or has several scales.
        calls: range of each call of a point that several calls in a dynamic block share.
        divides: ops that divide by the values, or take their reciprocal or logarithm.
        profiles: for a divisor, along all of its axes; for other points, along the channel axis.
        scales: how many scales it has; ``channels``: how many it could have along the channel axis of a weight, which
            is ``channel_axis``.
        types: types that the hardware supports here; empty if the hardware is not known. ``styles``: schemes of an
            activation, granularities of a weight.
        request: explanation why a requested type is not in effect; empty if it is. ``requested`` is that type.
        loop: description of the line of which its op is one round; empty unless it is in a long loop.
        populations: parts of the tensor whose values are lost.
        leaves: its values leave the region as they are; ``given``: they are an input of the region.
        affine_gain: factor by which an affine scheme would make the error fall; None if that cannot be told.
        per_channel: of a weight with one scale, sum of the squared errors that a scale per channel would make.
    """

    point: str
    op_type: str
    role: str
    dtype: str
    bits: int
    scheme: str
    observer: str
    fixed_scale: float | None
    scale: float
    quant_max: int
    representable: tuple[float, float]
    min: float | None
    max: float | None
    count: int
    signal: float
    rounding: float
    clipping: float
    clipped: int
    used_share: float | None
    codes: int
    octaves: tuple[Octave, ...]
    vanished: float
    calibrated: tuple[float, float] | None = None
    calls: tuple[tuple[float, float], ...] = ()
    divides: tuple[str, ...] = ()
    profiles: tuple[AxisProfile, ...] = ()
    scales: int = 1
    channels: int = 1
    types: tuple[str, ...] = ()
    request: str = ""
    requested: str = ""
    loop: str = ""
    styles: tuple[str, ...] = ()
    populations: tuple[Population, ...] = ()
    leaves: bool = False
    given: bool = False
    channel_axis: int | None = None
    affine_gain: float | None = None
    per_channel: float | None = None

    @property
    def largest(self) -> float:
        """Largest magnitude seen."""
        return max(-(self.min or 0.0), self.max or 0.0)

    @property
    def size(self) -> float:
        """Root mean square of the values."""
        return math.sqrt(self.signal / self.count) if self.count else 0.0

    @property
    def error(self) -> float:
        """Root mean square error."""
        return math.sqrt((self.rounding + self.clipping) / self.count) if self.count else 0.0

    @property
    def relative_error(self) -> float:
        """Root mean square error relative to the root mean square of the values; 0 without a value."""
        return math.sqrt((self.rounding + self.clipping) / self.signal) if self.signal else 0.0

    @property
    def clipped_share(self) -> float:
        """Share of the values outside the range."""
        return self.clipped / self.count if self.count else 0.0

    @property
    def dynamic_range(self) -> float:
        """Largest over smallest magnitude that is not zero, to a factor of two; 1 without a value."""
        return 2.0 ** (self.octaves[-1].exponent - self.octaves[0].exponent) if self.octaves else 1.0
