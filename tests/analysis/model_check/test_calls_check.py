"""The ranges of the calls of what is shared (A5)."""

from __future__ import annotations

import pytest

from lightning_qat.analysis.model_check.calls_check import _Calls
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize


@pytest.mark.parametrize(
    ("ranges", "ratio"),
    [
        (((0.0, 0.0), (-1.0, 1.0), (-2.0, 2.0)), 2.0),
        (((0.0, 0.0), (-1.0, 1.0)), 1.0),
        (((0.0, 0.0), (0.0, 0.0)), 1.0),
        (((-1.0, 1.0), (-8.0, 2.0)), 8.0),
    ],
)
def test_call_that_sees_only_zeros_fits_any_scale(ranges: tuple[tuple[float, float], ...], ratio: float) -> None:
    """Number ten: the first state of a recurrent net is zero; siblings: padding, a branch that starts at zero."""
    points = (FakeQuantize(dtype="int8"),) * len(ranges)
    assert _Calls("state", points, ranges, True).ratio == ratio
