"""Leaders that broke away (D4)."""

from __future__ import annotations

import math

import pytest

from lightning_qat.quantization.numerics.break_away import break_away

SOURCE_INT8 = [1.79371, 1.46594, 0.352401, 0.246953, 0.22353, 0.214513, 0.185211, 0.1826, 0.166937]
SOURCE_INT16 = [0.82213, 0.184159, 0.131423, 0.111852, 0.0930651, 0.0887103, 0.0728263, 0.0689369]


def test_leaders_of_the_source() -> None:
    """D4: ref_point_quant and dim_t_quant at int8; dim_t_quant alone at int16."""
    assert break_away(SOURCE_INT8) == 2
    assert break_away(SOURCE_INT16) == 1


@pytest.mark.parametrize(
    ("values", "leaders"),
    [([], 0), ([1.0], 0), ([4.0, 1.0], 1), ([1.9, 1.0], 0), ([1.0, 0.0, 0.0], 1), ([0.0, 0.0], 0)],
)
def test_short_and_zero_lists(values: list[float], leaders: int) -> None:
    assert break_away(values) == leaders


def test_gap_in_the_tail_means_nothing() -> None:
    assert break_away([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 1e-6]) == 0


def test_nan_is_ahead_of_everything() -> None:
    assert break_away([math.nan, 2.0, 1.9, 1.8]) == 1
