"""Which types the ops read and write, and the configuration of every layer. Tables only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lightning_qat.analysis.model_check.checked_region import CheckedRegion, module_type
from lightning_qat.analysis.model_check.finding import Finding, shortened
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.quantization.functions.function_table import FLOAT_INSIDE
from lightning_qat.quantization.region.effective_dtypes import FLOAT, bits
from lightning_qat.quantization.tracing.op_graph import Op, Operand

QUANTIZE, DEQUANTIZE = "quantize", "dequantize"
"""Types of the rows for points at the inputs of ops, and for quantized tensors that leave the region."""


def check_dtype_statistics(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """Count the types that each type of op reads and writes."""
    inputs: dict[str, Counter[str]] = {}
    outputs: dict[str, Counter[str]] = {}
    for kind, read, written in _rows(checked):
        inputs.setdefault(kind, Counter()).update(read)
        outputs.setdefault(kind, Counter()).update(written)
    return list(_computing_in_float(checked)), [
        _statistics("input dtype statistics:", inputs, "A7"),
        _statistics("output dtype statistics:", outputs, "A8"),
    ]


def check_layer_configuration(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """List types, channel axis and scale source of every activation and weight."""
    columns = ("Module Name", "Module Type", "Input dtype", "out dtype", "ch_axis", "observer")
    weights = ("Module Name", "Module Type", "weight dtype", "ch_axis", "observer")
    return [], [
        Section("Each layer out qconfig:", columns, tuple(_activation_rows(checked)), "A9"),
        Section("Each layer weight qconfig:", weights, tuple(_weight_rows(checked)), "A9"),
    ]


def leaving_quantized(checked: CheckedRegion) -> dict[str, tuple[Op, str]]:
    """Return the ops whose quantized result leaves the region, by the path of the output, with the type."""
    found: dict[str, tuple[Op, str]] = {}
    for output in checked.graph.outputs:
        for origin in checked.dtypes.origins(output.sources):
            dtype = checked.dtypes.of_origin(origin)
            if dtype != FLOAT:
                found[output.path] = checked.graph.by_name[origin.name], dtype
    return found


def is_float_inside(checked: CheckedRegion, op: Op) -> bool:
    """Whether an op computes in float between quantized operands and a quantized result, as an LSTM does."""
    return op.kind in FLOAT_INSIDE and checked.dtypes.of_output(op) != FLOAT


def _computing_in_float(checked: CheckedRegion) -> Iterable[Finding]:
    """Say where quantized tensors go in and out and the computation between them is not that of the device."""
    by_reason: dict[str, list[Op]] = {}
    for op in checked.computing:
        if is_float_inside(checked, op):
            by_reason.setdefault(op.reason, []).append(op)
    for reason, ops in by_reason.items():
        names = tuple(op.name for op in ops)
        yield Finding(
            severity="info",
            kind="float inside",
            requirement="A7",
            names=names,
            what=f"{shortened(names)} {'compute' if len(names) > 1 else 'computes'} in float32 between quantized "
            f"tensors: {reason}.",
            why="A device that quantizes them too is less accurate than what is measured here.",
            action=_WRITE_OUT_ATTENTION if ops[0].kind == "scaled_dot_product_attention" else _WRITE_OUT_CELL,
            location=ops[0].location if len({op.location for op in ops}) == 1 else "",
        )


_WRITE_OUT_CELL = (
    "Measure on the device. To quantize the gates as well, write the cell out in torch ops (linear, sigmoid, tanh, "
    "mul, add), its steps in `with dynamic_block(self, ...)`."
)
_WRITE_OUT_ATTENTION = (
    "Measure on the device. To quantize them as well, write the attention out: `torch.softmax(q @ k.transpose(-2, -1) "
    '* scale, dim=-1) @ v`. transformers does so with attn_implementation="eager", timm after '
    "timm.layers.set_fused_attn(False), nn.MultiheadAttention with need_weights=True."
)


def _rows(checked: CheckedRegion) -> Iterable[tuple[str, list[str], list[str]]]:
    """Type of each op with the types of its inputs and of its result."""
    dtypes = checked.dtypes
    for op in checked.computing:
        read = [(m, operand, dtypes.of_operand(m, operand)) for m, operand in checked.inputs(op)]
        for member, operand, dtype in read:
            if dtypes.point_of(member, operand) is not None and dtype != FLOAT:
                yield QUANTIZE, [dtypes.of_tensor(operand.sources)], [dtype]
        kind = checked.group_type(op)
        kind += f" ({FLOAT} inside)" if is_float_inside(checked, op) else ""
        yield kind, [dtype for *_, dtype in read], [dtypes.of_output(op)]
    for _, dtype in leaving_quantized(checked).values():
        yield DEQUANTIZE, [dtype], [FLOAT]


def _statistics(title: str, counts: dict[str, Counter[str]], requirement: str) -> Section:
    occurring = {dtype for counter in counts.values() for dtype in counter} - {FLOAT}
    dtypes = (FLOAT, *sorted(occurring, key=lambda name: (bits(name), name)))
    rows = [(kind, *(counter[dtype] for dtype in dtypes)) for kind, counter in counts.items()]
    total = sum(counts.values(), Counter())
    rows.append(("total", *(total[dtype] for dtype in dtypes)))
    return Section(title, ("module type", *dtypes), tuple(rows), requirement)


def _is_inner(checked: CheckedRegion, operand: Operand) -> bool:
    """Whether a tensor stays inside of what is fused: no tensor of the deployed model, it has no type of its own."""
    ops = (checked.graph.by_name[source.name] for source in operand.sources if source.kind == "op")
    return any(map(checked.is_inside_group, ops))


def _activation_rows(checked: CheckedRegion) -> Iterable[tuple[object, ...]]:
    dtypes, plan = checked.dtypes, checked.plan
    for op in checked.graph.ops:
        if not op.data_dependent or op.role in ("pass", "create") or not op.has_float_output:
            continue
        read = []
        for operand in op.operands:
            point = dtypes.point_of(op, operand)
            if point is not None and not plan.by_name[point].is_weight:
                before = dtypes.of_tensor(operand.sources)
                yield point, QUANTIZE, before, dtypes.points[point], _axis(checked, point), _source(checked, point)
            if operand.is_float and operand.role == "data" and not _is_inner(checked, operand):
                read.append(dtypes.of_operand(op, operand))
        name = f"{op.name}.output"
        status = plan.status[op.name]
        if name in plan.by_name:
            dtype, axis, source = dtypes.points[name], _axis(checked, name), _source(checked, name)
            source += f"; {status.reason}" if status.reason else ""
        elif status.status == "fused":
            dtype, axis, source = "", None, status.reason
        elif status.status == "passes" and name not in plan.float_points:
            dtype, axis, source = dtypes.of_output(op), None, status.reason
        else:
            dtype, axis, source = FLOAT, None, f"not quantized: {plan.float_points.get(name) or status.reason}"
        yield op.name, module_type(op), ", ".join(read), dtype, axis, source
    for path, (op, dtype) in leaving_quantized(checked).items():
        yield f"output {path}".rstrip(), DEQUANTIZE, dtype, FLOAT, None, f"leaves the region from {op.name}"


def _weight_rows(checked: CheckedRegion) -> Iterable[tuple[object, ...]]:
    plan = checked.plan
    kinds = {op.name: module_type(op) for op in checked.graph.ops}
    for op in checked.graph.ops:
        for point in plan.by_op.get(op.name, ()):
            if point.is_weight:
                dtype = checked.dtypes.points[point.name]
                yield point.name, kinds[op.name], dtype, _axis(checked, point.name), _source(checked, point.name)
        for name in checked.float_weights.get(op.name, ()):
            if name not in plan.float_points:
                continue
            yield name, kinds[op.name], FLOAT, None, f"not quantized: {plan.float_points[name]}"


def _axis(checked: CheckedRegion, point: str) -> int | None:
    return checked.plan.by_name[point].axis


def _source(checked: CheckedRegion, point: str) -> str:
    """Say where the scale of a point comes from."""
    plan, fake_quant = checked.plan.by_name[point], checked.points[point]
    if not fake_quant.enabled:
        return "not quantized: switched off"
    if fake_quant.fixed_scale is not None:
        return f"fixed scale {fake_quant.fixed_scale:.6g}"
    if fake_quant.scale_source is None and fake_quant.starts_at_zero:
        return "not quantized: does not vary until it is trained"
    if checked.is_calibrated and fake_quant.scale_source is None:
        return "not quantized: not reached by calibration"
    source = fake_quant.scale_source or fake_quant.observer
    source += ", learned" if fake_quant.learned else ""
    source += f", split {list(plan.split_sizes)}" if plan.split_sizes is not None else ""
    return source + (f", shared with {plan.same_as}" if plan.same_as is not None else "")
