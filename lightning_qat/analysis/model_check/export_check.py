"""What of the plan an exported file could not hold: better known before training than after it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lightning_qat.analysis.model_check.checked_region import CheckedRegion
from lightning_qat.analysis.model_check.finding import Finding, shortened
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.quantization.numerics.dtypes import ONNX_TYPES, is_float


def check_export(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """Report types that ONNX lacks, and parameters in float64. Code that varies is a finding of its own."""
    return [*_types(checked), *_float64(checked)], []


def _types(checked: CheckedRegion) -> Iterable[Finding]:
    lacking = {
        name: point.dtype
        for name, point in checked.points.items()
        if point.enabled and not is_float(point.dtype) and point.dtype not in ONNX_TYPES
    }
    if lacking:
        types = ", ".join(sorted(set(lacking.values())))
        yield Finding(
            severity="info",
            kind="type without ONNX",
            names=tuple(lacking),
            what=f"{shortened(lacking)}: {types} cannot be exported to ONNX.",
            why=f"ONNX opset 21 has {', '.join(ONNX_TYPES)} only; export_onnx will refuse this model after training.",
            action="Give these points one of ONNX's types if the model will be exported so. export_program and the "
            "quantization plan hold every type.",
        )


def _float64(checked: CheckedRegion) -> Iterable[Finding]:
    names = tuple(
        name for name, parameter in checked.region.target.named_parameters() if parameter.dtype is torch.float64
    )
    if names:
        yield Finding(
            severity="info",
            kind="float64",
            names=names,
            what=f"{shortened(names)}: parameters in float64 cannot be exported.",
            why="Exported files compute in float32; export_onnx and export_program will refuse this model.",
            action="Call model.float() before inserting fake-quant.",
        )
