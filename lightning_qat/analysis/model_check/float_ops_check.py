"""Ops that compute on float32 inside the region, and into how many pieces they cut the deployed model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lightning_qat.analysis.model_check.checked_region import CheckedRegion, module_type, role_of
from lightning_qat.analysis.model_check.finding import Finding, overrides_yaml, shortened
from lightning_qat.analysis.model_check.float_segments import FloatOp, Segments
from lightning_qat.analysis.model_check.flops_table import flops_table
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.quantization.counts import number_of
from lightning_qat.quantization.overrides import yaml_name
from lightning_qat.quantization.region.effective_dtypes import FLOAT

_BY_DESIGN = ("mask", "computed from integer inputs alone")


def check_float_ops(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """Report ops that compute in float32 inside the region, and count the segments they make."""
    segments = Segments(checked)
    floats = segments.float_ops
    rows = tuple(
        (f.op.name, module_type(f.op), ", ".join(f.inputs), ", ".join(f.producers), f.place, f.reason) for f in floats
    )
    columns = ("name", "type", "float32 inputs", "producer", "place", "reason")
    note = "" if rows else "no op of the region computes in float32."
    by_reason = Counter(f.reason for f in floats)
    total = (
        ("accelerator segments", segments.accelerator_segments),
        ("quantize and dequantize between ops", segments.boundary_casts),
        ("float ops", len(floats)),
        *((f"float ops: {reason}", count) for reason, count in by_reason.items()),
    )
    sections = [
        Section("Ops that compute in float32:", columns, rows, "A12", note),
        Section("Segments of the deployed model:", ("what", "count"), total, "A12"),
    ]
    return [*_nothing_quantized(checked), *_findings(segments)], [*sections, flops_table(segments)]


def _nothing_quantized(checked: CheckedRegion) -> Iterable[Finding]:
    if checked.computing and all(dtype == FLOAT for dtype in checked.dtypes.points.values()):
        names = tuple(op.name for op in checked.computing)
        yield Finding(
            severity="warning",
            kind="nothing quantized",
            names=names,
            what=f"No tensor of the region is quantized: {shortened(names)} compute in float32.",
            why="What is trained and evaluated is the float model, whatever the reports say of its accuracy.",
            action="Look at the reasons of the float ops. Choose the target that holds the layers, or take back the "
            "overrides that keep them float.",
        )


def _findings(segments: Segments) -> Iterable[Finding]:
    grouped: dict[tuple[bool, str], list[FloatOp]] = {}
    for found in segments.float_ops:
        by_design = found.reason.startswith(_BY_DESIGN)
        grouped.setdefault((found.place == "middle" and not by_design, found.reason), []).append(found)
    for (middle, reason), ops in grouped.items():
        yield _finding(segments, middle, reason, ops)


def _finding(segments: Segments, middle: bool, reason: str, ops: list[FloatOp]) -> Finding:
    names = tuple(f.op.name for f in ops)
    producers = shortened(dict.fromkeys(name for f in ops for name in f.producers))
    count = segments.accelerator_segments
    places = dict.fromkeys("in the middle" if f.place == "middle" else f"at the {f.place}" for f in ops)
    where = "between quantized ops" if middle else f"{' and '.join(places)} of the region"
    action, yaml = _remedy(segments.checked, reason, ops)
    return Finding(
        severity="warning" if middle else "info",
        kind="float op",
        requirement="A12",
        names=names,
        what=f"{shortened(names)} {'compute' if len(names) > 1 else 'computes'} in float32 {where}"
        + (f" on {producers}" if producers else "")
        + f": {reason}.",
        why=(
            f"Every float op in the middle falls back to the CPU and cuts the deployed model, here into "
            f"{number_of(count, 'segment')} with {segments.boundary_casts} casts between them."
            if middle
            else "It runs on the CPU, outside the accelerator's segments."
        ),
        action=action,
        location=ops[0].op.location if len({f.op.location for f in ops}) == 1 else "",
        yaml=yaml,
    )


def _remedy(checked: CheckedRegion, reason: str, ops: list[FloatOp]) -> tuple[str, str]:
    if reason.startswith(_BY_DESIGN):
        return "Nothing; most tools fold masks into softmax, and values made of integers are exact.", ""
    if reason.startswith("float32 by"):
        return "Quantize it again: remove the rule, or paste this behind it.", _quantized(checked, ops)
    if "switched off" in reason:
        return "Switch the point on again: region.points[name].enabled = True.", ""
    if reason.startswith("profile"):
        return "Use an op that the hardware has, or accept the fallback.", ""
    return (
        "Use a function that has a quantized form, or move the op to the beginning or the end of the region.",
        "",
    )


def _quantized(checked: CheckedRegion, ops: list[FloatOp]) -> str:
    floats = checked.plan.float_points
    names = [n for f in ops for n in (*f.inputs, f"{f.op.name}.output") if floats.get(n, "").startswith("float32 by")]
    defaults = {role: str(checked.plan.qconfig[role]["dtype"]) for role in ("activation", "weight")}
    dtypes = {role: "int8" if dtype == FLOAT else dtype for role, dtype in defaults.items()}
    return overrides_yaml(
        f"match: {yaml_name(name)}, {role_of(name)}: {{dtype: {dtypes[role_of(name)]}}}"
        for name in dict.fromkeys(names)
    )
