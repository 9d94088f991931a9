"""Rules that take the first points of a sensitivity table: each becomes plain rules, one for each point.

A plan holds the plain rules only. So the table is read once, when the plan is made, and a checkpoint does not need it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from lightning_qat.quantization.errors import DamagedFileError, SensitivityTableError, near_names
from lightning_qat.quantization.numerics.break_away import break_away
from lightning_qat.quantization.overrides import LEADERS, Override
from lightning_qat.quantization.planning.target_paths import possible_points
from lightning_qat.quantization.reading.checks import AT_LEAST_ZERO, Check
from lightning_qat.quantization.reading.files import Document
from lightning_qat.quantization.reading.plain_values import UnreadableValueError
from lightning_qat.quantization.reading.schema import read_as
from lightning_qat.quantization.shares import count_of
from lightning_qat.quantization.tracing.op_graph import OpGraph


@dataclass(frozen=True)
class _Row:
    """What is read of a row of the table; it holds more."""

    point: Annotated[str, Check(bool, "the name of a point")]
    score: Annotated[float, AT_LEAST_ZERO]
    region: str = ""

    @property
    def is_weight(self) -> bool:
        return self.point.rpartition(".")[2].startswith("weight")


def plain_rules(rules: Sequence[Override], graphs: Mapping[str, OpGraph]) -> tuple[list[Override], list[str]]:
    """Put rules that name the points in the place of those that name a sensitivity table.

    Args:
        rules: as the user wrote them.
        graphs: the traced ops of each target, by its path: points of a table must be of these.

    Returns:
        The rules, and for each table a sentence that says which points were taken of how many.

    Raises:
        SensitivityTableError: a table cannot be read or is of another model, no point has broken away from the rest,
            or there is none of the kind that a rule changes.
    """
    plain: list[Override] = []
    notes = []
    for rule in rules:
        if rule.sensitivity is None:
            plain.append(rule)
        else:
            try:
                found, note = _rules_of_table(rule, graphs)
            except DamagedFileError as error:
                raise SensitivityTableError(str(error)) from error
            plain += found
            notes.append(note)
    return plain, notes


def _rules_of_table(rule: Override, graphs: Mapping[str, OpGraph]) -> tuple[list[Override], str]:
    table = Document(
        str(rule.sensitivity), "a sensitivity table of this model", "give the sensitivity.csv of a run of it"
    )
    rows = _with_names(_rows(table), graphs, table)
    kinds = [kind for kind, change in (("activation", rule.activation), ("weight", rule.weight)) if change is not None]
    counted = [row for row in rows if ("weight" if row.is_weight else "activation") in kinds]
    if not counted:
        raise SensitivityTableError(f"override ({rule.label}) changes {kinds[0]} points only, and the table has none.")
    ranked = sorted(counted, key=lambda row: -math.inf if math.isnan(row.score) else -row.score)
    chosen = ranked[: _how_many(rule, [row.score for row in ranked])]
    found = [
        Override(match=row.point, weight=rule.weight)
        if row.is_weight
        else Override(row.point, activation=rule.activation)
        for row in chosen
    ]
    names = [row.point for row in chosen]
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    population = f"{' and '.join(kinds)} points" if len(kinds) == 1 else "points"
    return found, f"override ({rule.label}): {len(chosen)} of the {len(counted)} {population} in the table: {listed}."


def _rows(table: Document) -> list[_Row]:
    rows = table.last_epoch()
    if not rows:
        raise table.error("it has no rows")
    missing = [name for name in ("point", "score") if name not in rows[0]]
    if missing:
        raise table.error(f"it has no column {' and '.join(missing)}, only {', '.join(map(repr, list(rows[0])[:8]))}")
    with table.checked():
        return [_row(row, index) for index, row in enumerate(rows)]


def _row(row: Mapping[str, str], index: int) -> _Row:
    try:
        score: float | str = float(row["score"])
    except ValueError:
        score = row["score"]
    try:
        return read_as(_Row, {**row, "score": score}, ignore_unknown=True)
    except UnreadableValueError as error:
        raise error.inside(f"rows[{index}]") from None


def _with_names(rows: list[_Row], graphs: Mapping[str, OpGraph], table: Document) -> list[_Row]:
    """Return the rows with names that a rule can match, each once: with the target's path if there are several."""
    paths = dict.fromkeys(row.region for row in rows)
    if len(graphs) == len(paths) == 1:  # a part of a model has other paths than the whole, and the same names
        targets = dict(zip(paths, graphs, strict=True))
    else:
        targets = {path: path for path in graphs}
        if others := [path for path in paths if path not in targets]:
            raise table.error(f"it is about {_listed(others)}, and what is quantized here is {_listed(graphs)}")
    known = {path: {name for op in graph.ops for name in possible_points(op)} for path, graph in graphs.items()}
    foreign = [row for row in rows if row.point not in known[targets[row.region]]]
    if foreign:
        ops = list(dict.fromkeys(row.point.rpartition(".")[0] for row in foreign))
        near = near_names(ops[0], [op.name for op in graphs[targets[foreign[0].region]].ops])
        hint = f" (near {ops[0]} there {'is' if len(near) == 1 else 'are'} {', '.join(near)})" if near else ""
        raise table.error(
            f"{len(foreign)} of its {len(rows)} points are of ops that this model does not have: {_listed(ops)}{hint}"
        )
    named: dict[str, _Row] = {}
    for row in rows:
        path = targets[row.region]
        name = f"{path}.{row.point}" if len(graphs) > 1 and path else row.point
        named.setdefault(name, _Row(name, row.score, row.region))
    return list(named.values())


def _how_many(rule: Override, scores: list[float]) -> int:
    if rule.top != LEADERS:
        return math.ceil(
            count_of(str(rule.top), len(scores), "top") - 1e-9
        )  # a tenth of 50 is 5, whatever the rounding
    leaders = break_away([score for score in scores if score > 0 or math.isnan(score)])
    if not leaders:
        largest = ", ".join(f"{score:.3g}" for score in scores[:4])
        raise SensitivityTableError(
            f"override ({rule.label}) changes nothing: no point has broken away from the rest (the largest scores are "
            f"{largest}). Write a count or a percentage, such as top: 1."
        )
    return leaders


def _listed(names: Iterable[str]) -> str:
    quoted = [repr(name) if name else "the whole model" for name in names]
    return ", ".join(quoted[:5]) + (f" and {len(quoted) - 5} more" if len(quoted) > 5 else "")
