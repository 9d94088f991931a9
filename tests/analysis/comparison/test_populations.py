"""Sums along axes and lost parts, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_qat.analysis.comparison.axis_sums import LONGEST_AXIS, SumsByAxis, sums_along
from lightning_qat.analysis.comparison.populations import (
    KEPT,
    LEAST_GAP,
    LOST_SHARE,
    JoinedPart,
    joined_parts,
    lost_populations,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 2**31 - 1), st.booleans())
def test_sums_equal_numpy_however_the_batches_are_cut(
    shape: list[int], batches: int, seed: int, with_bad_values: bool
) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(batches, *shape)) * 10.0 ** rng.integers(-6, 7, size=shape)).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = 0.0
    if with_bad_values:
        x[rng.random(x.shape) < 0.2] = rng.choice([np.nan, np.inf, -np.inf])
    with np.errstate(invalid="ignore"):
        q = np.round(x / 0.5).astype(np.float32) * np.float32(0.5)
    table = SumsByAxis()
    axes = list(range(len(shape)))
    for part, quantized in zip(torch.from_numpy(x), torch.from_numpy(q), strict=True):
        table.add(part, quantized, axes)
    for axis in axes:
        found = table.known[axis]
        for index in range(shape[axis]):
            values = np.take(x, index, axis + 1).ravel().astype(np.float64)
            usable = np.isfinite(values)
            values = values[usable]
            errors = np.take(q, index, axis + 1).ravel().astype(np.float64)[usable] - values
            assert found.count[index] == usable.sum()
            assert found.largest[index] == np.abs(values).max(initial=0.0)
            assert found.left[index] == np.abs(values + errors).max(initial=0.0)
            assert found.signal[index] == pytest.approx((values**2).sum(), rel=1e-9)
            assert found.error[index] == pytest.approx((errors**2).sum(), rel=1e-9, abs=1e-30)
            if usable.any():
                spread = ((values - values.mean()) ** 2).sum()
                assert found.variation[index] == pytest.approx(spread, rel=1e-6, abs=1e-9 * (values**2).sum())
            assert found.inverse_squares[index] == pytest.approx((values[values != 0] ** -2).sum(), rel=1e-9)


def test_axis_that_follows_the_data_or_is_too_long_is_given_up() -> None:
    table = SumsByAxis()
    for length in (3, 4, 3):
        x = torch.ones(2, length, 5)
        table.add(x, x, [1, 2])
    assert list(table.known) == [2]
    assert table.known[2].count.tolist() == [20.0] * 5
    long = torch.ones(1, LONGEST_AXIS + 1)
    assert sums_along(long, long, [1]) == {}


def _rounded(x: np.ndarray, step: float) -> np.ndarray:  # type: ignore[type-arg]
    return np.clip(np.round(x / step), -127, 127) * step


def _found(x: np.ndarray, step: float, joined: list[JoinedPart] | None = None, bound: float | None = None):  # type: ignore[type-arg,no-untyped-def]
    value = torch.from_numpy(x)
    sums = sums_along(value, torch.from_numpy(_rounded(x, step)), list(range(1, x.ndim)))
    return lost_populations(sums, 127, step, joined=joined or [], bound=bound)


@settings(max_examples=60, deadline=None)
@example([2.0, 1.0, 1.0, 1.0, 0.9375, 2.0, 2.0, 2.0, 39.0], 210.0, 9846)  # kept by a hair, as predicted
@example([104.0, 22.0, 0.0001, 0.0001, 1.0, 0.0001], 0.0, 0)  # channels that stay zero in their group
@example([58.0, 3.0, 0.00390625], 1.0, 0)  # a constant that is the largest of its group is not rounded at all
@given(st.lists(st.floats(1e-4, 1e4), min_size=2, max_size=12), st.floats(0, 1000), st.integers(0, 2**31 - 1))
def test_what_is_called_lost_is_lost_and_would_be_kept_by_a_scale_of_its_own(
    sizes: list[float], offset: float, seed: int
) -> None:
    """Whatever the magnitudes of the channels: numpy finds the error of that part as large as its spread."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, len(sizes))) * np.array(sizes) + offset * rng.integers(0, 2, size=len(sizes))
    step = np.abs(x).max() / 127
    for population in _found(x, step):
        part = x[:, list(population.indices)]
        error = _rounded(part, step) - part
        # of a channel that even a scale of its own shows as a constant, the value counts, else what varies
        own_error = len(part) * (np.abs(part).max(0) / 127) ** 2 / 12
        varying = ((part - part.mean(0)) ** 2).sum(0)
        constant = varying <= KEPT * own_error
        spread = np.where(constant, (part**2).sum(0), varying).sum()
        moved = np.where(constant, (error**2).sum(0), ((error - error.mean(0)) ** 2).sum(0)).sum()
        assert moved >= 0.99 * LOST_SHARE * spread
        own = np.abs(part).max(0) / 127
        apart = np.round(part / own) * own
        # the noise of 200 values is the predicted one within a fifth, which is three standard errors
        assert ((apart - part) ** 2).sum() < 1.2 * spread / 4
        assert population.largest == pytest.approx(np.abs(part).max())
        if population.apart:
            rest = np.delete(np.abs(x).max(0), list(population.indices))
            assert rest.min() >= 2**LEAST_GAP * population.largest
        if population.groups and population.group_error < 1 / 8:
            grouped = np.concatenate(
                [_rounded(g, np.abs(g).max() / 127) for g in np.split(x, np.cumsum(population.groups)[:-1], axis=1)], 1
            )[:, list(population.indices)]
            measured = np.sqrt(((grouped - part) ** 2).sum() / spread)
            # Noise is predicted. A constant errs by anything up to half a step, which is the root of 3 times of noise;
            # a channel below half a step becomes zero and errs by its size.
            magnitudes = np.abs(x).max(0)
            groups = np.split(magnitudes, np.cumsum(population.groups)[:-1])
            steps = np.repeat([group.max() / 127 for group in groups], population.groups)
            vanishes = (magnitudes < steps / 2)[list(population.indices)]
            least, most = (0.0 if constant.any() or vanishes.any() else 0.5), (3**0.5 if constant.any() else 1.5)
            assert least * population.group_error <= measured <= 1.01 * most * population.group_error


