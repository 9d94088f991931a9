"""One source: the terminal, TensorBoard, the txt, the csv, the json and the page of a run say the same of every result.

The numbers are read back out of each rendering and compared with those of the result, to the digits that it shows.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from lightning_qat.analysis.comparison.comparison_result import LayerComparisonResult, LayerComparisonRow
from lightning_qat.analysis.convergence.convergence import ConvergenceResult
from lightning_qat.analysis.convergence.training_series import ConvergenceRow
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.rows import PipelineRow
from lightning_qat.analysis.results import Result
from lightning_qat.analysis.runs.accuracy import ResultTable
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult
from lightning_qat.analysis.statistics.statistics import LayerStatisticsResult
from lightning_qat.reporting.accuracy_table_files import OWN_TABLE
from lightning_qat.reporting.console import console_text
from lightning_qat.reporting.files import write_json, write_result
from lightning_qat.reporting.growing_table import GrowingTable
from lightning_qat.reporting.html.page import write_report
from lightning_qat.reporting.html.point_table import COLUMNS
from lightning_qat.reporting.reports import markdown_report, text_report
from tests.harness import run_folder
from tests.harness.parsed_page import ParsedPage

NAMES = run_folder.point_names(9)
TERMINAL, FILE, EXACT = 4, 7, 17
"""Significant digits."""


def accuracy(draw: random.Random) -> Result[Any]:
    table = ResultTable()
    for run, stages in (("before", ("float", "QAT")), ("now", ("float", "calibrated", "QAT"))):
        for stage in stages:
            table.record(run, stage, {"val_map": draw.uniform(40, 60), "val_acc": draw.random()})
    return table.result("now", ["val_map", "val_acc"], {"val_map": "2%", "val_acc": 0.123456789})


def pipeline(draw: random.Random) -> Result[Any]:
    states: tuple[Any, ...] = ("holds", "falls", "breaks", "noted")
    rows = [
        PipelineRow(n, f"step {n}", f"val_{n}", *(draw.random() for _ in range(3)), s) for n, s in enumerate(states)
    ]
    return PipelineResult(tuple(rows), "pipeline misaligned", "pipeline misaligned (rung 2): it falls.", 2)


def convergence(draw: random.Random) -> Result[Any]:
    states: tuple[Any, ...] = ("holds", "flagged", "noted")
    rows = [
        ConvergenceRow(f"check{n}", state, draw.random(), draw.uniform(0, 1e-5), f"Sentence {n}.", f"Do {n}.")
        for n, state in enumerate(states)
    ]
    return ConvergenceResult(tuple(rows), "diverging", "diverging: Sentence 1.", 10, 2)


def statistics(draw: random.Random) -> Result[Any]:
    return LayerStatisticsResult(tuple(run_folder.statistics_row(name, draw) for name in NAMES))


def sensitivity(draw: random.Random) -> Result[Any]:
    return SensitivityResult(tuple(run_folder.sensitivity_row(name, draw) for name in NAMES), points=len(NAMES))


def comparison(draw: random.Random) -> Result[Any]:
    numbers = [f.name for f in dataclasses.fields(LayerComparisonRow) if "float" in str(f.type)]
    words = {
        "base_op_type": "conv2d",
        "analy_op_type": "conv2d",
        "shape": "[4]",
        "quant_dtype": "int8",
        "origin": "own",
    }
    rows = []
    for n, name in enumerate(NAMES):
        cells: dict[str, Any] = {**words, **{key: draw.uniform(-50, 50) for key in numbers}}
        rows.append(LayerComparisonRow(index=n, mod_name=name, point=name, **cells))
    return LayerComparisonResult(tuple(rows))


MAKERS = {
    "accuracy": accuracy, "pipeline_check": pipeline, "convergence": convergence, "layer_statistics": statistics,
    "sensitivity": sensitivity, "layer_comparison": comparison,
}  # fmt: skip


def written(folder: Path, name: str, result: Result[Any]) -> tuple[list[str], list[str], ParsedPage]:
    """Write a result as its callback does; the rows of its csv and its json, and the page of the run."""
    place = run_folder.write_run(folder, NAMES) / "lightning_qat"
    for rewritten in ("layer_statistics", "sensitivity"):
        (place / f"{rewritten}.csv").unlink()
    if name in ("layer_statistics", "sensitivity", "layer_comparison"):
        GrowingTable(place / f"{name}.csv").write(result, 0)
        write_json(result, place / f"{name}.json", 0)
    else:
        write_result(result, place, name)
        assert name != "accuracy" or OWN_TABLE == "accuracy.json"
    with open(place / f"{name}.csv", newline="") as file:
        lines = [" ".join(cells) for cells in csv.reader(file)]
    rows = json.loads((place / f"{name}.json").read_text())["rows"]
    return lines, [" ".join(map(str, row.values())) for row in rows], ParsedPage(write_report([folder]).read_text())


def says(line: str, cells: list[Any], digits: int) -> bool:
    """Whether a line has all cells: words as they are, numbers to some significant digits."""
    numbers = []
    for word in line.split():
        try:
            numbers.append(float(word))
        except ValueError:
            continue
    room = 0 if digits == EXACT else 0.51 * 10.0 ** (1 - digits)

    def has(cell: Any) -> bool:
        if isinstance(cell, (int, float)) and not isinstance(cell, bool):
            return any(math.isclose(number, cell, rel_tol=room) for number in numbers)
        words = cell if isinstance(cell, (list, tuple)) else [] if cell is None or isinstance(cell, bool) else [cell]
        return all(str(word) in line for word in words)

    return all(map(has, cells))


def check(lines: list[str], rows: list[dict[str, Any]], columns: tuple[str, ...], digits: int) -> None:
    """Every row of the result is one line."""
    assert len(columns) > 2
    assert rows
    for row in rows:
        cells = [row[column] for column in columns]
        assert sum(isinstance(cell, float) for cell in cells) >= 1
        assert any(says(line, cells, digits) for line in lines), (cells, lines)


@pytest.mark.parametrize("name", list(MAKERS))
def test_every_rendering_has_every_row(tmp_path: Path, name: str) -> None:
    result = MAKERS[name](random.Random(0))
    rows = result.to_dicts()
    short, full = result.blocks()[0], result.full_blocks()[0]
    in_csv, in_json, page = written(tmp_path, name, result)
    check(in_csv, rows, result.columns(), EXACT)
    check(in_json, rows, full.columns if name == "accuracy" else tuple(rows[0]), EXACT)
    check(text_report(result).splitlines(), rows, full.columns, FILE)
    shown = [dict(zip(short.columns, row, strict=True)) for row in short.rows]
    assert len(shown) == len(rows)
    check(console_text(result, 2000).splitlines(), shown, short.columns, TERMINAL)
    check(markdown_report(result.blocks()).splitlines(), shown, short.columns, TERMINAL)
    keys = [column.key for column in COLUMNS]
    common = tuple(key for key in keys if key in rows[0])
    if "point" in common:
        points = [dict(zip(keys, cells, strict=True)) for cells in page.data["points"]["rows"]]
        kept = tuple(key for key in common if key not in ("scale", "role"))  # the plan knows these better
        check([" ".join(str(point[key]) for key in kept) for point in points], rows, kept, EXACT)
    else:
        check([" ".join(cells) for cells in page.rows], rows, full.columns, TERMINAL)
    said = (result.finding if name == "accuracy" else result.note).rpartition(": ")[2].strip()
    for text in (text_report(result), console_text(result, 2000), page.text if "point" not in common else said):
        assert said in " ".join(text.split())


def test_a_rendering_that_says_something_else_is_found() -> None:
    """The comparison sees another number, another word, and a number of another row."""
    lines = ["a 0.1235 holds", "b 0.25 breaks"]
    rows = [{"what": "a", "value": 0.12346, "status": "holds"}, {"what": "b", "value": 0.25, "status": "breaks"}]
    columns = ("what", "value", "status")
    check(lines, rows, columns, TERMINAL)
    for changed in (["a 0.1236 holds", lines[1]], ["a 0.1235 breaks", lines[1]], ["a 0.25 holds", "b 0.1235 breaks"]):
        with pytest.raises(AssertionError):
            check(changed, rows, columns, TERMINAL)
    with pytest.raises(AssertionError):
        check(lines, rows, columns, EXACT)
