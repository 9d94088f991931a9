"""One inspected point as files: all tensors, a summary for people, the histogram, and the figures."""

from __future__ import annotations

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_qat.analysis.comparison.point_inspection import PointInspection
from lightning_qat.atomic_files import write_atomically
from lightning_qat.reporting.figures import error_histogram, quantized_against_float, value_histogram
from lightning_qat.reporting.plain_text import file_name, printable
from lightning_qat.reporting.sensitivity_figures import write_figure
from lightning_qat.reporting.tables import cell_text, fixed_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES: dict[str, Callable[[PointInspection], Figure]] = {
    "values.png": value_histogram,
    "error.png": error_histogram,
    "quantized_against_float.png": quantized_against_float,
}


def summary(inspection: PointInspection) -> str:
    """Describe a point and the values that passed through it, as plain text.

    Args:
        inspection: the point.
    """
    i, s = inspection, inspection.statistics
    scale = i.scale.reshape(-1)
    lines = {
        "point": i.point,
        "op": i.op_type + (f", {i.location}" if i.location else ""),
        "region": i.region,
        "type": f"{i.dtype}, {i.scheme}" + ("" if i.axis is None else f", {scale.numel()} scales along axis {i.axis}"),
        "scale": _range(float(scale.min()), float(scale.max())) + f" ({i.scale_source})",
        "represents": f"{cell_text(i.lowest)} to {cell_text(i.highest)}"
        + ("" if scale.numel() == 1 else ", of the widest channel"),
        "values": f"{cell_text(s.low)} to {cell_text(s.high)}, mean {cell_text(s.mean)}, variance {cell_text(s.var)}",
        "not finite": str(int(s.non_finite)) if s.non_finite else "",
        "clipped": f"{cell_text(100 * i.clipped_share, 3)} % ({int(s.clipped)} of {int(s.quantized)} values)",
        "codes hit": f"{cell_text(100 * s.level_occupancy, 3)} % of the type's",
        "error": f"rounding energy {cell_text(s.rounding)}, clipping energy {cell_text(s.clipping)}, "
        f"SQNR {cell_text(i.sqnr, 4)} dB",
    }
    head = "\n".join(f"{label + ':':<12}{value}" for label, value in lines.items() if value)
    rows = [_tensor_row(k, v, e) for k, (v, e) in enumerate(zip(i.values, i.errors, strict=True))]
    return f"{printable(head)}\n\n{fixed_width(('tensor', 'shape', 'min', 'max', 'largest error'), rows)}\n"


def write_inspection(
    inspection: PointInspection, directory: str | os.PathLike[str], figures: bool = True
) -> list[Path]:
    """Write a point into a directory of its own: ``<directory>/<point>/``.

    Args:
        inspection: the point.
        directory: where; made if missing.
        figures: also draw.

    Returns:
        The paths written: ``tensors.npz`` (``float_<k>``, ``quantized_<k>``, ``error_<k>``, ``scale``,
        ``zero_point``), ``summary.txt``, ``histogram.csv`` and the figures.

    Raises:
        ConfigurationError: figures are asked for and matplotlib is not installed; the other files are written before.
    """
    place = Path(directory) / directory_name(inspection)
    arrays = {"scale": inspection.scale.numpy(), "zero_point": inspection.zero_point.numpy()}
    triples = zip(inspection.values, inspection.quantized, inspection.errors, strict=True)
    for k, tensors in enumerate(triples):
        for name, tensor in zip(("float", "quantized", "error"), tensors, strict=True):
            arrays[f"{name}_{k}"] = (tensor.float() if tensor.element_size() < 4 else tensor).numpy()  # no bfloat16
    before, after, edges = inspection.histogram()
    table = "\n".join(
        f"{low:.9g},{high:.9g},{b},{a}" for low, high, b, a in zip(edges[:-1], edges[1:], before, after, strict=True)
    )
    paths = [
        write_atomically(place / "tensors.npz", _archive(arrays)),
        write_atomically(place / "summary.txt", summary(inspection)),
        write_atomically(place / "histogram.csv", f"low,high,float,quantized\n{table}\n"),
    ]
    for name, draw in FIGURES.items() if figures else ():
        paths.append(write_figure(draw(inspection), place / name))
    return paths


def directory_name(inspection: PointInspection) -> str:
    """Return a file name for a point; it can be read, and works on every file system."""
    name = f"{inspection.region}.{inspection.point}" if inspection.region else inspection.point
    return file_name(name)


def _range(low: float, high: float) -> str:
    return cell_text(low) if low == high else f"{cell_text(low)} to {cell_text(high)}"


def _tensor_row(number: int, value: Tensor, error: Tensor) -> tuple[object, ...]:
    finite = value[value.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (None, None)
    finite_error = error[error.isfinite()]
    largest = float(finite_error.abs().max()) if finite_error.numel() else None
    return number, "x".join(map(str, value.shape)) or "scalar", low, high, largest


def _archive(arrays: dict[str, Any]) -> bytes:
    file = BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()
