"""Encodings JSON 2.0.0 of AIMET, which Qualcomm's QNN reads.

Source: AIMET, "Encoding Format Specification", section "Version 2.0.0" (``Docs/techniques/encoding_spec.rst`` in
github.com/qualcomm/aimet): a list of encodings, each with the inputs and attributes of an ONNX QuantizeLinear.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightning_qat.export.encodings.held_points import Encoded, NotHeld, per_channel
from lightning_qat.quantization.errors import DamagedFileError

VERSION = "2.0.0"
TYPES = ("int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16")
"""Integer types of the format that points can have."""


def encode(points: Sequence[dict[str, Any]]) -> Encoded:
    """Write the encodings of points.

    Args:
        points: as :func:`~lightning_qat.export.encodings.held_points.points_of` returns them.
    """
    encodings, lost = [], []
    for point in points:
        missing = _whole(point)
        if missing:
            lost.append(NotHeld(point["name"], missing))
            continue
        entry = {
            "name": point["name"],
            "output_dtype": point["dtype"],
            "y_scale": per_channel(point, "scale"),
            "y_zero_point": per_channel(point, "zero_point"),
        }
        if point["axis"] is not None:
            entry["axis"] = point["axis"]
        encodings.append(entry)
        if point["narrow_range"] and point["quant_min"] < 0:
            lost.append(NotHeld(point["name"], f"its smallest code, {point['quant_min']}"))
        if point["split_sizes"] is not None:
            lost.append(NotHeld(point["name"], "that channels share a scale: each has its own, of equal value"))
        if point["same_as"] is not None:
            lost.append(NotHeld(point["name"], f"that its quantizer is that of {point['same_as']}"))
    text = json.dumps({"version": VERSION, "encodings": encodings}, indent=1, allow_nan=False) + "\n"
    return Encoded(text, len(encodings), tuple(lost))


def decode(text: str) -> list[dict[str, Any]]:
    """Read encodings: ``name``, ``dtype``, ``scale``, ``zero_point`` and ``axis`` of each point.

    Raises:
        DamagedFileError: the text is no such file.
    """
    try:
        document = json.loads(text)
        if document["version"] != VERSION:
            raise DamagedFileError(f"encodings of version {document['version']} cannot be read, but {VERSION} alone.")
        return [
            {
                "name": entry["name"],
                "dtype": entry["output_dtype"],
                "scale": entry["y_scale"],
                "zero_point": entry.get("y_zero_point", 0),
                "axis": entry.get("axis"),
            }
            for entry in document["encodings"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(f"this is no file of encodings {VERSION}: {type(error).__name__}: {error}.") from error


def _whole(point: dict[str, Any]) -> str:
    """Why a point is not in the file at all."""
    if point["scale"] is None:
        return "everything: it has no scale"
    if point["dtype"] not in TYPES:
        return f"everything: the format has no type {point['dtype']}"
    if point["groups"] > 1:
        return "everything: the scales of a grouped transposed convolution are along no axis of its weight"
    return ""
