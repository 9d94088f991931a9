"""quant_plan.json says what is quantized, how, and why not (A9)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from lightning_qat.quantization.calibration import calibrate
from lightning_qat.quantization.insertion import insert
from lightning_qat.reporting.plan_files import write_plan


def test_plan_file_holds_every_point_with_its_scale_and_every_op_with_its_reason(tmp_path: Path) -> None:
    """A9: scales are those in effect; a point without data has none; float ops say why."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    region = insert(model, (torch.randn(2, 4),), overrides=[{"match": "1", "activation": {"threshold": 100}}])
    before = json.loads(write_plan({"net": region}, tmp_path).read_text())
    assert {p["scale_source"] for p in before["regions"]["net"]["points"]} == {None, "fixed"}
    calibrate(region, [torch.randn(16, 4)])
    described = json.loads(write_plan({"net": region}, tmp_path).read_text())["regions"]["net"]
    for point in described["points"]:
        scale = region.points[point["name"]].scale
        assert torch.equal(torch.tensor(point["scale"]), scale), point["name"]
    (relu,) = [p for p in described["points"] if p["name"] == "1.output"]
    assert relu["scale"] == 100 / 128
    assert relu["reason"].startswith("override 1")
    assert described["float_points"]["2.output"].startswith("high-precision output")
    assert {op["name"]: op["status"] for op in described["ops"]} == {"0": "fused", "1": "quantized", "2": "quantized"}
    assert [path.name for path in tmp_path.iterdir()] == ["quant_plan.json"]
