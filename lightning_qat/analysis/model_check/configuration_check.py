"""What was asked for and what is in effect, and what the hardware does not have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_qat.analysis.model_check.checked_region import CheckedRegion, role_of
from lightning_qat.analysis.model_check.finding import Finding, Severity, overrides_yaml, shortened
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.quantization.overrides import yaml_name
from lightning_qat.quantization.planning.profile_violations import ProfileViolation, find_violations
from lightning_qat.quantization.region.effective_dtypes import FLOAT, bits

_EXCLUDED = "float32 by override"
"""Begins the reason of a point that a rule keeps in float."""


@dataclass(frozen=True)
class Request:
    """A point whose requested type is not in effect.

    Args:
        point: name of the point.
        requested: the type asked for.
        by: the rule that asks.
        effective: the type in effect.
        winner: the rule, or the reason, that won.
        taken_back: a rule that names this very point comes behind the override that asks. That is on purpose: what
            reports print to paste is such a rule.
    """

    point: str
    requested: str
    by: str
    effective: str
    winner: str
    taken_back: bool = False

    @property
    def is_lowered(self) -> bool:
        """Whether fewer bits are in effect than were asked for, and not on purpose."""
        return bits(self.effective) < bits(self.requested) and not self.taken_back


def check_configuration(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """Compare what every rule asks for with what is in effect."""
    requests = tuple(unmet_requests(checked))
    rows = tuple((r.point, r.requested, r.by, r.effective, r.winner) for r in requests)
    columns = ("point", "requested", "by", "effective", "winner")
    note = "" if rows else "every point has the type that its rules ask for."
    findings = [*_lowered(checked, requests), *_switched_off(checked)]
    return findings, [Section("Requested and effective dtypes:", columns, rows, "A13", note)]


def check_profile(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """Report what the hardware cannot do as planned."""
    if checked.options.profile is None:
        return [], []
    violations = find_violations(checked.plan, checked.whole_graph, checked.options.profile)
    rows = tuple((v.point, v.op_type, v.subject, v.used, v.allowed, v.advice) for v in violations)
    columns = ("point", "op type", "subject", "used", "allowed", "advice")
    name = checked.options.profile.name
    note = "" if rows else f"profile {name} has everything that is planned."
    grouped: dict[tuple[str, ...], list[ProfileViolation]] = {}
    for violation in violations:
        grouped.setdefault((violation.subject, violation.op_type, violation.used, violation.allowed), []).append(
            violation
        )
    findings = [_violation(name, found) for found in grouped.values()]
    return findings, [Section(f"Violations of profile {name}:", columns, rows, "", note)]


def unmet_requests(checked: CheckedRegion) -> Iterable[Request]:
    """Yield every type that the default or an override requests for a point and that is not in effect.

    Points that stay float for a reason of their own (masks, constants, high-precision outputs) count only where an
    override selects them.
    """
    plan, kinds = checked.plan, checked.graph.by_name
    for name in (*plan.by_name, *plan.float_points):
        op = kinds.get(name.rpartition(".")[0])
        if op is None:
            continue
        planned = plan.by_name.get(name)
        asked = list(_asked(checked, name, op.kind))
        effective = checked.dtypes.points[name] if planned is not None else "float32"
        if planned is None and not any(by != "default" for _, by in asked):
            continue
        for requested, by in asked:
            if requested != effective:
                winner = _winner(checked, name, asked, effective)
                yield Request(name, requested, by, effective, winner, _is_taken_back(checked, name, by, winner))


def hardware_types(checked: CheckedRegion) -> dict[str, tuple[str, ...]]:
    """Map each point to the types that the hardware supports if the op's other types stay; empty without a profile."""
    profile, plan = checked.profile, checked.plan
    found: dict[str, tuple[str, ...]] = {}
    for point in plan.points if profile is not None else ():
        op = checked.graph.by_name.get(point.op)
        if op is None or profile is None:
            continue
        head = checked.head(op)
        rule = profile.rules.get(head.kind if point.role == "output" else op.kind) or profile.rules.get(head.kind)
        if rule is None:
            continue
        group = checked.groups.get(op.name)
        result = plan.by_name.get(f"{group.ops[-1] if group else op.name}.output")
        weight = next((p.dtype for p in plan.by_op.get(head.name, ()) if p.is_weight), None)
        fitting = [
            s
            for s in rule.signatures
            if (point.is_weight or weight is None or s.takes_weight(weight))
            and (point.role == "output" or (result.dtype if result is not None else FLOAT) in s.output)
        ]
        found[point.name] = tuple(dict.fromkeys(dtype for s in fitting for dtype in getattr(s, point.role)))
    return found


def hardware_styles(checked: CheckedRegion) -> dict[str, tuple[str, ...]]:
    """Map each point to what the hardware has there: schemes of an activation, granularities of a weight.

    Nothing without a profile.
    """
    profile = checked.profile
    found: dict[str, tuple[str, ...]] = {}
    for point in checked.plan.points if profile is not None else ():
        op = checked.graph.by_name.get(point.op)
        if op is None or profile is None:
            continue
        head = checked.head(op)
        rule = profile.rules.get(head.kind if point.role == "output" else op.kind) or profile.rules.get(head.kind)
        if rule is not None:
            found[point.name] = rule.weight_granularity if point.is_weight else rule.schemes
    return found


