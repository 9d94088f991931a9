"""Why an override matched no point: an error that says what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_qat.quantization.errors import ConfigurationError, near_names
from lightning_qat.quantization.op_graph import OpGraph
from lightning_qat.quantization.plan import OpPlan
from lightning_qat.quantization.qconfig import Override


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
        float_points: places without one, with the reason.
        status: what happens to each op.
    """
    matching = [n for n in float_points if override.selects(n, graph.by_name[n.rpartition(".")[0]].kind)]
    if matching:
        return ConfigurationError(
            f"override ({override.label}) matches only points that stay float: "
            + "; ".join(f"{n}: {float_points[n]}" for n in matching[:3])
        )
    floats = [o for o in status.values() if override.selects(f"{o.name}.output", graph.by_name[o.name].kind)]
    if floats:
        op = min(floats, key=lambda o: ("fused", "float", "passes", "quantized", "constant").index(o.status))
        return ConfigurationError(
            f"override ({override.label}) matches ops without quantization points, such as {op.name} "
            f"({op.status}{': ' + op.reason if op.reason else ''}), or changes only "
            f"{'weights' if override.weight else 'activations'} where there are none."
        )
    choices = {*points, *float_points, *status, *(op.scope for op in graph.ops if op.scope)}
    if override.match is None:
        choices = {op.kind for op in graph.ops if op.role in ("quantize", "join")}
    near = near_names(override.match or override.op_type, sorted(choices))
    hint = f" Near names: {', '.join(near)}." if near else ""
    return ConfigurationError(f"override ({override.label}) matches no quantization point.{hint}")
