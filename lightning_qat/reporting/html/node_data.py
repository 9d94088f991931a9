"""A column of the table of all points as node data for Google's Model Explorer, which colours a graph with it.

The keys are names of points: in an ONNX file of ``lightning_qat.export_onnx`` they are the names of the tensors behind
DequantizeLinear, by which Model Explorer finds its nodes. Format: ``node_data_builder.py`` of
https://github.com/google-ai-edge/model-explorer.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lightning_qat.atomic_files import write_atomically
from lightning_qat.quantization.errors import unknown_choice
from lightning_qat.reporting.html.point_table import COLUMNS, PointTable
from lightning_qat.reporting.plain_text import file_name

_GRADIENT = ({"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#0072b2"})
_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#999999")
"""Of words; people who are colour-blind can tell them apart."""


def node_data(points: PointTable, column: str) -> dict[str, Any]:
    """Return a column as node data.

    Args:
        points: of a run.
        column: one of the columns of the table of all points, such as ``score``, ``clipped_share`` or ``dtype``.

    Raises:
        ConfigurationError: there is no such column.

    Example:
        >>> cells = {"point": "fc.weight", "score": 0.5}
        >>> row = tuple(cells.get(column.key) for column in COLUMNS)
        >>> node_data(PointTable((("", "fc.weight"),), (row,)), "score")["results"]
        {'fc.weight': {'value': 0.5}}
    """
    choices = [one.key for one in COLUMNS]
    if column not in choices:
        raise unknown_choice("column", column, choices)
    values = {name: value for name, value in zip(points.names, points.column(column), strict=True) if value is not None}
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    if numbers:
        finite = {name: {"value": float(value)} for name, value in numbers.items() if math.isfinite(value)}
        return {"results": finite, "gradient": list(_GRADIENT)}
    words = {word: _COLOURS[place % len(_COLOURS)] for place, word in enumerate(sorted(set(values.values())))}
    return {"results": {name: {"value": word, "bgColor": words[word]} for name, word in values.items()}}


def write_node_data(points: PointTable, column: str, directory: str | os.PathLike[str]) -> Path:
    """Write a column as ``node_data_<column>.json``.

    Args:
        points: of a run.
        column: see :func:`node_data`.
        directory: where to.
    """
    text = json.dumps(node_data(points, column), indent=1, allow_nan=False) + "\n"
    return write_atomically(Path(directory) / f"node_data_{file_name(column)}.json", text)
