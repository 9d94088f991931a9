"""What a format of a tool chain holds of the points of a plan, and what it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_qat.export.plan_files import plan_document
from lightning_qat.quantization.region.region import Region


@dataclass(frozen=True)
class NotHeld:
    """Something of a point that a format has no place for.

    Args:
        point: name of the point, with the path of its region; of an op for formats without points.
        what: what is not in the file.
    """

    point: str
    what: str


@dataclass(frozen=True)
class Encoded:
    """The content of a file, and what it does not hold.

    Args:
        text: the content.
        points: how many points or nodes it holds.
        not_held: everything else that concerns the codes of single points.
    """

    text: str
    points: int
    not_held: tuple[NotHeld, ...]


def points_of(regions: Mapping[str, Region]) -> list[dict[str, Any]]:
    """Return the points of all regions as ``quant_plan.json`` describes them, under their names in an exported file.

    Args:
        regions: by the path of their target.
    """
    found = []
    for path, region in plan_document(regions)["regions"].items():
        prefix = f"{path}." if path else ""
        found += [{**point, "name": prefix + point["name"], "op": prefix + point["op"]} for point in region["points"]]
    return found


def per_channel(point: Mapping[str, Any], key: str) -> Any:
    """Return ``scale`` or ``zero_point`` with one value per channel where channels share one (split scales)."""
    values, sizes = point[key], point["split_sizes"]
    if sizes is None:
        return values
    return [value for value, size in zip(values, sizes, strict=True) for _ in range(size)]
