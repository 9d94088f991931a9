"""What the charts of the page draw: histograms, the error along the depth, the graph of ops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_qat.analysis.diagnosis.judgement import allowed_error
from lightning_qat.analysis.results import Block
from lightning_qat.atomic_files import json_value
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.numerics.dtypes import quant_dtype
from lightning_qat.quantization.planning.deployed_part import TRAIN_ONLY
from lightning_qat.quantization.planning.planner import FUSED_INTO
from lightning_qat.reporting.html.point_history import PointKey, full_name, point_key
from lightning_qat.reporting.html.point_table import PointTable
from lightning_qat.reporting.html.run_folder import RunFolder
from lightning_qat.reporting.plain_text import one_line

JUMP = 6.0
"""Decibels (one bit). The first place where the ratio falls so far below the lowest before it is marked."""
_DIGITS = 4


def short(value: Any) -> Any:
    """Return a number with the digits that a drawing needs.

    Example:
        >>> short(0.123456), short(None), short(12345678.9), short(2.0)
        (0.1235, None, 12350000, 2)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if not math.isfinite(value):
        return str(value)
    number = float(f"{value:.{_DIGITS}g}")
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def histograms(run: RunFolder, points: PointTable) -> list[list[Any] | None]:
    """Return, for each point, the first code, codes per bin, counts, and what is clipped below and above.

    Args:
        run: the files of the run.
        points: its points.
    """
    held = run.statistics_table.about.get("histograms")
    found: dict[PointKey, list[Any]] = {}
    for one in held if isinstance(held, list) else []:
        if isinstance(one, dict) and isinstance(one.get("counts"), list):
            numbers = [one.get(name) for name in ("first_code", "codes_per_bin", "counts", "below", "above")]
            found[point_key(one.get("region"), one.get("point"))] = json_value(numbers)
    return [found.get(key) for key in points.keys]


def depth(run: RunFolder, points: PointTable) -> dict[str, Any]:
    """Return the signal to noise ratio along the execution order, and where it jumps first.

    Taken from the layer comparison, which knows what is inherited; without one, of each point alone.

    Args:
        run: the files of the run.
        points: its points.
    """
    places = {key: place for place, key in enumerate(points.keys)}
    rows = [row for row in run.comparison.rows if row.get("base_op_type") != "weight" and _number(row.get("SQNR"))]
    if rows:
        return {
            "names": [one_line(_tensor(row)) for row in rows],
            "points": [places.get(point_key(row.get("region"), row.get("point") or "")) for row in rows],
            "accumulated": [short(row.get("SQNR")) for row in rows],
            "own": [short(row.get("own_SQNR")) for row in rows],
            "low": _low([row.get("own_SQNR") for row in rows], [row.get("quant_dtype") for row in rows]),
            "jump": first_jump([row.get("SQNR") for row in rows]),
        }
    own, names = points.column("sqnr"), points.names
    kept = [place for place, value in enumerate(own) if _number(value)]
    return {
        "names": [one_line(names[place]) for place in kept],
        "points": kept,
        "accumulated": [],
        "own": [short(own[place]) for place in kept],
        "low": _low([own[place] for place in kept], [points.column("dtype")[place] for place in kept]),
        "jump": None,
    }


def _low(own: list[Any], dtypes: list[Any]) -> list[int]:
    """The places whose own error is larger than the diagnosis calls fine for their type, the worst first."""
    limits = [fine_ratio(dtype) if isinstance(dtype, str) else None for dtype in dtypes]
    found = [(v, p) for p, (v, limit) in enumerate(zip(own, limits, strict=True)) if _number(v) and limit and v < limit]
    return [place for _, place in sorted(found)]


def fine_ratio(dtype: str) -> float | None:
    """Return the signal to noise ratio, in dB, from which on the diagnosis calls a point fine.

    Args:
        dtype: its type; None is returned for one that is not quantized, or that a damaged file holds.

    Example:
        >>> [fine_ratio(dtype) for dtype in ("int8", "float32")]
        [30.102999566398122, None]
    """
    try:
        return -20 * math.log10(allowed_error(quant_dtype(dtype).bits))
    except ConfigurationError:
        return None


