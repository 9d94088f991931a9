"""What a check found: one frozen finding says what, where, why it matters and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_qat.quantization.planning.target_paths import with_target_path

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""From the most to the least severe."""


@dataclass(frozen=True)
class Finding:
    """Something a check found; the same thing found at several places is one finding.

    Args:
        severity: ``error``: the result will be wrong. ``warning``: it is likely to cost accuracy or speed. ``info``:
            worth knowing.
        kind: what it is about, in a few words, such as ``unfused``; stable, to be filtered by.
        requirement: code of the requirement whose check found it, as in the README's table.
        names: ops, points or modules concerned, in execution order.
        what: one sentence that says what was found, with numbers.
        why: one sentence that says why it matters.
        action: one sentence that says what to do.
        location: ``file.py:line`` if it is about code.
        yaml: configuration to paste, if that is the remedy.
        region: path of the quantized module in the model, ``""`` for the model itself.

    Example:
        >>> finding = Finding("warning", "shared weight", ("a", "b"), "a and b share a weight.", "...", "...")
        >>> finding.count
        2
    """

    severity: Severity
    kind: str
    requirement: str = field(default="", kw_only=True)
    names: tuple[str, ...]
    what: str
    why: str
    action: str
    location: str = ""
    yaml: str = ""
    region: str = ""

    @property
    def count(self) -> int:
        """Number of ops, points or modules concerned; at least 1."""
        return max(1, len(self.names))


def is_at_least(severity: Severity, threshold: Severity) -> bool:
    """Whether a finding is as severe as a threshold.

    Example:
        >>> is_at_least("error", "warning"), is_at_least("info", "warning")
        (True, False)
    """
    return SEVERITIES.index(severity) <= SEVERITIES.index(threshold)


def sorted_findings(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings by severity; within one, in the order they were found."""
    return tuple(sorted(findings, key=lambda f: SEVERITIES.index(f.severity)))


def shortened(names: Iterable[str], limit: int = 3) -> str:
    """Format a list of names for a sentence: the first ones, and the number of the others.

    Example:
        >>> shortened(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
        >>> shortened(["a", "b"])
        'a, b'
    """
    every = list(names)
    if len(every) <= limit + 1:
        return ", ".join(every)
    return f"{', '.join(every[:limit])} and {len(every) - limit} more"


def overrides_yaml(rules: Iterable[str]) -> str:
    """Format overrides as YAML to paste.

    Args:
        rules: the content of each rule, without its braces.

    Example:
        >>> print(overrides_yaml(['match: "fc.output", activation: {dtype: int16}']), end="")
        overrides:
          - {match: "fc.output", activation: {dtype: int16}}
    """
    return "overrides:\n" + "".join(f"  - {{{rule}}}\n" for rule in rules)


def in_region(findings: Iterable[Finding], region: str, alone: bool) -> list[Finding]:
    """Return findings with the path of the region they were found in.

    Args:
        findings: of one region.
        region: its path.
        alone: whether it is the only region; otherwise the overrides to paste have to name it.
    """
    return [replace(f, region=region, yaml=f.yaml if alone else with_target_path(f.yaml, region)) for f in findings]
