"""What stands behind a report: what was not analysed and why, other runs beside this one, and how it came about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_qat.analysis.results import Block
from lightning_qat.analysis.runs.run_comparison import compare_runs
from lightning_qat.analysis.runs.run_files import log_directory
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.reporting.html.findings import SOURCES
from lightning_qat.reporting.html.judged_run import JudgedRun
from lightning_qat.reporting.html.point_history import full_name
from lightning_qat.reporting.html.provenance import read_configurations, read_hashes
from lightning_qat.reporting.html.run_folder import Gap, RunFolder

_MOST_NAMES = 8
_MOST_ROWS = 40
_MOST_FLOAT = 200


@dataclass(frozen=True)
class Background:
    """How a run came about.

    Args:
        facts: pairs of label and value.
        configurations: texts of configuration files by name.
    """

    facts: tuple[tuple[str, str], ...]
    configurations: dict[str, str]


def find_gaps(run: RunFolder) -> tuple[Gap, ...]:
    """Say what the report does not show, and why.

    Args:
        run: its files.
    """
    return (*run.gaps, *_missing(run), *_left_out(run), *_undecided(run))


def float_places(run: RunFolder) -> Block:
    """Return the places that could be quantized and are not, with the reason.

    Args:
        run: its files.
    """
    rows = []
    for region, held in run.regions.items():
        places = held.get("float_points")
        for name, reason in places.items() if isinstance(places, dict) else ():
            rows.append((full_name((region, str(name))), str(reason)))
    more = len(rows) - _MOST_FLOAT
    note = f"{more} more are in quant_plan.json." if more > 0 else ""
    return Block("Places in float", ("place", "reason"), tuple(rows[:_MOST_FLOAT]), note) if rows else Block()


def compared_runs(judged: Sequence[JudgedRun]) -> tuple[Block, ...]:
    """Put the last run beside the others.

    Args:
        judged: the earliest first.
    """
    if len(judged) < 2:
        return ()
    runs = [one.run for one in judged]
    metrics = dict.fromkeys(row.metric for run in runs if run.accuracy is not None for row in run.accuracy.rows)
    rows = []
    for run, one in zip(runs, judged, strict=True):
        levels = [finding.advice.level for finding in one.overview.findings]
        types = one.points.column("dtype")
        counts = ", ".join(f"{types.count(kind)} {kind}" for kind in dict.fromkeys(t for t in types if t))
        values = [_newest(run, metric) for metric in metrics]
        rows.append((run.name, one.overview.verdict, *values, levels.count("error"), levels.count("warning"), counts))
    columns = ("run", "verdict", *metrics, "errors", "warnings", "points")
    blocks = [Block("Runs side by side", columns, tuple(rows))]
    for before in runs[:-1]:
        blocks += _compared(before, runs[-1])
    return tuple(blocks)


def background(run: RunFolder) -> Background:
    """Return how the run came about.

    Args:
        run: its files.
    """
    root = log_directory(run.path)
    held = run.provenance
    facts: list[tuple[str, str]] = [("folder", str(run.path.resolve()))]
    command = held.get("command")
    if isinstance(command, list):
        facts.append(("command", " ".join(map(str, command))))
    known = ("seed", "time", "checkpoint", "platform")
    facts += [(name, str(held[name])) for name in known if held.get(name) is not None]
    versions = held.get("versions")
    facts += [(str(name), str(value)) for name, value in versions.items()] if isinstance(versions, dict) else []
    facts += [(f"SHA-256 of {name}", digest) for name, digest in read_hashes(run.path, root).items()]
    return Background(tuple(facts), read_configurations(root))


def _missing(run: RunFolder) -> Iterator[Gap]:
    wanted: tuple[tuple[Any, str, str], ...] = (
        (run.accuracy, "accuracy", "AccuracyTable() was not in this run, so nothing says whether a target is reached"),
        (run.model_check, "model check", "ModelCheck() was not in this run"),
        (run.ladders, "pipeline", "PipelineCheck() was not in this run, so the pipeline itself was not tested"),
        (run.convergence, "convergence", "ConvergenceMonitor() was not in this run"),
        (run.statistics.latest, "values of the points", "LayerStatistics() was not in this run, or has no scales yet"),
        (run.sensitivity.latest, "sensitivity", "SensitivityAnalysis() was not in this run, or has no scales yet"),
        (run.comparison.rows, "error along the depth", "LayerComparison() was not in this run, or has not run yet"),
        (run.diagnosis or run.start_diagnosis, "diagnosis", "it is made by LayerComparison()"),
        (run.provenance, "command and versions", "HTMLReport() was not in this run"),
    )  # fmt: skip
    return (Gap(what, f"{why}.") for held, what, why in wanted if not held)


def _left_out(run: RunFolder) -> Iterator[Gap]:
    about = run.sensitivity_table.about
    for name, why in (
        ("left_out", "not measured in the last analysis (max_points); other epochs may have them"),
        ("not_reached", "no batch ran their op"),
        ("uncalibrated", "they have no scale"),
        ("without_gradient", "they act without a gradient, so they were measured and not estimated"),
    ):
        names = about.get(name)
        if isinstance(names, list) and names:
            yield Gap(f"sensitivity of {len(names)} points", f"{why}: {_shortened(names)}.")
    diverged = run.comparison.about.get("diverged")
    if isinstance(diverged, list) and diverged:
        yield Gap(
            f"error of {len(diverged)} tensors", f"both models' tensors have other shapes: {_shortened(diverged)}."
        )
    silent = [full_name(key) for key, row in run.statistics.latest.items() if row.get("count") == 0]
    if silent:
        yield Gap(f"values of {len(silent)} points", f"no sampled batch reached them: {_shortened(silent)}.")


def _undecided(run: RunFolder) -> Iterator[Gap]:
    """The checks that could not tell."""
    if run.convergence is not None:
        for row in run.convergence.rows:
            if row.status == "cannot tell":
                yield Gap(f"convergence: {row.check}", f"it cannot tell: {row.evidence or 'it has no numbers yet'}.")
    for name, result in run.ladders.items():
        for step in result.rows:
            if step.status == "cannot tell":
                what = f"{SOURCES[name]}: rung {step.rung}, {step.metric or step.what}"
                yield Gap(what, f"it cannot tell: {step.note or 'it has no number'}.")


def _newest(run: RunFolder, metric: str) -> float | None:
    """The value of a metric at the newest stage of a run that has it."""
    if run.accuracy is None:
        return None
    values = {row.metric: row.values for row in run.accuracy.rows}.get(metric, {})
    stages = [f"{run.accuracy.run} {stage}" for stage in run.accuracy.own]
    return next((values[stage] for stage in reversed(stages) if stage in values), None)


def _shortened(names: Sequence[Any]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join([*map(str, names[:_MOST_NAMES]), *([f"and {more} more"] if more > 0 else [])])


def _compared(before: RunFolder, after: RunFolder) -> list[Block]:
    """The accuracy and the points of two runs; what was changed comes first."""
    title = f"Run {before.name} -> run {after.name}"
    try:
        result = compare_runs(before.path, after.path)
    except ConfigurationError as error:
        return [Block(title, note=str(error))]
    shown = replace(result, rows=result.rows[: max(_MOST_ROWS, len(result.changed))])
    first, *others = shown.blocks()
    return [replace(first, title=f"{title}: {first.title.lower()}"), *others]