def first_jump(values: list[Any]) -> int | None:
    """Return the first place where a value falls by :data:`JUMP` below the lowest before it; None without one.

    Example:
        >>> first_jump([50.0, 48.0, 47.0, 38.0, 20.0])
        3
    """
    lowest = math.inf
    for place, value in enumerate(values):
        if not _number(value):
            continue
        if value <= lowest - JUMP and lowest < math.inf:
            return place
        lowest = min(lowest, value)
    return None


def graph(run: RunFolder, points: PointTable) -> dict[str, Any]:
    """Return all ops in execution order: name, torch function, type in effect, producers, point of the result.

    Args:
        run: the files of the run.
        points: its points.
    """
    places = {key: place for place, key in enumerate(points.keys)}
    ops: list[list[Any]] = []
    for region, held in run.regions.items():
        numbers = {str(op.get("name")): len(ops) + place for place, op in enumerate(held.get("ops", []))}
        dtypes, results = _types(held)
        floats, fused = _float_ops(run, region, held), _fused(held)
        for op in held.get("ops", []):
            name = str(op.get("name"))
            inputs = op.get("inputs") if isinstance(op.get("inputs"), list) else []
            ops.append(
                [
                    one_line(full_name((region, name))),
                    one_line(str(op.get("op_type"))),
                    "float" if name in floats else dtypes.get(fused.get(name, name), ""),
                    [numbers[source] for source in inputs if isinstance(source, str) and source in numbers],
                    places.get(point_key(region, results.get(name, ""))),
                    one_line(floats.get(name, "")),
                ]
            )
    return {"ops": ops, "op_of_point": _op_of_point(run, points, {op[0]: place for place, op in enumerate(ops)})}


def segments(run: RunFolder) -> tuple[Block, ...]:
    """Return the model check's tables of the segments of the deployed model.

    Args:
        run: the files of the run.
    """
    sections = run.model_check.sections if run.model_check is not None else ()
    return tuple(
        Block(f"Segments of {section.region}" if section.region else "Segments", section.columns, section.rows)
        for section in sections
        if section.title.startswith("Segments of the deployed model")
    )


def _float_ops(run: RunFolder, region: str, held: Mapping[str, Any]) -> dict[str, str]:
    """The ops that compute in float32, with the reason. Without a model check, what the plan does not quantize."""
    if run.model_check is not None:
        return {
            str(row[0]): str(row[-1])
            for section in run.model_check.sections
            if section.region == region and "float32 inputs" in section.columns
            for row in section.rows
        }
    ops = ((str(op.get("name")), str(op.get("reason") or ""), op.get("status")) for op in held.get("ops", []))
    return {name: reason for name, reason, status in ops if status == "float" and reason != TRAIN_ONLY}


def _types(held: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """The type of each op, that of its result if there is a choice; and the point of its result."""
    dtypes: dict[str, str] = {}
    results: dict[str, str] = {}
    for point in held.get("points", []):
        op = str(point.get("op"))
        if point.get("role") == "output":
            results[op] = str(point.get("name"))
        if point.get("role") == "output" or op not in dtypes:
            dtypes[op] = str(point.get("dtype"))
    return dtypes, results


def _fused(held: Mapping[str, Any]) -> dict[str, str]:
    """The op that another one runs in: both compute in one type."""
    found = {str(op.get("name")): str(op.get("reason") or "") for op in held.get("ops", [])}
    return {name: text.removeprefix(FUSED_INTO) for name, text in found.items() if text.startswith(FUSED_INTO)}


def _op_of_point(run: RunFolder, points: PointTable, numbers: Mapping[str, int]) -> list[int | None]:
    ops = {}
    for region, held in run.regions.items():
        for point in held.get("points", []):
            name = str(point.get("op"))
            ops[point_key(region, point.get("name"))] = numbers.get(one_line(full_name((region, name))))
    return [ops.get(key) for key in points.keys]


def _tensor(row: Mapping[str, Any]) -> str:
    return full_name((row.get("region") or "", str(row.get("mod_name"))))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
