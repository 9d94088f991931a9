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
from torch import Tensor, nn

from lightning_qat.atomic_files import json_value, write_atomically
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.region import Region, find_regions
from lightning_qat.quantization.tracing.op_graph import Op

FILE_NAME = "quant_plan.json"
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


def write_plan(model: nn.Module | Region, directory: str | os.PathLike[str]) -> Path:
    """Write ``quant_plan.json``: all that a converter needs to compute what the quantized model computes.

    The file describes the scales of the present weights. One that exists is replaced at once. The format is documented
    in ``lightning_qat/export/README.md``.

    Args:
        model: a module with fake-quants, such as :func:`lightning_qat.load_quantized` returns; or one region.
        directory: where to; made if missing.

    Returns:
        The path of the file.

    Raises:
        ConfigurationError: the module has no fake-quants.

    Example:
        >>> import tempfile, torch
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = insert(model, (torch.ones(1, 4),))
        >>> path = write_plan(model, tempfile.mkdtemp())
        >>> list(json.loads(path.read_text())["regions"])
        ['']
    """
    regions = {"": model} if isinstance(model, Region) else find_regions(model)
    if not regions:
        raise ConfigurationError(
            f"{type(model).__name__} has no fake-quants, so there is no plan to write: quantize it first, by "
            "load_quantized(...) from the checkpoint of a QAT run or by insert(...)."
        )
    text = json.dumps(plan_document(regions), indent=2, allow_nan=False) + "\n"
    return write_atomically(Path(directory) / FILE_NAME, text)


def _described(region: Region) -> dict[str, Any]:
    region.scales.refresh_weights()
    plan, fake_quants = region.plan, region.points
    points = []
    for point in plan.points:
        fake_quant = fake_quants[point.name]
        known = fake_quant.scale_source is not None and bool(torch.isfinite(fake_quant.scale).all())
        points.append(
            {
                **json_value(point),
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
    ops = [
        {
            **json_value(op),
            "op_type": kinds[op.name].kind,
            "location": kinds[op.name].location,
            "inputs": _producers(kinds[op.name]),
        }
        for op in plan.ops
    ]
    return {
        "target_type": region.graph.target_type,
        "profile": plan.profile,
        "qconfig": json_value(plan.qconfig),
        "overrides": json_value(plan.overrides),
        "points": points,
        "float_points": plan.float_points,
        "ops": ops,
        "fusions": json_value(plan.fusions),
        "misses": json_value(plan.misses),
    }


def _producers(op: Op) -> list[str]:
    """The ops whose results an op takes."""
    sources = (source for operand in op.operands for source in operand.sources)
    return list(dict.fromkeys(source.name for source in sources if source.kind in ("op", "mutated")))


def _numbers(values: Tensor) -> Any:
    """A number or a list of them. Every float32 is a float64, whose shortest form JSON holds exactly."""
    return values.detach().cpu().tolist()
