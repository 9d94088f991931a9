"""The tags of the numbers and tables that go to TensorBoard and other loggers at the end of an epoch.

===================================  =====================================================
``sensitivity.score/<point>``        a number of one point, drawn as a curve: of the worst
                                     points, and with ``per_point`` of all
``layer_statistics.count/<word>``    how many points a column calls so
``sensitivity/score``                the same number of all points (a histogram)
``sensitivity``                      the first rows of the table (text)
``sensitivity/max_score``            a number of the worst point, logged by ``self.log``
===================================  =====================================================

The part of a tag before the slash is a group of its own in TensorBoard: the hundreds of curves of a column fold into
one line there. ``<point>`` is preceded by the path of the quantized module unless that is the model itself.
The texts of the other callbacks have the name of their file as tag, such as ``pipeline_check`` and ``convergence``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_qat.analysis.results import Result
from lightning_qat.reporting.plain_text import one_line

_WORST, _MOST = 5, 10
"""Points of a column that get a curve in an epoch, and in the whole run."""


@dataclass(frozen=True)
class Worst:
    """Which points have curves of their own by default.

    Args:
        column: what decides.
        largest: whether large values are bad; of signed numbers, the largest without its sign.
        also: further columns of these points.
    """

    column: str
    largest: bool
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tags:
    """What of an analysis goes to the loggers.

    Args:
        name: first part of the tags.
        curves: columns with one curve per point.
        histograms: columns whose distribution over all points is shown.
        table: columns of the table; the result's short selection if not given.
        point: column with the name of the point.
        worst: which points have curves by default.
        counted: columns of words; the number of points with each word is a curve.
    """

    name: str
    curves: tuple[str, ...] = ()
    histograms: tuple[str, ...] = ()
    table: tuple[str, ...] = ()
    point: str = "point"
    worst: tuple[Worst, ...] = ()
    counted: tuple[str, ...] = ()

    def with_curves(self, columns: Sequence[str]) -> Tags:
        """The same with other columns as curves."""
        return replace(self, curves=tuple(columns))

    def numbers(self, result: Result[Any]) -> dict[str, float]:
        """One number per point and column: ``<name>.<column>/<point>``. Missing values (None) are left out.

        The tags of a row depend only on its names, so they are the same every time. Rounds of a loop have no curves.

        Example:
            >>> from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult, SensitivityRow
            >>> row = SensitivityRow("fc", "weight", "linear", 0.5, "int8", "fc.weight", 0.7, True)
            >>> sensitivity_tags("MSE").numbers(SensitivityResult((row,)))
            {'sensitivity.MSE/fc.weight': 0.5, 'sensitivity.score/fc.weight': 0.7}
        """
        found = {}
        for row in result.to_dicts():
            point = self.full_name(row)
            for column in self.curves if not row.get("loop") else ():
                if row[column] is not None:
                    found[f"{self.name}.{column}/{one_line(point)}"] = float(row[column])
        return found

    def full_name(self, row: Mapping[str, Any]) -> str:
        """The name of a row's point, with the path of its region."""
        return f"{row['region']}.{row[self.point]}" if row["region"] else str(row[self.point])

    def counts(self, result: Result[Any]) -> dict[str, float]:
        """How many points each word of the counted columns stands for: ``<name>.count/<word>``."""
        found = Counter(row[column] for row in result.to_dicts() for column in self.counted if row[column])
        return {f"{self.name}.count/{word}": float(number) for word, number in sorted(found.items())}

    def distributions(self, result: Result[Any]) -> Iterator[tuple[str, list[float | None]]]:
        """The values of all points: ``<name>/<column>``."""
        rows = result.to_dicts()
        return ((f"{self.name}/{column}", [row[column] for row in rows]) for column in self.histograms)


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


LAYER_STATISTICS = Tags(
    "layer_statistics",
    curves=(
        "scale", "min", "max", "mean", "var", "clipped_share", "used_share", "level_occupancy", "rounding_energy",
        "clipping_energy", "scale_drift", "flip_rate", "sqnr",
    ),
    histograms=("clipped_share", "sqnr"),
    table=("point", "dtype", "scale", "min", "max", "clipped_share", "used_share", "sqnr", "scale_drift", "flip_rate"),
    worst=(Worst("clipped_share", True), Worst("sqnr", False), Worst("scale_drift", True), Worst("flip_rate", True)),
    counted=("error_source",),
)  # fmt: skip

LAYER_COMPARISON = Tags(
    "layer_comparison",
    curves=("SQNR", "own_SQNR", "max_qscale_diff"),
    histograms=("SQNR", "own_SQNR"),
    table=("mod_name", "analy_op_type", "quant_dtype", "qscale", "SQNR", "own_SQNR", "max_qscale_diff", "origin"),
    point="mod_name",
    worst=(Worst("own_SQNR", False), Worst("SQNR", False)),
    counted=("origin",),
)

WHAT_TO_DO = Tags("layer_comparison/what_to_do", table=("point", "verdict", "evidence", "action", "yaml"))
"""The diagnosis, which has no curves."""

MODEL_CHECK = "model_check"
"""Tag of the model check, which is one text."""

RESULT_TABLE = "result_table"
"""Tag of the accuracy table, which is one text."""


def sensitivity_tags(metric: str) -> Tags:
    """What of a sensitivity analysis goes to the loggers.

    Args:
        metric: the metric of its table.
    """
    worst = (Worst("score", True, also=(metric,)),)
    return Tags("sensitivity", curves=(metric, "score"), histograms=(metric, "score"), worst=worst)


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
