"""Why an override matched no point: an error that says what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_qat.quantization.errors import ConfigurationError, near_names
from lightning_qat.quantization.overrides import Override
from lightning_qat.quantization.planning.plan import OpPlan
from lightning_qat.quantization.tracing.op_graph import OpGraph


def unmatched_override(
    override: Override,
    graph: OpGraph,
    points: Iterable[str],
    float_points: Mapping[str, str],
    status: Mapping[str, OpPlan],
) -> ConfigurationError:
    """Build the error for an override that changed nothing.

    Args:
        override: the rule.
        graph: the traced ops.
        points: names of the quantization points.
        float_points: places that stay float, each with the reason.
        status: the decision about each op.
    """
    selected = [n for n in (*points, *float_points) if override.selects(n, graph.by_name[n.rpartition(".")[0]].kind)]
    right = [n for n in selected if n in float_points and (override.weight if _is_weight(n) else override.activation)]
    if right:
        return ConfigurationError(
            f"override ({override.label}) matches only points that stay float: "
            + "; ".join(f"{n}: {float_points[n]}" for n in right[:3])
        )
    ops = [o for o in status.values() if override.selects(f"{o.name}.output", graph.by_name[o.name].kind)]
    if selected:
        return ConfigurationError(_wrong_key(override, selected, [o for o in ops if o.status == "fused"]))
    if ops:
        op = min(ops, key=lambda o: ("fused", "float", "passes", "quantized", "constant").index(o.status))
        return ConfigurationError(
            f"override ({override.label}) matches ops without quantization points, such as {op.name} "
            f"({op.status}{': ' + op.reason if op.reason else ''})."
        )
    choices = {*points, *float_points, *status, *(op.scope for op in graph.ops if op.scope)}
    if override.match is None:
        choices = {op.kind for op in graph.ops if op.role in ("quantize", "join")}
    near = near_names(override.match or override.op_type, sorted(choices))
    hint = f" Near names: {', '.join(near)}." if near else ""
    return ConfigurationError(f"override ({override.label}) matches no quantization point.{hint}")


def _wrong_key(override: Override, selected: list[str], fused: list[OpPlan]) -> str:
    """Say which key would have changed what the rule matches, and where the output of a fused op is."""
    given, needed = ("activation", "weight") if override.weight is None else ("weight", "activation")
    change = override.activation or override.weight
    values = {
        name: value for name in ("dtype", "observer", "percentile") if (value := getattr(change, name)) is not None
    }
    written = ", ".join(f"{name}: {value}" for name, value in (values or {"dtype": "int16"}).items())
    names = ", ".join(selected[:3]) + (f" and {len(selected) - 3} more" if len(selected) > 3 else "")
    message = (
        f"override ({override.label}) has {given}: and matches only {needed} points: {names}. To change these, write "
        f"{needed}: {{{written}}} instead."
    )
    if fused and given == "activation":
        message += f" The output of {fused[0].name} has no point of its own ({fused[0].reason})."
    return message


def _is_weight(point: str) -> bool:
    return point.rpartition(".")[2].startswith("weight")
