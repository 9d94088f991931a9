"""The data that the page's script draws: plain lists, one entry per point in the order of the table of points."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from lightning_qat.atomic_files import json_value
from lightning_qat.reporting.html.drawings import depth, graph, histograms, short
from lightning_qat.reporting.html.findings import measured_on
from lightning_qat.reporting.html.front import front_chart
from lightning_qat.reporting.html.glossary import ANCHORS
from lightning_qat.reporting.html.point_history import point_key
from lightning_qat.reporting.html.point_table import COLUMNS, PointTable
from lightning_qat.reporting.html.provenance import overrides_place
from lightning_qat.reporting.html.run_folder import RunFolder
from lightning_qat.reporting.plain_text import one_line, printable

_MOST_CELLS = 2_000_000
"""Cells of all series together. Of more, epochs are left out: a page of 10,000 points stays usable."""


def page_data(run: RunFolder, points: PointTable, flagged: Collection[str] = ()) -> dict[str, Any]:
    """Return everything the script needs.

    Args:
        run: the files of the run.
        points: its points.
        flagged: names of the points that something is said against.
    """
    latest = {point_key(row.region, row.point) for row in run.diagnosis.rows} if run.diagnosis is not None else set()
    return {
        "run": one_line(run.name),
        "points": {
            "columns": [{**vars(column), "anchor": ANCHORS[column.label]} for column in COLUMNS],
            "rows": [list(map(_cell, row)) for row in points.rows],
            "flagged": [place for place, name in enumerate(points.names) if name in flagged],
        },
        "advice": {
            str(place): {
                **{name: printable(getattr(row, name)) for name in ("evidence", "action", "yaml")},
                "measured": measured_on(run, "diagnosis" if key in latest else "calibrated_diagnosis"),
            }
            for place, key in enumerate(points.keys)
            if (row := points.diagnoses.get(key)) is not None and row.verdict != "fine"
        },
        "place": overrides_place(run.provenance),
        "series": _series(run, points),
        "histograms": histograms(run, points),
        "depth": depth(run, points),
        "graph": graph(run, points),
        "front": front_chart(run),
    }


def as_json_element(data: Mapping[str, Any]) -> str:
    """Return data as JSON for a script element: no character in it means anything in HTML.

    Example:
        >>> print(as_json_element({"name": "</script>&"}))
        {"name":"\\u003c/script\\u003e\\u0026"}
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: line separators, surrogates are escapes
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _cell(value: Any) -> Any:
    return one_line(value) if isinstance(value, str) else json_value(value)


def _series(run: RunFolder, points: PointTable) -> dict[str, Any]:
    """Columns over the epochs, from both growing tables, each with its epochs."""
    found = {}
    for history in (run.statistics, run.sensitivity):
        columns = [column for column, values in history.series.items() if _is_worth_it(values.values())]
        stride = max(1, math.ceil(len(columns) * len(points.keys) * len(history.epochs) / _MOST_CELLS))
        kept = sorted({*range(0, len(history.epochs), stride), max(0, len(history.epochs) - 1)})
        for column in columns:
            values = history.series[column]
            rows = [[short(values[key][place]) for place in kept] if key in values else [] for key in points.keys]
            found[column] = {"epochs": [history.epochs[place] for place in kept], "values": rows}
    return found


def _is_worth_it(rows: Any) -> bool:
    """Whether any point has a value."""
    return any(value is not None for row in rows for value in row)
