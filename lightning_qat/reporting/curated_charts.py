"""The few charts of an analysis that loggers get by default: the worst points over the epochs, counts, a layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_qat.analysis.results import Result
from lightning_qat.reporting.plain_text import one_line
from lightning_qat.reporting.tensorboard_tags import LAYER_COMPARISON, LAYER_STATISTICS, Tags, Worst, sensitivity_tags

_WORST, _MOST = 5, 10
"""Points of a column that get a curve in an epoch, and in the whole run."""


class WorstPoints:
    """The points of an analysis that have curves. A point that has been among the worst once keeps its curve.

    Args:
        tags: of the analysis.
    """

    def __init__(self, tags: Tags) -> None:
        self._tags = tags
        self._chosen: dict[str, dict[str, None]] = {}

    def numbers(self, result: Result[Any]) -> dict[str, float]:
        """Return the curves of the worst points, ``<name>.<column>/<point>``, and the counts.

        Args:
            result: what was found now.
        """
        rows = {self._tags.full_name(row): row for row in result.to_dicts() if not row.get("loop")}
        found: dict[str, float] = {}
        for worst in self._tags.worst:
            for point in self._followed(worst, rows):
                for column in (worst.column, *worst.also):
                    if point in rows and rows[point].get(column) is not None:
                        found[f"{self._tags.name}.{column}/{one_line(point)}"] = float(rows[point][column])
        return {**found, **self._tags.counts(result)}

    def chosen(self, column: str) -> tuple[str, ...]:
        """The points that are followed because of a column."""
        return tuple(self._chosen.get(column, ()))

    def _followed(self, worst: Worst, rows: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
        chosen = self._chosen.setdefault(worst.column, {})
        for point in _worst_of(worst, rows):
            if len(chosen) < _MOST:
                chosen[point] = None
        return chosen


def _worst_of(worst: Worst, rows: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """The worst points first. NaN is the worst, and a number that is best possible (0, or infinite) is none."""
    values = {point: row.get(worst.column) for point, row in rows.items()}
    bad = {point: _badness(float(value), worst.largest) for point, value in values.items() if value is not None}
    return sorted((point for point in bad if bad[point] > -math.inf), key=lambda point: -bad[point])[:_WORST]


def _badness(value: float, largest: bool) -> float:
    if math.isnan(value):
        return math.inf
    if largest:
        return abs(value) or -math.inf
    return -value


def layout() -> dict[str, dict[str, list[Any]]]:
    """Return the layout of TensorBoard's tab of custom scalars: the worst points of a column in one chart."""
    charts: dict[str, dict[str, list[Any]]] = {}
    for title, tags in (
        ("values and errors of points", LAYER_STATISTICS),
        ("sensitivity", sensitivity_tags("MSE")),
        ("beside the float model", LAYER_COMPARISON),
    ):
        columns = {worst.column: [rf"^{tags.name}\.{worst.column}/"] for worst in tags.worst}
        charts[title] = {f"worst points: {column}": ["Multiline", tag] for column, tag in columns.items()}
        if tags.counted:
            charts[title]["number of points"] = ["Multiline", [rf"^{tags.name}\.count/"]]
    return charts
