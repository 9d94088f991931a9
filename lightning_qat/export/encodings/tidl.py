"""Ranges for TI's TIDL: the prototxt of ``advanced_options:quant_params_proto_path``.

Source: TI edgeai-tidl-tools, "Quantization Proto: Providing Quantization Parameters to TIDL": messages
``TIDLNetQuantParams``, ``TidlLayerQuantParams`` and ``TidlTensorQuantParams`` in protobuf's text format. TIDL derives
its scales from ``min`` and ``max`` alone; ``scale`` is the number of codes per unit. Symmetric quantization only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lightning_qat.export.encodings.held_points import Encoded, NotHeld, per_channel
from lightning_qat.quantization.errors import DamagedFileError

ELEMENT_TYPES = {"uint8": 0, "int8": 1, "uint16": 2, "int16": 3}
"""Numbers of TIDL's element types."""
_LAYER_TYPES = {
    "conv2d": "TIDL_ConvolutionLayer",
    "conv_transpose2d": "TIDL_Deconv2DLayer",
    "linear": "TIDL_InnerProductLayer",
    "add": "TIDL_EltWiseLayer",
    "mul": "TIDL_EltWiseLayer",
    "cat": "TIDL_ConcatLayer",
    "softmax": "TIDL_SoftMaxLayer",
    "batch_norm": "TIDL_BatchNormLayer",
}
_TOKEN = re.compile(r'\s*(?:(\w+)\s*:\s*("(?:[^"\\]|\\.)*"|[^\s{}]+)|(\w+)\s*\{|(\}))')


def encode(points: Sequence[dict[str, Any]]) -> Encoded:
    """Write the ranges of points, layer by layer.

    Args:
        points: as :func:`~lightning_qat.export.encodings.held_points.points_of` returns them.
    """
    layers: dict[str, list[dict[str, Any]]] = {}
    lost = [NotHeld("*", "biases: TIDL needs their values to leave out its own calibration")]
    for point in points:
        missing = _whole(point)
        if missing:
            lost.append(NotHeld(point["name"], missing))
            continue
        layers.setdefault(point["op"], []).append(point)
        lost += [NotHeld(point["name"], what) for what in _parts(point)]
    channels = any(isinstance(p["scale"], list) for members in layers.values() for p in members)
    lines = [
        f"num_layers: {len(layers)}",
        "quant_type: SYMMETRIC",
        f"calib_type: {'PERCHANNEL' if channels else 'PERTENSOR'}",
    ]
    for name, members in layers.items():
        lines += _layer(name, members)
    return Encoded("\n".join(lines) + "\n", sum(map(len, layers.values())), tuple(lost))


def _layer(name: str, members: Iterable[dict[str, Any]]) -> list[str]:
    members = list(members)
    kind = _LAYER_TYPES.get(members[0]["op_type"])
    wide = any(point["dtype"].endswith("16") for point in members)
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    lines = ["layers {", f'  layer_name: "{quoted}"']
    lines += [f'  layer_type: "{kind}"'] if kind else []
    lines.append(f"  bit_depth: {16 if wide else 8}")
    for point in members:
        lines += ["  outputs {" if point["role"] == "output" else "  weights {", *_tensor(point), "  }"]
    return [*lines, "}"]


def _tensor(point: dict[str, Any]) -> list[str]:
    scale, zero = per_channel(point, "scale"), per_channel(point, "zero_point")
    scales, zeros = (value if isinstance(value, list) else [value] for value in (scale, zero))
    pairs = list(zip(scales, zeros, strict=True))
    return [
        f"    min: {min((point['quant_min'] - z) * s for s, z in pairs)!r}",
        f"    max: {max((point['quant_max'] - z) * s for s, z in pairs)!r}",
        f"    size: {len(scales)}",
        f"    element_type: {ELEMENT_TYPES[point['dtype']]}",
        *(f"    scale: {1 / s!r}" for s in scales),
        *("    zero_point: 0" for _ in scales),
    ]


def decode(text: str) -> list[dict[str, Any]]:
    """Read ranges: ``name``, ``op``, ``role``, ``dtype`` and ``scale`` of each point.

    Raises:
        DamagedFileError: the text is no such file.
    """
    kinds = {number: name for name, number in ELEMENT_TYPES.items()}
    found = []
    try:
        for layer in _parsed(text)["layers"]:
            (name,) = layer["layer_name"]
            for role in ("output", "weight"):
                for tensor in layer.get(f"{role}s", []):
                    scales = [_float32(1 / value) for value in tensor["scale"]]
                    found.append(
                        {
                            "name": f"{name}.{role}",
                            "op": name,
                            "role": role,
                            "dtype": kinds[tensor["element_type"][0]],
                            "scale": scales if len(scales) > 1 else scales[0],
                        }
                    )
    except (ValueError, KeyError, IndexError, ZeroDivisionError, TypeError) as error:
        raise DamagedFileError(f"this is no prototxt of ranges: {type(error).__name__}: {error}.") from error
    return found


def _parsed(text: str) -> dict[str, list[Any]]:
    """The message as lists of values by field."""
    top: dict[str, list[Any]] = {}
    stack, place = [top], 0
    while place < len(text.rstrip()):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError(f"line {text.count(chr(10), 0, place) + 1}")
        field, value, message, _ = match.groups()
        if message:
            inner: dict[str, list[Any]] = {}
            stack[-1].setdefault(message, []).append(inner)
            stack.append(inner)
        elif field:
            stack[-1].setdefault(field, []).append(_value(value))
        else:
            stack.pop()
        place = match.end()
    if len(stack) != 1:
        raise ValueError("a message is not closed")
    return top


def _value(text: str) -> Any:
    if text.startswith('"'):
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    return float(text) if re.match(r"[-\d.]", text) else text


def _float32(value: float) -> float:
    return float(np.float32(value))


def _whole(point: dict[str, Any]) -> str:
    """Why a point is not in the file at all."""
    if point["scale"] is None:
        return "everything: it has no scale"
    if point["dtype"] not in ELEMENT_TYPES:
        return f"everything: the format has no type {point['dtype']}"
    if point["role"] == "input":
        return "everything: layers have ranges of outputs and weights, and none of inputs"
    return ""


def _parts(point: dict[str, Any]) -> list[str]:
    zeros = point["zero_point"] if isinstance(point["zero_point"], list) else [point["zero_point"]]
    found = []
    if any(zeros):
        found.append("its zero point: TIDL takes symmetric ranges only")
    if point["axis"] is not None and point["role"] == "output":
        found.append("the axis of its scales")
    if point["narrow_range"] and point["quant_min"] < 0:
        found.append(f"its smallest code, {point['quant_min']}")
    if point["split_sizes"] is not None:
        found.append("that channels share a scale: each has its own, of equal value")
    if point["name"] not in (f"{point['op']}.output", f"{point['op']}.weight"):
        found.append("its name: it is read as that of the layer")
    return found
