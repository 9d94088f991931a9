"""Where the cause of a point's error lies, if it is not the point: in a rule of the user, before it, in the pipeline.

The diagnosis looks at one point at a time. A page knows the plan, the layer comparison and the pipeline check as well,
so it can say what has to be mended first. It offers no override where one would cover the cause.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from lightning_qat.analysis.diagnosis.diagnosis_result import Diagnosis, DiagnosisResult
from lightning_qat.analysis.diagnosis.remedy_choice import LEAVE_OUT, REMOVE_SCALE
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.reporting.html.point_history import PointKey, full_name, point_key
from lightning_qat.reporting.html.provenance import configuration_of
from lightning_qat.reporting.html.run_folder import LADDER_FILES, RunFolder

_RULE = re.compile(r"override (?P<number>\d+) \(.*\)")
_PIPELINE_FIRST = "Mend the pipeline first, then run again: this may follow from it."


def with_causes(run: RunFolder) -> RunFolder:
    """Let what the diagnoses of a run advise begin where the cause lies, and say what follows from which point.

    Args:
        run: its files, as they were read.
    """
    rules, before = rules_with_fixed_scale(run), followers(run)
    is_pipeline = pipeline_is_at_fault(run)

    def advised(result: DiagnosisResult | None) -> DiagnosisResult | None:
        if result is None:
            return None
        return replace(result, rows=tuple(_advised(row, rules, before, is_pipeline) for row in result.rows))

    return replace(run, diagnosis=advised(run.diagnosis), start_diagnosis=advised(run.start_diagnosis), follows=before)


def bad_ladder(run: RunFolder) -> tuple[str, PipelineResult] | None:
    """Return the most complete pipeline check that found something, with the name of its file.

    Args:
        run: its files.
    """
    bad = ((name, run.ladders[name]) for name in LADDER_FILES if name in run.ladders and run.ladders[name].is_bad)
    return next(bad, None)


def pipeline_is_at_fault(run: RunFolder) -> bool:
    """Whether a pipeline check blames something else than quantization.

    Args:
        run: its files.
    """
    ladder = bad_ladder(run)
    return ladder is not None and ladder[1].verdict != "quantization error"


def followers(run: RunFolder) -> dict[PointKey, str]:
    """Return the points whose error comes from a point before them that is at least as bad, with its name.

    The layer comparison has to say so of both, and the op of the one has to lead to the op of the other.

    Args:
        run: its files.
    """
    origins = {point_key(row.get("region"), row.get("point") or ""): row.get("origin") for row in run.comparison.rows}
    culprits: dict[PointKey, Diagnosis] = {}
    for result in (run.start_diagnosis, run.diagnosis):
        culprits.update({point_key(r.region, r.point): r for r in (result.culprits if result is not None else ())})
    causes = [key for key in culprits if origins.get(key) == "own"]
    ops, inputs = _ops_of_points(run), _inputs_of_ops(run)
    found = {}
    for key, row in culprits.items():
        if origins.get(key) == "inherited":
            upstream = _ops_before(ops.get(key), inputs)
            able = [c for c in causes if ops.get(c) in upstream and culprits[c].severity >= row.severity]
            if able:
                found[key] = full_name(max(able, key=lambda cause: culprits[cause].severity))
    return found


def rules_with_fixed_scale(run: RunFolder) -> dict[PointKey, str]:
    """Return the points that have a fixed scale from an override, with where that override stands.

    Args:
        run: its files.
    """
    found, configuration = {}, configuration_of(run.provenance)
    for region, held in run.regions.items():
        overrides = held.get("overrides")
        for point in held.get("points", []):
            match = _RULE.match(str(point.get("reason")))
            if isinstance(overrides, list) and match and 0 < int(match["number"]) <= len(overrides):
                rule = overrides[int(match["number"]) - 1]
                kinds = [rule.get(kind) for kind in ("activation", "weight")] if isinstance(rule, dict) else []
                if any(isinstance(kind, dict) and kind.get("fixed_scale") is not None for kind in kinds):
                    found[point_key(region, point.get("name"))] = f"{match.group()} of {configuration}"
    return found


def _advised(
    row: Diagnosis, rules: Mapping[PointKey, str], before: Mapping[PointKey, str], pipeline: bool
) -> Diagnosis:
    key = point_key(row.region, row.point)
    if row.verdict in ("fine", "inherited"):
        return row
    if pipeline:
        then = f" If it does not: {row.action}" if row.action else ""
        return replace(row, action=_PIPELINE_FIRST + then)
    if key in before:
        action = (
            f"Mend {before[key]} first, and calibrate again. In the quantized model most of the error here comes from "
            "there, and this range was made for what passes through it: judge this point anew after that."
        )
        return replace(row, action=action, yaml="", factor=None)
    end = max(
        (row.action.find(words) + len(words) for words in (LEAVE_OUT, REMOVE_SCALE) if words in row.action), default=0
    )
    if end and key in rules:
        action = f"{row.action[:end]} It stands in {rules[key]}. This point needs no other override."
        return replace(row, action=action, yaml="")
    return row


def _ops_of_points(run: RunFolder) -> dict[PointKey, PointKey]:
    """Region and op of every point; of points with one name, that of the first."""
    found: dict[PointKey, PointKey] = {}
    for region, held in run.regions.items():
        for point in held.get("points", []):
            found.setdefault(point_key(region, point.get("name")), point_key(region, point.get("op")))
    return found


def _inputs_of_ops(run: RunFolder) -> dict[PointKey, list[PointKey]]:
    """The ops that lead straight to an op; all by region and name."""
    return {
        point_key(region, op.get("name")): [point_key(region, name) for name in _names(op.get("inputs"))]
        for region, held in run.regions.items()
        for op in held.get("ops", [])
    }


def _ops_before(op: PointKey | None, inputs: Mapping[PointKey, list[PointKey]]) -> set[PointKey]:
    """All ops that lead to an op; none if it is not known."""
    found: set[PointKey] = set()
    waiting = [] if op is None else list(inputs.get(op, ()))
    while waiting:
        before = waiting.pop()
        if before not in found:
            found.add(before)
            waiting += inputs.get(before, ())
    return found


def _names(inputs: object) -> Iterator[str]:
    for name in inputs if isinstance(inputs, list) else []:
        if isinstance(name, str):
            yield name
