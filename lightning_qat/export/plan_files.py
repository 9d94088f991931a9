"""The plan in effect as a file: every point with its dtype and scale, every op with what happens to it and why.

The format is described for machines by ``quant_plan.schema.json`` and for people by ``README.md``, both beside this
file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_qat.analysis.results import plain, write_atomically
from lightning_qat.quantization.region.region import Region

FORMAT_VERSION = 1
"""Changes when a reader of the file has to change; new keys alone do not change it."""


def plan_document(regions: Mapping[str, Region]) -> dict[str, Any]:
    """Describe the plans of all regions with the scales of their present weights, as primitives.

    Args:
        regions: by target path.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> region = insert(torch.nn.Sequential(torch.nn.Linear(4, 2)), (torch.ones(1, 4),))
        >>> document = plan_document({"": region})
        >>> [(p["name"], p["dtype"], p["scale"]) for p in document["regions"][""]["points"]]
        [('0.input0', 'int8', None), ('0.weight', 'int8', None)]
    """
    return {"format_version": FORMAT_VERSION, "regions": {path: _described(region) for path, region in regions.items()}}


def write_plan(regions: Mapping[str, Region], directory: str | os.PathLike[str]) -> Path:
    """Write ``quant_plan.json``; an existing one is replaced at once."""
    text = json.dumps(plan_document(regions), indent=2, allow_nan=False) + "\n"
    return write_atomically(Path(directory) / "quant_plan.json", text)


def _described(region: Region) -> dict[str, Any]:
    region.scales.refresh_weights()
    plan, fake_quants = region.plan, region.points
    points = []
    for point in plan.points:
        fake_quant = fake_quants[point.name]
        known = fake_quant.scale_source is not None and bool(torch.isfinite(fake_quant.scale).all())
        points.append(
            {
                **plain(point),
                "op_type": region.graph.by_name[point.op].kind,
                "dtype": fake_quant.dtype,
                "quant_min": fake_quant.quant_min,
                "quant_max": fake_quant.quant_max,
                "scale": _numbers(fake_quant.scale) if known else None,
                "zero_point": _numbers(fake_quant.zero_point) if known else None,
                "scale_source": "learned" if known and fake_quant.learned else fake_quant.scale_source,
            }
        )
    kinds = region.graph.by_name
    ops = [{**plain(op), "op_type": kinds[op.name].kind, "location": kinds[op.name].location} for op in plan.ops]
    return {
        "target_type": region.graph.target_type,
        "profile": plan.profile,
        "qconfig": plain(plan.qconfig),
        "overrides": plain(plan.overrides),
        "points": points,
        "float_points": plan.float_points,
        "ops": ops,
        "fusions": plain(plan.fusions),
        "misses": plain(plan.misses),
    }


def _numbers(values: Tensor) -> Any:
    """A number or a list of them. Every float32 is a float64, whose shortest form JSON holds exactly."""
    return values.detach().cpu().tolist()
