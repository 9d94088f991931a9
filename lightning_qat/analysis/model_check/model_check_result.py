"""The result of a model check: the findings, and the tables behind them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_qat.analysis.model_check.finding import SEVERITIES, Finding, Severity, is_at_least
from lightning_qat.analysis.results import Advice, Block, Result
from lightning_qat.quantization.counts import number_of


@dataclass(frozen=True)
class Section:
    """One table of the report.

    Args:
        title: line above the table, such as ``input dtype statistics:``; empty where the table continues the one
            before it.
        columns: headings.
        rows: one tuple of cells per row, each as long as ``columns``.
        requirement: code of the requirement that the table answers, as in the README's table.
        note: a line about the table: a cause, or why there is none.
        region: path of the quantized module in the model, ``""`` for the model itself.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    requirement: str = ""
    note: str = ""
    region: str = ""


@dataclass(frozen=True)
class ModelCheckResult(Result[Finding]):
    """The findings, most severe first, and the tables of the report in its order.

    Args:
        rows: the findings.
        sections: the tables.
    """

    sections: tuple[Section, ...] = ()
    title: ClassVar[str] = "Model check"
    shown: ClassVar[tuple[str, ...]] = ("severity", "kind", "requirement", "what", "action", "location")

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The rows."""
        return self.rows

    @property
    def counts(self) -> dict[Severity, int]:
        """Number of findings by severity, all three always present."""
        found = Counter(finding.severity for finding in self.rows)
        return {severity: found[severity] for severity in SEVERITIES}

    def blocks(self) -> tuple[Block, ...]:
        """Return the number of findings, and each finding as advice."""
        counts = ", ".join(number_of(n, severity) for severity, n in self.counts.items())
        return (Block(f"{self.title}: {counts}", advice=tuple(map(_advice, self.rows))),)

    def full_blocks(self) -> tuple[Block, ...]:
        """Return the findings and the tables."""
        return (*self.blocks(), *map(_block, self.sections))

    def at_least(self, threshold: Severity) -> tuple[Finding, ...]:
        """Return the findings that are at least as severe as a threshold."""
        return tuple(finding for finding in self.rows if is_at_least(finding.severity, threshold))


def _advice(finding: Finding) -> Advice:
    requirement = f" ({finding.requirement})" if finding.requirement else ""
    where = f", in {finding.region}" if finding.region else ""
    facts = (("code", finding.location), ("why", finding.why), ("do", finding.action))
    return Advice(
        heading=f"{finding.kind}{requirement}{where}",
        level=finding.severity,
        text=finding.what,
        names=finding.names,
        facts=tuple((label, text) for label, text in facts if text),
        yaml=finding.yaml,
    )


def _block(section: Section) -> Block:
    title = section.title
    if title and section.region:
        title = f"{title.removesuffix(':')} in {section.region}:"
    note = section.note or ("" if section.rows or title else "(empty)")
    return Block(title, section.columns if section.rows else (), section.rows, note)
