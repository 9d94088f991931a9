"""Node data for Model Explorer: its format, the numbers of the table, and names that are those of an ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

import lightning_qat
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.reporting.html.node_data import node_data, write_node_data
from lightning_qat.reporting.html.point_table import COLUMNS, PointTable, point_table
from lightning_qat.reporting.html.run_folder import read_run
from tests.harness import run_folder

COLOUR = {"type": "string", "pattern": "^#[0-9a-f]{6}$"}
SCHEMA = {  # GraphNodeData of model_explorer/node_data_builder.py
    "type": "object",
    "required": ["results"],
    "additionalProperties": False,
    "properties": {
        "results": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["value"],
                "additionalProperties": False,
                "properties": {"value": {"type": ["number", "string"]}, "bgColor": COLOUR, "textColor": COLOUR},
            },
        },
        "gradient": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["stop"],
                "properties": {"stop": {"type": "number", "minimum": 0, "maximum": 1}, "bgColor": COLOUR},
            },
        },
    },
}


def table(**columns: Any) -> PointTable:
    cells = {column.key: columns.get(column.key) for column in COLUMNS}
    return PointTable((("", "a"),), (tuple(cells.values()),))


@pytest.mark.parametrize("column", [column.key for column in COLUMNS])
def test_every_column_has_the_documented_format(tmp_path: Path, column: str) -> None:
    run = run_folder.write_run(tmp_path, 20)
    run_folder.write_model_check(run, "a")
    run_folder.write_diagnosis(run, run_folder.point_names(20)[3])
    points = point_table(read_run(run))
    data = json.loads(write_node_data(points, column, tmp_path).read_text())
    jsonschema.validate(data, SCHEMA)
    held = dict(zip(points.names, points.column(column), strict=True))
    assert {name: one["value"] for name, one in data["results"].items()} == {
        name: value for name, value in held.items() if value is not None
    }
    if "gradient" in data:
        assert [stop["stop"] for stop in data["gradient"]] == [0, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_have_is_left_out(value: float) -> None:
    assert node_data(table(score=value), "score")["results"] == {}


def test_an_unknown_column_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="clipped_share"):
        node_data(table(), "clipped")


def test_names_are_tensors_of_the_onnx_file(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.linspace(-1, 1, 32).reshape(8, 4)
    region = lightning_qat.insert(model, (x,))
    lightning_qat.calibrate(region, [x])
    lightning_qat.export_onnx(model.eval(), tmp_path / "model.onnx", (x,))
    lightning_qat.write_plan(model, tmp_path)
    data = node_data(point_table(read_run(tmp_path)), "scale")
    tensors = {name for node in onnx.load(tmp_path / "model.onnx").graph.node for name in node.output}
    assert set(data["results"]) <= tensors
    assert len(data["results"]) == len(region.points)
