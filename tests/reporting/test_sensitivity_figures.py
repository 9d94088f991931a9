"""Figures of sensitivity and layer comparison: what is drawn is what the results say."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_qat.analysis.comparison.comparison_result import LayerComparisonResult, LayerComparisonRow
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult, SensitivityRow
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.reporting.sensitivity_figures import (
    log_figure,
    sensitivity_bars,
    sensitivity_over_epochs,
    sqnr_by_depth,
    write_figure,
)


def sensitivities(*scores: float, exact: bool = True) -> SensitivityResult:
    rows = [
        SensitivityRow(f"op{i}", "activation", "relu", s, "int8", f"op{i}.output", s, exact)
        for i, s in enumerate(scores)
    ]
    return SensitivityResult(tuple(rows), output="the whole output", points=len(rows))


def comparison(*decibels: tuple[float, float | None]) -> LayerComparisonResult:
    numbers: dict[str, Any] = dict.fromkeys(LayerComparisonRow.__dataclass_fields__)
    rows = [
        LayerComparisonRow(
            **{**numbers, "index": i, "mod_name": f"op${i}", "base_op_type": "relu", "SQNR": a, "own_SQNR": o}
        )
        for i, (a, o) in enumerate(decibels)
    ]
    return LayerComparisonResult(tuple(rows))


def test_bars_are_the_scores_and_the_gap_is_marked() -> None:
    """D4."""
    axes = sensitivity_bars(sensitivities(0.2, 1.8, 0.3, 1.5, 0.25, 0.2, 0.19, 0.18)).axes[0]
    bars = [patch.get_width() for patch in axes.patches]  # type: ignore[attr-defined]
    assert bars[:8] == sorted([0.2, 1.8, 0.3, 1.5, 0.25, 0.2, 0.19, 0.18], reverse=True)
    assert axes.get_yticklabels()[0].get_text() == "op1.output  int8"
    assert axes.lines[0].get_ydata()[0] == 1.5  # type: ignore[index]
    assert axes.texts[0].get_text() == "2 broke away: 5 times the next"
    assert axes.get_xscale() == "linear"
    assert sensitivity_bars(sensitivities(1.0, 1e-4)).axes[0].get_xscale() == "log"


def test_no_gap_is_marked_where_there_is_none() -> None:
    axes = sensitivity_bars(sensitivities(1.0, 0.9, 0.8, exact=False)).axes[0]
    assert not axes.lines
    assert not axes.texts


def test_depth_shows_own_and_accumulated() -> None:
    axes = sqnr_by_depth(comparison((50.0, 50.0), (30.0, 30.0), (28.0, 45.0), (math.inf, None))).axes[0]
    accumulated, own = (list(line.get_ydata()) for line in axes.lines)
    assert accumulated == [50.0, 30.0, 28.0, 120.0]  # what is exact is drawn at the upper end
    assert own == [50.0, 30.0, 45.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["op$0", "op$1", "op$2", "op$3"]


def test_depth_of_a_long_model_names_the_lowest_only() -> None:
    values = [(40.0 - (i == 20) * 20, 40.0 - (i == 20) * 20) for i in range(100)]
    axes = sqnr_by_depth(comparison(*values)).axes[0]
    assert axes.texts[0].get_text() == "op$20"
    assert len(axes.texts) <= 3


def test_epochs_that_did_not_measure_a_point_have_no_dot() -> None:
    first, last = sensitivities(2.0, 1.0), sensitivities(1.0, 0.5, 0.1)
    axes = sensitivity_over_epochs({0: first, 3: last}).axes[0]
    lines = {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines["op0.output"] == ([0, 3], [2.0, 1.0])
    assert lines["op2.output"] == ([3], [0.1])
    with pytest.raises(ConfigurationError, match="no sensitivity of an epoch"):
        sensitivity_over_epochs({})


def test_figures_survive_odd_numbers(tmp_path: Path) -> None:
    odd = sensitivities(math.nan, 0.0, math.inf, 1.0)
    named = replace(odd, rows=tuple(replace(row, point="a$b_" * 30) for row in odd.rows))
    for number, figure in enumerate(
        [sensitivity_bars(named), sensitivity_bars(sensitivities(0.0)), sqnr_by_depth(comparison((math.nan, None)))]
    ):
        assert write_figure(figure, tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


def test_loggers_that_show_no_figures_are_left_out() -> None:
    class Experiment:
        def __init__(self) -> None:
            self.figures: list[str] = []

        def add_figure(self, tag: str, figure: Any, global_step: int, close: bool) -> None:
            self.figures.append(f"{tag} {global_step} {close}")

    class Logger:
        def __init__(self, experiment: Any) -> None:
            self.experiment = experiment

    shown = Experiment()
    log_figure([Logger(shown), Logger(object()), object()], "a/b", sensitivity_bars(sensitivities(1.0)), 7)
    assert shown.figures == ["a/b 7 False"]


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'lightning-qat\[plots\]'"):
        sqnr_by_depth(comparison((1.0, 1.0)))
