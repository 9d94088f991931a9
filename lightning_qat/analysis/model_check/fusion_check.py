"""Ops that could be computed as one and are not, and code that differs from batch to batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_qat.analysis.model_check.checked_region import CheckedRegion, module_type
from lightning_qat.analysis.model_check.finding import Finding, Severity, shortened
from lightning_qat.analysis.model_check.long_loops import ANNOTATION, LoopLine, long_loops
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.quantization.interception.code_locations import is_installed
from lightning_qat.quantization.planning.fusion import FusionMiss, find_fusions

_LIBRARY = (
    "It is code of an installed library: switch off in its settings what makes it vary (such as layerdrop=0.0), or "
    "trace more batches: QuantizationAwareTraining(trace_batches=8)."
)
_TITLE = "Fusable modules are listed below:"


@dataclass(frozen=True)
class _Cause:
    """A cause of missed fusions: how it is recognised, how severe it is, and the remedy."""

    mark: str
    severity: Severity
    why: str
    action: str


_CAUSES = (
    _Cause(
        "dynamic code",
        "warning",
        "Each intermediate result is rounded once more, and how the model is cut into fused ops depends on the batch.",
        f"Put the body of the loop or branch into `{ANNOTATION}`, and the ops are fused whichever way it runs.",
    ),
    _Cause(
        "another consumer",
        "info",
        "The intermediate result has to be written out for its other reader, which costs time and one more rounding.",
        "Nothing if both readers need it; otherwise let the second one read the fused result.",
    ),
    _Cause(
        "leaves the region",
        "info",
        "The intermediate result has to be written out because it is an output of the model.",
        "Nothing if that output is needed; otherwise do not return it.",
    ),
    _Cause(
        "written in place",
        "info",
        "The value is stored and rounded before it is overwritten.",
        "Use the operation that returns a new tensor, such as `y = y * 2` for `y.mul_(2)`.",
    ),
    _Cause(
        "switched off",
        "info",
        "Each op is computed alone, and each intermediate result is rounded.",
        "Nothing if the hardware cannot fuse them; otherwise add the sequence to `fusions` of the profile.",
    ),
)


def check_fusion(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """List every group of ops that matches a pattern and is not fused, with its cause."""
    misses = [*checked.plan.misses, *_switched_off(checked)]
    by_cause: dict[tuple[str, str], list[FusionMiss]] = {}
    for miss in misses:
        cause = next((c for c in _CAUSES if c.mark in miss.cause), _CAUSES[1])
        by_cause.setdefault((cause.mark, miss.location), []).append(miss)
    known = {cause.mark: cause for cause in _CAUSES}
    findings = [_miss_finding(known[mark], found) for (mark, _), found in by_cause.items()]
    sections = [
        Section(
            title="" if index else _TITLE,
            columns=("name", "type"),
            rows=tuple((name, module_type(checked.graph.by_name[name])) for name in miss.ops),
            requirement="A2",
            note=f"{miss.cause} ({miss.location})",
        )
        for index, miss in enumerate(misses)
    ]
    return findings, sections or [Section(_TITLE, ("name", "type"), (), "A2", "every group that matches is fused.")]


def check_varying_code(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """Report code whose ops differ between batches, and ops that were not seen while tracing."""
    varying, forwards = frozenset(checked.whole_graph.varying), checked.whole_graph.forwards
    places: dict[str, list[str]] = {}
    for op in checked.graph.ops:  # the graph leaves out losses, which only batches with labels compute
        computes = op.data_dependent and op.role in ("quantize", "join")
        if computes and op.location in varying and op.forwards < forwards:
            places.setdefault(op.location, []).append(op.name)
    files: dict[str, list[str]] = {}
    for location in places:
        files.setdefault(location.rpartition(":")[0], []).append(location)
    findings = [_varying_finding(file, {p: places[p] for p in found}) for file, found in files.items()]
    findings += _long_loops(checked)
    findings += [_unplanned_finding(place, count) for place, count in checked.region.unplanned.items()]
    sections = []
    if places:
        rows = tuple((location, ", ".join(names)) for location, names in places.items())
        sections.append(Section("Code whose ops vary from batch to batch:", ("location", "ops"), rows, "A3"))
    if checked.region.unplanned:
        unplanned = tuple((*_split_place(place), count) for place, count in checked.region.unplanned.items())
        sections.append(Section("Ops that were not seen while tracing:", ("op", "location", "calls"), unplanned, "A3"))
    return findings, sections


def _long_loops(checked: CheckedRegion) -> Iterable[Finding]:
    """Loops in Python whose many rounds are ops of their own, one finding per module and file."""
    loops: dict[tuple[str, str], dict[LoopLine, tuple[str, ...]]] = {}
    for line, rounds in long_loops(checked.graph).items():
        loops.setdefault((line.scope, line.location.rpartition(":")[0]), {})[line] = rounds
    for lines in loops.values():
        line, longest = max(lines.items(), key=lambda item: len(item[1]))
        names = tuple(name for rounds in lines.values() for name in rounds)
        location = line.location
        yield Finding(
            severity="warning",
            kind="long loop",
            requirement="A3",
            names=names,
            what=f"{location} runs {len(longest)} times per forward, and every round has its own ops and quantizers: "
            f"{len(names)} of the {len(checked.graph.ops)} ops are in such loops.",
            why="An accelerator does not run a loop of Python, every analysis takes that much longer, and another "
            "number of rounds meets ops without quantizers.",
            action="It is code of an installed library: set target: to the modules before it or inside of it."
            if is_installed(location)
            else "If it is post-processing, set target: to the module before it or move it out of forward; if it "
            f"belongs to the model, put the loop's body into `{ANNOTATION}`, and all rounds share their quantizers.",
            location=location,
        )


def _switched_off(checked: CheckedRegion) -> Iterable[FusionMiss]:
    """Groups that the default patterns fuse and the plan does not."""
    known = {miss.ops for miss in checked.plan.misses}
    for group in find_fusions(checked.graph)[0]:
        fused = {id(checked.groups.get(name)) for name in group.ops}
        if len(fused) == 1 and group.ops[0] in checked.groups:
            continue
        if not any(set(group.ops) <= set(ops) for ops in known):
            cause = f"switched off: the patterns of the plan do not contain {'+'.join(group.sequence)}"
            yield FusionMiss(group.ops, group.kinds, cause, checked.graph.by_name[group.ops[-1]].location)


def _miss_finding(cause: _Cause, misses: list[FusionMiss]) -> Finding:
    names = tuple(dict.fromkeys(name for miss in misses for name in miss.ops))
    patterns = shortened(dict.fromkeys("+".join(dict.fromkeys(miss.kinds)) for miss in misses))
    groups = f"{len(misses)} groups match" if len(misses) > 1 else f"{' and '.join(misses[0].ops)} match"
    reason = misses[0].cause.split("; ")[0]
    more = f" (and {len(misses) - 1} more like it)" if len(misses) > 1 else ""
    return Finding(
        severity=cause.severity,
        kind="unfused",
        requirement="A2",
        names=names,
        what=f"{groups} {patterns} and are not fused: {reason}{more}.",
        why=cause.why,
        action=cause.action,
        location=misses[0].location,
    )


def _varying_finding(file: str, places: Mapping[str, list[str]]) -> Finding:
    names = tuple(name for found in places.values() for name in found)
    numbers = [location.rpartition(":")[2] for location in places]
    lines = f"line{'s' if len(numbers) > 1 else ''} {shortened(numbers)}"
    return Finding(
        severity="warning",
        kind="varying code",
        requirement="A3",
        names=names,
        what=f"The ops of {file}, {lines}, differ between the traced batches: {shortened(names)} ran in some only.",
        why="An op that a later batch runs for the first time has no quantizer and stays float. An exported file runs "
        "the ops of its example inputs only.",
        action=_LIBRARY if is_installed(file) else f"Put the code that repeats or is left out into `{ANNOTATION}`.",
        location=next(iter(places)),
    )


def _unplanned_finding(place: str, count: int) -> Finding:
    kind, location = _split_place(place)
    return Finding(
        severity="warning",
        kind="not traced",
        requirement="A3",
        names=(),
        what=f"{kind} at {location} was not seen while tracing and ran {count} times in float.",
        why="It has no quantizer, so accuracy is measured without its error and the deployed model differs.",
        action=_LIBRARY
        if is_installed(location)
        else f"Trace batches that reach it, or put the code into `{ANNOTATION}` if its repetition varies.",
        location=location,
    )


def _split_place(place: str) -> tuple[str, str]:
    kind, _, location = place.partition(" at ")
    return kind, location
