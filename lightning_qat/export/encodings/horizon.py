"""``quant_config.json`` of Horizon's HMCT: the type in which each node of the ONNX file reads its inputs.

Source: Horizon Open Explorer, "quant_config" (docs.oe.horizon.auto, guide/ptq/ptq_tool/hb_compile/quant_config.html):
``model_config.all_node_type`` is the default, ``node_config`` has ``qtype`` for all inputs of a node, or ``input0``,
``input1``, ... where they differ. The levels are model_config < op_config < subgraph_config < node_config.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightning_qat.export.encodings.held_points import Encoded, NotHeld
from lightning_qat.quantization.errors import DamagedFileError
from lightning_qat.quantization.region.effective_dtypes import effective_dtypes
from lightning_qat.quantization.region.region import Region

TYPES = ("int8", "int16", "float32")
"""Types of the format that tensors can have here."""


def encode(regions: Mapping[str, Region]) -> Encoded:
    """Write the types that the ops of regions read.

    Args:
        regions: by the path of their target.
    """
    nodes: dict[str, list[str]] = {}
    lost: list[NotHeld] = []
    for path, region in regions.items():
        prefix = f"{path}." if path else ""
        for name, types in input_types(region).items():
            other = sorted(set(types) - set(TYPES))
            if other:
                lost.append(NotHeld(prefix + name, f"its inputs: the format has no type {', '.join(other)}"))
            else:
                nodes[prefix + name] = types
        lost += [
            NotHeld(prefix + name, "its scale: HMCT calibrates anew")
            for name, point in region.points.items()
            if point.scale_source is not None
        ]
    counts = Counter(kind for types in nodes.values() for kind in types)
    default = "int16" if counts["int16"] > counts["int8"] else "int8"
    document = {
        "model_config": {"all_node_type": default},
        "node_config": {name: _entry(types) for name, types in nodes.items()},
    }
    return Encoded(json.dumps(document, indent=1) + "\n", len(nodes), tuple(lost))


def input_types(region: Region) -> dict[str, list[str]]:
    """Return the types in which the ops of a region read their data and weights, by the name of the op.

    What an op reads from another op of its fused group is no tensor on the device, and is left out.

    Args:
        region: the region.
    """
    dtypes = effective_dtypes(region)
    groups = {name: set(group.ops) for group in region.plan.fusions for name in group.ops}
    found = {}
    for planned in region.plan.ops:
        op, group = region.graph.by_name[planned.name], groups.get(planned.name, set())
        operands = [
            operand
            for operand in op.operands
            if operand.role in ("data", "weight")
            and operand.is_float
            and not any(source.kind == "op" and source.name in group for source in operand.sources)
        ]
        if operands and planned.status not in ("constant", "passes"):
            found[op.name] = [dtypes.of_operand(op, operand) for operand in operands]
    return found


def decode(text: str) -> dict[str, list[str]]:
    """Read the types of the inputs of every node; one type stands for all inputs.

    Raises:
        DamagedFileError: the text is no such file.
    """
    try:
        found = {}
        for name, entry in json.loads(text)["node_config"].items():
            inputs = sorted((key for key in entry if key.startswith("input")), key=lambda key: int(key[len("input") :]))
            found[name] = [entry[key] for key in inputs] if inputs else [entry["qtype"]]
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"this is no quant_config.json: {type(error).__name__}: {error}.") from error


def _entry(types: list[str]) -> dict[str, Any]:
    if len(set(types)) == 1:
        return {"qtype": types[0]}
    return {f"input{number}": kind for number, kind in enumerate(types)}
