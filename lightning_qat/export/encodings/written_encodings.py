"""``write_encodings`` and ``read_encodings``: the plan in the formats of accelerator tool chains, and back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from lightning_qat.atomic_files import write_atomically
from lightning_qat.export.capture import quantized_regions
from lightning_qat.export.deployed_form import check_calibrated
from lightning_qat.export.encodings import horizon, qnn, tidl
from lightning_qat.export.encodings.held_points import Encoded, NotHeld, points_of
from lightning_qat.quantization.errors import unknown_choice
from lightning_qat.quantization.reading.files import Document

EncodingFormat = Literal["qnn", "horizon", "tidl"]
FILE_NAMES: dict[str, str] = {"qnn": "model.encodings", "horizon": "quant_config.json", "tidl": "quant_params.prototxt"}


@dataclass(frozen=True)
class WrittenEncodings:
    """A file for a tool chain, and what the format has no place for.

    Args:
        file: the file.
        points: how many points (for Horizon: nodes) it holds.
        not_held: what it does not hold of single points.
    """

    file: Path
    points: int
    not_held: tuple[NotHeld, ...]


def write_encodings(
    model_or_region: nn.Module, path: str | os.PathLike[str], format: EncodingFormat = "qnn"
) -> WrittenEncodings:
    """Write the quantization of a model for an accelerator's tool chain, beside the ONNX file.

    Tensors and nodes have the names that they have in the file of :func:`lightning_qat.export_onnx`. The formats are
    described in ``lightning_qat/export/README.md``, with what each of them cannot hold.

    Args:
        model_or_region: a model with one or more calibrated regions, or one region.
        path: the file.
        format: ``qnn`` (encodings JSON 2.0.0 of AIMET and QNN), ``horizon`` (quant_config.json of HMCT) or ``tidl``
            (prototxt of ranges of TI's TIDL).

    Raises:
        ConfigurationError: the model is not calibrated, or there is no such format.
        NotWrittenError: the file cannot be written.

    Example:
        >>> import tempfile, torch, lightning_qat
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> region = lightning_qat.insert(model, (torch.ones(1, 4),))
        >>> _ = lightning_qat.calibrate(region, [torch.randn(8, 4)])
        >>> written = lightning_qat.write_encodings(model, f"{tempfile.mkdtemp()}/model.encodings")
        >>> [point["name"] for point in lightning_qat.read_encodings(written.file, "qnn")]
        ['0.input0', '0.weight']
    """
    _check_format(format)
    _, regions = quantized_regions(model_or_region)
    check_calibrated(regions)
    found: Encoded
    if format == "horizon":
        found = horizon.encode(regions)
    else:
        found = qnn.encode(points_of(regions)) if format == "qnn" else tidl.encode(points_of(regions))
    return WrittenEncodings(write_atomically(path, found.text), found.points, found.not_held)


def read_encodings(path: str | os.PathLike[str], format: EncodingFormat = "qnn") -> list[dict[str, Any]]:
    """Read a file of a tool chain, as points of ``quant_plan.json`` with the keys that the format holds.

    Args:
        path: the file.
        format: as for :func:`write_encodings`.

    Returns:
        For ``qnn`` ``name``, ``dtype``, ``scale``, ``zero_point`` and ``axis``; for ``tidl`` ``name``, ``op``,
        ``role``, ``dtype`` and ``scale``; for ``horizon`` one entry per node: ``op`` and ``inputs``, the types that it
        reads.

    Raises:
        DamagedFileError: the file is missing, or holds something else.
    """
    _check_format(format)
    text = Document(path, f"a file of encodings ({format})", "write it with lightning_qat.write_encodings").text()
    if format == "horizon":
        return [{"op": name, "inputs": types} for name, types in horizon.decode(text).items()]
    return qnn.decode(text) if format == "qnn" else tidl.decode(text)


def _check_format(format: str) -> None:
    if format not in get_args(EncodingFormat):
        raise unknown_choice("format", format, get_args(EncodingFormat))
