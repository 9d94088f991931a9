"""The errors of several regions as those of one model: one list of points, and errors in one unit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from lightning_qat.analysis.mixed_precision.op_costs import OpCost
from lightning_qat.analysis.mixed_precision.point_errors import Check, PointError, finite_error
from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from lightning_qat.analysis.mixed_precision.region_effects import RegionEffects


def merged_errors(
    results: Mapping[str, PrecisionErrors],
    effects: RegionEffects,
    names: Mapping[str, Callable[[str], str]],
    types: Sequence[str],
) -> PrecisionErrors:
    """Put the errors of regions together; points get the path of their region before their name, as in overrides.

    The errors of a region are about its own output. Those of the largest points were measured at the final outputs too;
    the others are multiplied by what the error of the whole region does to the final outputs.

    Args:
        results: the errors of each region, measured at its own output.
        effects: of each region on the final outputs; and of some points alone at their narrowest type, by region and
            point, and of all points at each type, by type.
        names: what :func:`naming` returns.
        types: all types, the narrowest, which the regions had for ``effects.alone``, first.
    """
    rows: list[PointError] = []
    ops: list[OpCost] = []
    together: dict[str, tuple[str, ...]] = {}
    narrowest = types[0]
    together_at = {dtype: effects.chosen[dtype] for dtype in types if dtype in effects.chosen}
    predicted: dict[str, float] = dict.fromkeys(together_at, 0.0)
    not_reached: list[str] = []
    for path, result in results.items():
        name = names[path]
        measured = {check.dtype: check.measured for check in result.checks}
        own = measured.get(narrowest, next(iter(measured.values()), 0.0))
        factor = effects.alone.get(path, 0.0) / own if own > 0 else 0.0
        for row in result.rows:
            known = effects.chosen.get((path, row.point)) if row.dtype == narrowest else None
            rows.append(_row(row, name, factor, known))
        ops += [_op(op, name) for op in result.ops]
        together |= {name(point): tuple(map(name, others)) for point, others in result.together.items()}
        not_reached += map(name, result.not_reached)
        for check in result.checks:
            if check.dtype in predicted:
                predicted[check.dtype] += factor * check.predicted
    first = next(iter(results.values()))
    where = f"the outputs of {', '.join(effects.finals)}" if effects.compared else "the output of each region"
    return PrecisionErrors(
        tuple(rows),
        output=f"{where}, relative to their mean square",
        batches=first.batches,
        power=1.0,
        checks=tuple(Check(dtype, predicted[dtype], error) for dtype, error in together_at.items()),
        together=together,
        ops=tuple(ops),
        latency=first.latency,
        not_reached=tuple(not_reached),
    )


def naming(paths: Collection[str]) -> dict[str, Callable[[str], str]]:
    """Return, for each region by its path, the function that names its points and ops in the whole model.

    Example:
        >>> [name("fc.weight") for name in naming(["backbone", "head"]).values()]
        ['backbone.fc.weight', 'head.fc.weight']
        >>> naming(["backbone"])["backbone"]("fc.weight")
        'fc.weight'
    """
    return {path: partial(_named, f"{path}." if path and len(paths) > 1 else "") for path in paths}


def _named(prefix: str, name: str) -> str:
    return f"{prefix}{name}"


def _row(row: PointError, name: Callable[[str], str], factor: float, measured: float | None) -> PointError:
    named = replace(row, point=name(row.point), op_name=name(row.op_name))
    if measured is not None:
        return replace(named, mse=measured, standard_error=0.0, exact=True)
    error = None if row.standard_error is None or row.exact else row.standard_error * factor
    return replace(named, mse=finite_error(row.mse * factor), standard_error=error, exact=False)


def _op(op: OpCost, name: Callable[[str], str]) -> OpCost:
    operands = tuple(tuple(map(name, points)) for points in op.operands)
    return replace(op, name=name(op.name), operands=operands, points=tuple(map(name, op.points)))
