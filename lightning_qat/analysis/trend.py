"""Whether a series rises, falls or does neither: a rank test that needs no model of the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STILL = 0.05
"""The usual level of a test (R. A. Fisher, 1925), where a trend is only a second condition: does it still go on?"""


@dataclass(frozen=True)
class Trend:
    """The trend of a series.

    Args:
        z: standard normal deviate of the Mann-Kendall statistic; positive for a rise.
        p_rise: probability of a statistic as large as this if there is no trend (one-sided).
        p_fall: the same for one as small as this.
    """

    z: float
    p_rise: float
    p_fall: float


def mann_kendall(values: Sequence[float], block: int = 1) -> Trend:
    """Test a series for a monotone trend, by the ranks of its values.

    Every pair of values votes for a rise or a fall; without a trend the votes balance. Ties are corrected for. The test
    assumes independent values, and training losses of neighbouring steps are not: they are averaged in blocks first, in
    which the correlation fades and a trend stays. Outliers count no more than any other value.

    Args:
        values: the series, finite.
        block: number of neighbours that are averaged to one value; a rest at the start is left out.

    Returns:
        The trend. With fewer than 4 blocks not even a level of 5 % can be reached, and both probabilities are 1.

    Example:
        >>> mann_kendall([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).p_rise < 0.01
        True
        >>> mann_kendall([3.0, 1.0, 2.0, 1.0, 3.0, 2.0]).p_rise > 0.3
        True

    Sources:
        H. B. Mann, "Nonparametric tests against trend", Econometrica 13 (1945); M. G. Kendall, "Rank Correlation
        Methods" (1975), for the variance with ties.
    """
    series = np.asarray(values, dtype=np.float64)
    if block > 1:
        blocks = len(series) // block
        series = series[len(series) - blocks * block :].reshape(blocks, block).mean(axis=1)
    n = len(series)
    if n < 4:
        return Trend(0.0, 1.0, 1.0)
    first, second = np.triu_indices(n, k=1)
    votes = float(np.sign(series[second] - series[first]).sum())
    ties = np.unique(series, return_counts=True)[1].astype(np.float64)
    variance = (n * (n - 1) * (2 * n + 5) - float((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18
    if variance <= 0:  # all values are equal
        return Trend(0.0, 1.0, 1.0)
    z = (votes - math.copysign(1.0, votes)) / math.sqrt(variance) if votes else 0.0
    return Trend(z, _upper_tail(z), _upper_tail(-z))


def block_length(values: Sequence[float], most: int = 64) -> int:
    """Return how many neighbours to average until blocks are about independent.

    About twice the :func:`autocorrelation_time` of the series: the means of such blocks are nearly uncorrelated.

    Args:
        values: the series, finite.
        most: the longest block.

    Example:
        >>> import numpy as np
        >>> noise = np.random.default_rng(0).normal(size=400)
        >>> block_length(noise) <= 2, block_length(np.convolve(noise, np.ones(8) / 8, "valid")) >= 6
        (True, True)

    Sources:
        H. Flyvbjerg and H. G. Petersen, "Error estimates on averages of correlated data", Journal of Chemical Physics
        91 (1989).
    """
    return max(1, min(most, math.ceil(2 * autocorrelation_time(values, most) - 1)))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of a series, and its standard error although neighbouring values are correlated.

    The error is ``std * sqrt(time / n)``: ``n`` values say as much as ``n / time`` independent ones.

    Args:
        values: the series, finite; with fewer than 2 values the error is infinite.

    Example:
        >>> mean_and_error([1.0, 2.0, 1.0, 2.0])
        (1.5, 0.28867513459481287)

    Sources:
        A. D. Sokal, "Monte Carlo methods in statistical mechanics", in "Functional Integration" (1997).
    """
    series = np.asarray(values, dtype=np.float64)
    n = len(series)
    if n < 2:
        return float(series.mean()) if n else math.nan, math.inf
    return float(series.mean()), float(series.std(ddof=1)) * math.sqrt(autocorrelation_time(values) / n)


def autocorrelation_time(values: Sequence[float], most: int = 64) -> float:
    """Return the integrated autocorrelation time of a series around its line.

    That is 1 plus twice the sum of its autocorrelations up to the first that is not positive; 1 of independent values.

    Args:
        values: the series, finite; fewer than 8 values count as independent.
        most: the longest lag, exclusive.

    Example:
        >>> autocorrelation_time([1.0, -1.0] * 8)
        1.0
    """
    series = np.asarray(values, dtype=np.float64)
    n = len(series)
    if n < 8:
        return 1.0
    position = np.arange(n) - (n - 1) / 2
    rest = series - series.mean()
    rest -= position * (position @ rest / (position @ position))
    power = float(rest @ rest)
    if power <= 0:
        return 1.0
    time = 1.0
    for lag in range(1, min(most, n // 4)):
        correlation = float(rest[:-lag] @ rest[lag:]) / power
        if correlation <= 0:
            break
        time += 2 * correlation
    return time


def _upper_tail(z: float) -> float:
    """P(Z >= z) of the standard normal distribution."""
    return 0.5 * math.erfc(z / math.sqrt(2))
