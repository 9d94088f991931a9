"""The figure of a front: what stands in it, looked up in matplotlib's own objects."""

from __future__ import annotations

import math

import pytest

from lightning_qat.analysis.mixed_precision.precision_choice import FrontRow, PrecisionFront
from lightning_qat.reporting.precision_figures import error_against_cost

pytest.importorskip("matplotlib", reason="the extra `plots`")


def front(*rows: tuple[float, float, tuple[str, ...]]) -> PrecisionFront:
    made = [
        FrontRow(i, i / 10, cost, 10 ** (-sqnr / 10), sqnr, 0.0, sqnr > 0, added)
        for i, (cost, sqnr, added) in enumerate(rows)
    ]
    return PrecisionFront(tuple(made), cost_name="bops")


def test_every_choice_is_drawn_and_the_first_steps_are_named() -> None:
    rows = front(
        (1.0, -2.0, ()), (1.1, 10.0, ("a$b$.output", "c")), (1.4, 20.0, ("d.weight",)), (4.0, math.inf, ("e",))
    )
    figure = error_against_cost(rows, chosen=2)
    (axes,) = figure.axes
    assert axes.get_lines()[0].get_xydata().tolist() == [[1.0, -2.0], [1.1, 10.0], [1.4, 20.0]]
    assert axes.texts[0].get_text().splitlines() == ["raised first:", "1  a$b$.output and 1 more", "2  d.weight"]
    assert axes.get_xlabel() == "bit operations, relative to the narrowest types"
    assert figure.legends[0].get_texts()[0].get_text() == "chosen: 2 points"
    figure.canvas.draw()  # names are no mathematics
