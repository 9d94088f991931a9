"""Outputs of the region that leave with the wrong type: wide integers, or fewer bits than needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from lightning_qat.analysis.model_check.checked_region import CheckedRegion
from lightning_qat.analysis.model_check.dtype_check import leaving_quantized
from lightning_qat.analysis.model_check.finding import Finding, Severity, overrides_yaml, shortened
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.quantization.overrides import yaml_name
from lightning_qat.quantization.region.effective_dtypes import FLOAT, bits
from lightning_qat.quantization.tracing.op_graph import Op

LOW_PRECISION_BITS = 8
_OPS_BACK = 50  # how far to look for the GEMM behind an output


def check_outputs(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """Report outputs that leave as a wide integer, or with low precision."""
    wide: dict[str, tuple[Op, str]] = {}
    free: dict[str, tuple[Op, str]] = {}
    low: dict[str, tuple[Op, str]] = {}
    for path, (op, dtype) in leaving_quantized(checked).items():
        if bits(dtype) > LOW_PRECISION_BITS:
            if _is_gemm(checked, op):
                wide[path] = op, dtype
        else:
            (free if _is_gemm(checked, op) else low)[path] = op, dtype
    return [
        *_from_gemm(checked, wide, "error", "wide integer output", "A10", _ONLY_A_ROUNDING),
        *_from_gemm(checked, free, "warning", "low-precision output", "A11", _NEVER_REPAIRED),
        *_from_others(checked, low),
    ], []


_ONLY_A_ROUNDING = (
    "The accumulator of a matrix product can leave as float32 at no cost (high-precision output): this only adds a "
    "rounding, and is nearly always a mistake in the configuration."
)
_NEVER_REPAIRED = (
    "Nothing behind it can repair the rounding, and a matrix product can give float32 at no cost (the default)."
)


def _from_gemm(
    checked: CheckedRegion,
    outputs: dict[str, tuple[Op, str]],
    severity: Severity,
    kind: str,
    requirement: str,
    why: str,
) -> Iterable[Finding]:
    if outputs:
        yield Finding(
            severity=severity,
            kind=kind,
            requirement=requirement,
            names=_names(outputs),
            what=f"{_outputs(outputs)} although the result comes from a matrix product ({_rules(checked, outputs)}).",
            why=why,
            action="Let it leave as float32: remove the rule that names it, or paste this behind it.",
            yaml=_yaml(outputs, FLOAT),
        )


def _from_others(checked: CheckedRegion, low: dict[str, tuple[Op, str]]) -> Iterable[Finding]:
    if low:
        better = _better(checked, low)
        yield Finding(
            severity="warning",
            kind="low-precision output",
            requirement="A11",
            names=_names(low),
            what=f"{_outputs(low)}, not from a matrix product: {'; '.join(_between(checked, low))}.",
            why="Nothing behind it can repair the rounding, and only a matrix product gives float32 at no cost.",
            action=(f"Let it leave as {better}, or move" if better else "Move")
            + " the op behind the region, into the loss or the post-processing.",
            yaml=_yaml(low, better) if better else "",
        )


def _is_gemm(checked: CheckedRegion, op: Op) -> bool:
    return op.gemm or (op.kind == "batch_norm" and checked.head(op).gemm)


def _names(outputs: dict[str, tuple[Op, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(op.name for op, _ in outputs.values()))


def _outputs(outputs: dict[str, tuple[Op, str]]) -> str:
    formatted = shortened(
        f"{f'{path!r} ' if path else ''}({op.name}) as {dtype}" for path, (op, dtype) in outputs.items()
    )
    return f"{'Outputs leave' if len(outputs) > 1 else 'The output leaves'} the region quantized: {formatted}"


def _rules(checked: CheckedRegion, outputs: dict[str, tuple[Op, str]]) -> str:
    reasons = (checked.plan.by_name[f"{name}.output"].reason for name in _names(outputs))
    return f"by {shortened(dict.fromkeys(reasons))}"


def _between(checked: CheckedRegion, outputs: dict[str, tuple[Op, str]]) -> Iterable[str]:
    """Say what is between the last matrix product and each output."""
    seen = [checked.graph.by_name[name] for name in _names(outputs)]
    for op in seen[:3]:
        gemm, between = _last_gemm(checked, op)
        path = " -> ".join(f"{o.name} ({o.kind})" for o in reversed(between))
        yield f"behind {gemm.name} come {path}" if gemm is not None else f"it is the result of {op.name} ({op.kind})"
    if len(seen) > 3:
        yield f"and {len(seen) - 3} more"


def _last_gemm(checked: CheckedRegion, op: Op) -> tuple[Op | None, list[Op]]:
    """Look for the nearest matrix product that an op depends on; return it and what lies between, last one first."""
    paths: dict[str, list[Op]] = {op.name: [op]}
    pending = deque([op])
    while pending and len(paths) < _OPS_BACK:
        here = pending.popleft()
        sources = (s for operand in here.operands if operand.is_float for s in operand.sources)
        for origin in checked.dtypes.origins(sources):
            before = checked.graph.by_name.get(origin.name) if origin.kind in ("op", "mutated") else None
            if before is None or before.name in paths or not before.data_dependent:
                continue
            if before.gemm:
                return before, paths[here.name]
            paths[before.name] = [*paths[here.name], before]
            pending.append(before)
    return None, [op]


def _better(checked: CheckedRegion, outputs: dict[str, tuple[Op, str]]) -> str | None:
    """A type that all these outputs can have instead."""
    profile = checked.profile
    if profile is None:
        return "int16"
    rules = [profile.rules.get(checked.head(op).kind) for op, _ in outputs.values()]
    choices = [dtype for dtype in ("int16", FLOAT) if all(rule and dtype in rule.outputs() for rule in rules)]
    return choices[0] if choices else None


def _yaml(outputs: dict[str, tuple[Op, str]], dtype: str) -> str:
    points = (f"{name}.output" for name in _names(outputs))
    return overrides_yaml(f"match: {yaml_name(point)}, activation: {{dtype: {dtype}}}" for point in points)
