"""Modules and ops that are called more than once per forward, or never, with the range of every call."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lightning_qat.analysis.model_check.checked_region import CheckedRegion, without_call_numbers
from lightning_qat.analysis.model_check.finding import Finding, overrides_yaml, shortened
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.analysis.statistics.point_ranges import observed_range, representable_range
from lightning_qat.quantization.fake_quant.call_ranges import repeating_points
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.modules.module_walk import REGION_NAME
from lightning_qat.quantization.overrides import yaml_name

SHARED_RANGE_RATIO = 2.0
"""If ranges differ by more than this factor, the narrower call loses a whole bit of its resolution."""

_NOT_CALIBRATED = "not calibrated: run Calibration() or lightning_qat.calibrate, then check again for the ranges."


def called_times(checked: CheckedRegion) -> dict[str, int]:
    """Count how often each module, and each op that repeats in a dynamic block, is called per forward.

    Calls in different branches do not run in the same forward: what is counted is the mean over the traced forwards,
    rounded up.

    Returns:
        By name without call numbers, in execution order.
    """
    weights: dict[str, dict[str, int]] = {}
    for op in checked.whole_graph.ops:
        runs = op.forwards * op.calls
        names = [op.name] if op.calls > 1 and op.role in ("quantize", "join") else []
        for name in (*_enclosing(op.scope), *names):
            calls = weights.setdefault(without_call_numbers(name), {})
            calls[name] = max(calls.get(name, 0), runs)
    forwards = max(1, checked.whole_graph.forwards)
    return {name: math.ceil(sum(calls.values()) / forwards) for name, calls in weights.items()}


def check_calls(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """List what is called several times or never, and advise to split what is shared."""
    times = called_times(checked)
    repeated = {name: count for name, count in times.items() if count > 1}
    unused = _unused_modules(checked, times)
    rows = (*repeated.items(), *((name, 0) for name in unused))
    registered = _registered_twice(checked, times)
    findings = [
        *_shared_module(registered),
        *_called_again(_outermost(checked, repeated, registered), times),
        *_unused_module(unused, _unknown_operand(checked)),
    ]
    note = "" if rows else "every module is called once."
    return findings, [Section("Each module called times:", ("name", "called times"), rows, "A4", note)]


def check_call_ranges(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """Put the range of every call beside what its scale can represent."""
    members = _points_of_calls(checked)
    if not members and not repeating_points(checked.graph, checked.plan):
        return [], []
    shared = [*_own_scales(checked, members), *_one_scale(checked)]
    note = "" if checked.is_calibrated else _NOT_CALIBRATED
    rows = tuple(row for calls in shared for row in calls.rows())
    columns = (
        "name",
        "call",
        "dtype",
        "scale",
        "min",
        "max",
        "representable min",
        "representable max",
        "verdict",
    )
    section = Section("Ranges of each call of what is shared:", columns, rows if not note else (), "A5", note)
    return list(_shared_scale(checked, [calls for calls in shared if calls.one_scale])), [section]


@dataclass(frozen=True)
class _Calls:
    """The calls of one shared point: a fake-quant and the extremes of the data for each."""

    name: str
    points: tuple[FakeQuantize, ...]
    ranges: tuple[tuple[float, float], ...]
    one_scale: bool

    def rows(self) -> Iterable[tuple[object, ...]]:
        for number, (point, (low, high)) in enumerate(zip(self.points, self.ranges, strict=True)):
            lowest, highest = representable_range(point)
            scale = float(point.scale.detach().max())
            fits = lowest - scale / 2 <= low and high <= highest + scale / 2  # what rounds into the range
            yield self.name, number, point.dtype, scale, low, high, lowest, highest, "fits" if fits else "clipped"

    @property
    def ratio(self) -> float:
        """How many times wider the widest call is than the narrowest; one that sees only zeros fits any scale."""
        affine = self.points[0].scheme == "affine"
        widths = [max(high, 0.0) - min(low, 0.0) if affine else max(-low, high, 0.0) for low, high in self.ranges]
        known = [width for width in widths if width > 0]  # the first state of a recurrent net is zero
        return max(known) / min(known) if known else 1.0


def _points_of_calls(checked: CheckedRegion) -> dict[str, list[str]]:
    """The activation points of ops in several calls of their module, by the name they share."""
    members: dict[str, list[str]] = {}
    for plan in checked.plan.points:
        if not plan.is_weight:
            members.setdefault(without_call_numbers(plan.name), []).append(plan.name)
    return {name: points for name, points in members.items() if len(points) > 1}


def _own_scales(checked: CheckedRegion, members: Mapping[str, list[str]]) -> Iterable[_Calls]:
    for name, points in members.items():
        seen = [(checked.points[p], observed_range(checked.points[p])) for p in points]
        known = [(point, ends) for point, ends in seen if ends is not None]
        if known:
            yield _Calls(name, tuple(p for p, _ in known), tuple(e for _, e in known), False)


def _one_scale(checked: CheckedRegion) -> Iterable[_Calls]:
    """Points in dynamic blocks, whose calls share one scale."""
    for name, ranges in checked.region.call_ranges.points.items():
        known = tuple(ends for ends in ranges if ends[0] <= ends[1])
        if len(known) > 1:
            yield _Calls(name, (checked.points[name],) * len(known), known, True)


def _shared_scale(checked: CheckedRegion, shared: list[_Calls]) -> Iterable[Finding]:
    apart = [calls for calls in shared if calls.ratio > SHARED_RANGE_RATIO]
    alike = [calls for calls in shared if calls.ratio <= SHARED_RANGE_RATIO]
    for calls, severity in ((apart, "warning"), (alike, "info")):
        if not calls:
            continue
        worst = max(calls, key=lambda c: c.ratio)
        widths = ", ".join(f"{low:.4g} to {high:.4g}" for low, high in worst.ranges[:4])
        lowest, highest = representable_range(worst.points[0])
        far = severity == "warning"
        yield Finding(
            severity="warning" if far else "info",
            kind="shared scale",
            requirement="A5",
            names=tuple(c.name for c in calls),
            what=f"The {len(worst.ranges)} calls of {worst.name} share one scale, which represents {lowest:.4g} to "
            f"{highest:.4g}, and see {widths}{' ...' if len(worst.ranges) > 4 else ''}.",
            why=(
                f"Ranges that differ by more than a factor {SHARED_RANGE_RATIO:g} (here {worst.ratio:.3g}) cost the "
                "narrow call at least a whole bit, or the wide one is clipped."
                if far
                else "One scale fits all calls as long as their ranges stay alike."
            ),
            action=(
                "Take the code out of the dynamic block if its repetition is fixed, so that every call gets its own "
                "scale; otherwise raise it to int16."
                if far
                else "Nothing; look again after training."
            ),
            location=checked.graph.by_name[checked.plan.by_name[worst.name].op].location,
            yaml=overrides_yaml(f"match: {yaml_name(c.name)}, activation: {{dtype: int16}}" for c in calls)
            if far
            else "",
        )


def _shared_module(registered: Mapping[str, tuple[str, ...]]) -> Iterable[Finding]:
    if registered:
        places = shortened(" = ".join((name, *others)) for name, others in registered.items())
        yield Finding(
            severity="info",
            kind="shared module",
            requirement="A6",
            names=tuple(registered),
            what=f"The same module is registered at several places: {places}.",
            why="Its calls have activation scales of their own but only one name, so overrides and reports cannot tell "
            "the places apart, and tools that keep one scale per module share it.",
            action="Call lightning_qat.split_shared_modules(model) before inserting; it changes nothing numerically.",
        )


def _called_again(names: tuple[str, ...], times: Mapping[str, int]) -> Iterable[Finding]:
    if names:
        yield Finding(
            severity="info",
            kind="called several times",
            requirement="A4",
            names=names,
            what=f"Called more than once per forward: {shortened(f'{name} ({times[name]} times)' for name in names)}.",
            why="Each call has activation scales of its own here, but tools that keep one scale per module share it.",
            action="Nothing, unless your toolchain keeps one scale per module: then write one module per call.",
        )


def _unused_module(unused: tuple[str, ...], reader: str) -> Iterable[Finding]:
    if unused and reader:
        yield Finding(
            severity="warning",
            kind="hidden module",
            requirement="A4",
            names=unused,
            what=f"{shortened(unused)}: has parameters and no op of it was seen, and {reader} reads a tensor of "
            "unknown origin.",
            why="Ops inside a custom autograd.Function or a compiled extension cannot be seen: they stay float.",
            action="Call the modules outside of it, for example by switching the custom function off for QAT.",
        )
    elif unused:
        yield Finding(
            severity="info",
            kind="unused module",
            requirement="A4",
            names=unused,
            what=f"{shortened(unused)}: has parameters and was not called in the traced forwards.",
            why="What is not traced is not quantized, and parameters without a gradient stop DistributedDataParallel.",
            action="Remove the module, or trace batches that reach it.",
        )


def _unknown_operand(checked: CheckedRegion) -> str:
    """Name the first op that reads floating-point values of unknown origin; empty if there is none."""
    for op in checked.graph.ops:
        if any(o.is_float and any(s.kind == "opaque" for s in o.sources) for o in op.operands):
            return op.name
    return ""


def _unused_modules(checked: CheckedRegion, times: Mapping[str, int]) -> tuple[str, ...]:
    """Modules with parameters that were neither called nor read; script modules cannot be looked into."""
    sources = (s for op in checked.whole_graph.ops for operand in op.operands for s in operand.sources)
    read = {s.name.rpartition(".")[0] for s in sources if s.kind == "parameter"}
    found = []
    for name, module in checked.region.target.named_modules():
        if not name or name.split(".")[0] == REGION_NAME or isinstance(module, torch.jit.ScriptModule):
            continue
        if name not in times and name not in read and _has_parameters(module):
            found.append(name)
    return tuple(found)


def _registered_twice(checked: CheckedRegion, times: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Modules that are called and registered at several places, without those inside another such module."""
    places: dict[int, list[str]] = {}
    inside: set[str] = set()
    for name, module in checked.region.target.named_modules(remove_duplicate=False):
        known = places.setdefault(id(module), [])
        known.append(name)
        if len(known) > 1 or name.rpartition(".")[0] in inside:
            inside.add(name)
    found = {first: tuple(others) for first, *others in places.values() if others and first in times}
    return {first: others for first, others in found.items() if others[0].rpartition(".")[0] not in inside}


def _outermost(checked: CheckedRegion, repeated: Mapping[str, int], besides: Collection[str]) -> tuple[str, ...]:
    """Modules called several times outside dynamic blocks, without those inside another such module."""
    numbered = {without_call_numbers(name) for op in checked.graph.ops for name in _enclosing(op.scope) if "@" in name}
    names = (name for name in repeated if name in numbered)
    above = {*repeated, *besides}
    return tuple(name for name in names if name not in besides and not above.intersection(_enclosing(name)[:-1]))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _enclosing(scope: str) -> list[str]:
    """The scope and its parents, outermost first, without the target itself."""
    parts = scope.split(".") if scope else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
