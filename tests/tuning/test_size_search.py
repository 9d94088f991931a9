"""The search for a size: against a list that says which sizes pass."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_qat.tuning.size_search import smallest_passing


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
def test_boundary_is_found_where_sizes_pass_from_one_on(most: int, boundary: int, start: int) -> None:
    """Four evaluations to find one that passes, halving 300 down, and one step more."""
    found = smallest_passing(most, lambda size: size >= boundary, start, evaluations=20)
    assert found.passing == (boundary if boundary <= most else None)
    assert all(1 <= size <= most for size in found.evaluated)


@given(st.integers(1, 500), st.sets(st.integers(1, 500)), st.integers(1, 500), st.integers(1, 8))
def test_never_more_evaluations_than_allowed_and_no_size_twice(
    most: int, passing: set[int], start: int, evaluations: int
) -> None:
    calls: list[int] = []

    def passes(size: int) -> bool:
        calls.append(size)
        return size in passing

    found = smallest_passing(most, passes, start, evaluations)
    assert len(calls) == len(set(calls)) <= evaluations
    assert list(found.evaluated) == calls
    if found.passing is not None:
        assert found.evaluated[found.passing]
        assert not any(ok for size, ok in found.evaluated.items() if size < found.passing)
    if found.failing is not None:
        assert not found.evaluated[found.failing]


def test_the_largest_size_is_tried_within_eight_evaluations() -> None:
    found = smallest_passing(300, lambda size: size >= 200, 1)
    assert found.passing is not None
    assert len(found.evaluated) <= 8


def test_last_step_goes_down_where_the_metric_is_noisy() -> None:
    """Where evaluations are left, one size less is tried at the end."""
    assert smallest_passing(20, {11, 12, 16}.__contains__, 8, 5).evaluated == {
        8: False,
        16: True,
        12: True,
        10: False,
        11: True,
    }
    assert smallest_passing(2, {1, 2}.__contains__, 2).passing == 1