def _asked(checked: CheckedRegion, point: str, op_type: str) -> Iterable[tuple[str, str]]:
    """Yield the type that each rule requests and a description of the rule, from general to specific."""
    role = role_of(point)
    yield str(checked.plan.qconfig[role]["dtype"]), "default"
    for index, rule in enumerate(checked.rules):
        change = rule.weight if role == "weight" else rule.activation
        if change is not None and change.dtype is not None and rule.selects(point, op_type):
            yield change.dtype, f"override {index + 1} ({rule.label})"


def _winner(checked: CheckedRegion, point: str, asked: list[tuple[str, str]], effective: str) -> str:
    planned = checked.plan.by_name.get(point)
    if planned is None:
        return checked.plan.float_points[point]
    if not checked.points[point].enabled:
        return "switched off (enabled = False)"
    if effective != planned.dtype:
        return "set on the fake-quant after planning"
    dtype, rule = asked[-1]
    return rule if dtype == effective else planned.reason


def _is_taken_back(checked: CheckedRegion, point: str, by: str, winner: str) -> bool:
    asking, winning = (re.match(r"override (\d+) ", rule) for rule in (by, winner))
    return asking is not None and winning is not None and checked.rules[int(winning[1]) - 1].match == point


def _lowered(checked: CheckedRegion, requests: Iterable[Request]) -> Iterable[Finding]:
    grouped: dict[tuple[str, str, str, str], list[Request]] = {}
    for request in requests:
        if request.is_lowered:
            key = (request.winner, request.effective, request.requested, request.by)
            grouped.setdefault(key, []).append(request)
    for (winner, effective, requested, by), found in grouped.items():
        names = tuple(r.point for r in found)
        many = len(names) > 1
        yield Finding(
            severity="warning",
            kind="configuration not applied",
            requirement="A13",
            names=names,
            what=f"{shortened(names)} {'are' if many else 'is'} {effective} by {winner}, although {by} asks for "
            f"{requested}.",
            why=f"{effective} has {bits(requested) - bits(effective)} bits less than what was asked for, so what is "
            f"reported as a result of {requested} is not one.",
            action=f"If this is not on purpose, remove what sets {effective}, or paste this behind it.",
            yaml=_raised(checked, (winner, by), names, requested) if winner.startswith(("override", "default")) else "",
        )


def _raised(checked: CheckedRegion, rules: tuple[str, str], names: tuple[str, ...], dtype: str) -> str:
    """Overrides that give these points a type: with the selectors of one of the rules if it selects no others."""
    roles = dict.fromkeys(map(role_of, names))
    numbers = [int(found[1]) for rule in rules if (found := re.match(r"override (\d+) ", rule)) is not None]
    excluded = [name for name, reason in checked.plan.float_points.items() if reason.startswith(_EXCLUDED)]
    known = [name for name in (*checked.plan.by_name, *excluded) if name.rpartition(".")[0] in checked.graph.by_name]
    for rule in (checked.rules[number - 1] for number in numbers):
        selected = {n for n in known if rule.selects(n, checked.graph.by_name[n.rpartition(".")[0]].kind)}
        if selected == set(names):
            selectors = [f"match: {yaml_name(rule.match)}"] if rule.match is not None else []
            selectors += [f"op_type: {rule.op_type}"] if rule.op_type is not None else []
            return overrides_yaml(f"{', '.join(selectors)}, {role}: {{dtype: {dtype}}}" for role in roles)
    lasting = [name for name in names if not _stands_in(checked, name)]
    if not lasting:
        return ""
    return overrides_yaml(f"match: {yaml_name(name)}, {role_of(name)}: {{dtype: {dtype}}}" for name in lasting)


def _stands_in(checked: CheckedRegion, point: str) -> bool:
    """Whether an input point is only there because a rule keeps the op before it in float.

    Without that rule, which the same report advises to drop, the point is gone and its name matches nothing.
    """
    plan = checked.plan.by_name[point]
    operands = checked.graph.by_name[plan.op].operands if plan.role == "input" else ()
    sources = (s for o in operands if o.index == plan.operand for s in o.sources)
    makers = (checked.plan.float_points.get(f"{o.name}.output", "") for o in checked.dtypes.origins(sources))
    return any(reason.startswith(_EXCLUDED) for reason in makers)


def _switched_off(checked: CheckedRegion) -> Iterable[Finding]:
    names = tuple(name for name, point in checked.points.items() if not point.enabled)
    if names:
        yield Finding(
            severity="warning",
            kind="switched off",
            requirement="A13",
            names=names,
            what=f"Switched off, so that nothing is quantized there: {shortened(names)}.",
            why="Accuracy is measured without this error, which the deployed model has.",
            action="Switch it on again: region.points[name].enabled = True.",
        )


def _violation(profile: str, found: list[ProfileViolation]) -> Finding:
    first = found[0]
    names = tuple(dict.fromkeys(v.point for v in found))
    severities: dict[str, Severity] = {"op": "warning", "fusion": "info"}
    rules = dict.fromkeys(match[1] for v in found if (match := re.search(r"\{(match: .*)\}", v.advice)) is not None)
    return Finding(
        severity=severities.get(first.subject, "error"),
        kind="profile violation",
        names=names,
        what=f"{shortened(names)}: {first.op_type} {first.subject} is {first.used}, and profile {profile} allows "
        f"{first.allowed}.",
        why=(
            "The hardware computes these ops one by one and rounds between them."
            if first.subject == "fusion"
            else "The hardware cannot compute this: the op falls back to the CPU, or the tool chain refuses the model."
        ),
        action=f"Plan with profile: {profile}" + (", or paste this." if rules else "."),
        yaml=overrides_yaml(rules) if rules else "",
    )
