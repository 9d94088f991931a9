"""Outputs that are put together by writing parts into one tensor: here each part keeps a scale of its own."""

from __future__ import annotations

from lightning_qat.analysis.model_check.checked_region import CheckedRegion
from lightning_qat.analysis.model_check.finding import Finding
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.analysis.statistics.point_ranges import observed_range
from lightning_qat.quantization.tracing.op_graph import Op, Operand, Source

_WRITES = frozenset(["setitem", "copy", "index_copy", "index_put"])
"""Kinds that write their second tensor into a part of their first."""


def check_written_outputs(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """Report an output of which one scale for all that is written into it would leave nothing of a part."""
    found = []
    for output in checked.graph.outputs:
        parts = _largest_by_maker(checked, output.sources)
        if len(parts) < 2:
            continue
        (big, (largest, quant_max)), *_ = sorted(parts.items(), key=lambda item: -item[1][0])
        step = largest / quant_max
        lost = {name: size for name, (size, _) in parts.items() if 0 < size <= step}
        if not lost:
            continue
        small = min(lost, key=lambda name: lost[name])
        path = f" {output.path!r}" if output.path else ""
        found.append(
            Finding(
                severity="warning",
                kind="written output",
                requirement="A11",
                names=tuple(name for name in parts if name in lost or name == big),
                what=f"The output{path} is written in place, part by part: {big} has values up to {largest:.3g}, "
                f"{small} up to {lost[small]:.3g}, which is less than one step of {step:.3g}.",
                why="Here each part keeps a scale of its own. A device that quantizes the whole tensor with one scale "
                f"leaves nothing of {small}.",
                action="Return the parts apart, or bring them to one unit. To see here what the device computes, write "
                "torch.cat instead: the plan quantizes its result.",
            )
        )
    return found, []


def _largest_by_maker(checked: CheckedRegion, sources: tuple[Source, ...]) -> dict[str, tuple[float, int]]:
    """Map each quantized op whose result is written into a tensor to its largest magnitude and its largest code."""
    found: dict[str, tuple[float, int]] = {}
    for origin in _written(checked, sources):
        point = checked.points.get(f"{origin.name}.output")
        ends = observed_range(point) if point is not None and point.scale_source is not None else None
        if point is not None and ends is not None:
            found[origin.name] = max(map(abs, ends)), point.quant_max
    return found


def _written(checked: CheckedRegion, sources: tuple[Source, ...]) -> list[Source]:
    """Where the values come from that were written into a tensor; a quantized result is one value."""
    writes: dict[str, list[Op]] = {}
    for write in checked.graph.ops:
        if _is_write(write):
            for target in _floats(write)[0].sources:
                writes.setdefault(_viewed(checked, target).name, []).append(write)
    found: list[Source] = []
    seen: set[str] = set()
    pending = [*checked.dtypes.origins(sources)]
    while pending:
        source = pending.pop()
        if source.name in seen:
            continue
        seen.add(source.name)
        if f"{source.name}.output" in checked.points:
            found.append(source)
            continue
        op = checked.graph.by_name.get(source.name) if source.kind in ("op", "mutated") else None
        own = [op] if op is not None and _is_write(op) else []
        for write in (*own, *(writes.get(source.name, []) if source.kind == "mutated" else ())):
            before, *_, value = _floats(write)
            pending += checked.dtypes.origins(before.sources)
            found += checked.dtypes.origins(value.sources)
    return found


def _viewed(checked: CheckedRegion, source: Source) -> Source:
    """The tensor of which another one is a view."""
    op = checked.graph.by_name.get(source.name)
    while source.kind == "op" and op is not None and op.role == "pass" and _floats(op) and _floats(op)[0].sources:
        source = _floats(op)[0].sources[0]
        op = checked.graph.by_name.get(source.name)
    return source


def _is_write(op: Op) -> bool:
    return op.kind in _WRITES and len(_floats(op)) > 1


def _floats(op: Op) -> list[Operand]:
    return [operand for operand in op.operands if operand.is_float]
