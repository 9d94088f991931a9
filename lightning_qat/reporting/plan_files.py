"""The plan in effect as a file: every point with its dtype and scale, every op with what happens to it and why."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_qat.analysis.results import plain, write_atomically
from lightning_qat.quantization.plan import PLAN_VERSION
from lightning_qat.quantization.region import Region


def plan_document(regions: Mapping[str, Region]) -> dict[str, Any]:
    """Describe the plans of all regions with their present scales, as primitives.

    Args:
        regions: by target path.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.insertion import insert
        >>> region = insert(torch.nn.Sequential(torch.nn.Linear(4, 2)), (torch.ones(1, 4),))
        >>> document = plan_document({"": region})
        >>> [(p["name"], p["dtype"], p["scale"]) for p in document["regions"][""]["points"]]
        [('0.input0', 'int8', None), ('0.weight', 'int8', None)]
    """
    return {"version": PLAN_VERSION, "regions": {path: _described(region) for path, region in regions.items()}}


def write_plan(regions: Mapping[str, Region], directory: str | os.PathLike[str]) -> Path:
    """Write ``quant_plan.json``; an existing one is replaced at once."""
    text = json.dumps(plain(plan_document(regions)), indent=2) + "\n"
    return write_atomically(Path(directory) / "quant_plan.json", text)


def _described(region: Region) -> dict[str, Any]:
    plan, fake_quants = region.plan, region.points
    points = []
    for point in plan.points:
        fake_quant = fake_quants[point.name]
        calibrated = fake_quant.scale_source is not None
        points.append(
            {
                **plain(point),
                "scale": fake_quant.scale.tolist() if calibrated else None,
                "zero_point": fake_quant.zero_point.tolist() if calibrated else None,
                "scale_source": fake_quant.scale_source,
            }
        )
    kinds = region.graph.by_name
    ops = [{**plain(op), "op_type": kinds[op.name].kind, "location": kinds[op.name].location} for op in plan.ops]
    return {
        "target_type": region.graph.target_type,
        "qconfig": plan.qconfig,
        "overrides": plain(plan.overrides),
        "points": points,
        "float_points": plan.float_points,
        "ops": ops,
        "fusions": plain(plan.fusions),
        "misses": plain(plan.misses),
    }