@pytest.mark.parametrize(("factor", "lost"), [(1000.0, True), (300.0, True), (20.0, False), (1.0, False)])
def test_scores_beside_boxes(factor: float, lost: bool) -> None:
    """As the ratio shrinks, the part is kept."""
    rng = np.random.default_rng(0)
    x = rng.random((64, 8)) * np.array([factor] * 4 + [1.0] * 4)
    parts = [JoinedPart(1, 0, 4, "boxes"), JoinedPart(1, 4, 8, "scores")]
    found = _found(x, factor / 127, parts)
    assert [(p.indices, p.maker) for p in found] == ([((4, 5, 6, 7), "scores")] if lost else [])
    if lost:
        assert found[0].groups == (4, 4)
        assert found[0].zero == (factor >= 300)


def test_classes_that_are_rare_are_not_lost() -> None:
    """Probabilities have a range of their own: below one part in eight of it nothing has to be told apart."""
    rng = np.random.default_rng(0)
    x = rng.random((64, 10)) * np.array([1.0] * 5 + [0.003] * 5)
    assert [p.apart for p in _found(x, 1 / 127)] == [True]
    assert _found(x, 1 / 127, bound=1.0) == ()
    parts = [JoinedPart(1, 0, 5, "often", 1.0), JoinedPart(1, 5, 10, "rare", 1.0)]
    assert _found(x, 1 / 127, parts, bound=1.0) == ()
    wide = x * np.array([300.0] * 5 + [1.0] * 5)  # beside boxes the same scores are lost
    assert [p.maker for p in _found(wide, 300 / 127, [JoinedPart(1, 0, 5, "boxes"), *parts[1:]])] == ["rare"]


def test_healthy_tensors_have_no_lost_part() -> None:
    """Zeros, constants, jitter of constants, a channel in many, magnitudes without a gap, and tiny remainders."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 32))
    for change in (
        lambda x: x,
        lambda x: np.where(np.arange(32) < 16, 0.0, x),
        lambda x: np.where(np.arange(32) < 16, 1.0, x * 2),
        lambda x: np.where(np.arange(32) < 16, 1 + 1e-6 * x, x * 2),
        lambda x: np.where(np.arange(32) < 1, 1e-4 * x, x),
        lambda x: x * 2.0 ** -np.arange(32),
        lambda x: np.where(np.arange(32) < 16, 1e-9 * x, x),
    ):
        changed = change(x)
        assert not [p for p in _found(changed, np.abs(changed).max() / 127) if p.apart]


def test_small_spread_around_a_large_mean_is_lost_to_a_larger_channel() -> None:
    """A temperature in kelvin beside a pressure in pascal: not small in energy, but one code."""
    rng = np.random.default_rng(0)
    x = np.stack([293 + 10 * rng.normal(size=500), 101325 + 1000 * rng.normal(size=500)], 1)
    (found,) = _found(x, np.abs(x).max() / 127)
    assert (found.indices, found.groups, found.zero) == ((0,), (1, 1), True)


def test_axis_of_a_join_is_told_from_the_shapes() -> None:
    def axes(shape: tuple[int, ...], *operands: tuple[int, ...]) -> list[tuple[int, int, int]]:
        return [(p.axis, p.start, p.stop) for p in joined_parts(shape, [(s, "", None) for s in operands])]

    assert axes((2, 5, 4), (2, 5, 1), (2, 5, 3)) == [(2, 0, 1), (2, 1, 4)]
    assert axes((2, 3, 5), (2, 5), (2, 5), (2, 5)) == [(1, 0, 1), (1, 1, 2), (1, 2, 3)]
    assert axes((2, 2), (2,), (2,)) == []  # stacked along either
    assert axes((2, 5), (1, 5), (2, 1)) == []  # broadcast
