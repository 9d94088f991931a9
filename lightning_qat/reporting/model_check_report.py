"""One model check, several renderings: the text file, Markdown for TensorBoard and the summary on the terminal.

All of them say the same about each finding, in the same order: what, where, why, what to do, and what to paste.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lightning_qat.analysis.model_check.findings import Finding, Severity
from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult, Section
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.reporting.tables import escape_markdown, fenced, fixed_width, panel

T = TypeVar("T")
FILE_NAME = "model_check_result"
_STYLES: dict[Severity, str] = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
_LABELS = {"names": "at", "location": "code", "why": "why", "action": "do"}
_INDENT = "    "


def counts_line(result: ModelCheckResult) -> str:
    """Spell how many findings there are.

    Example:
        >>> counts_line(ModelCheckResult(()))
        '0 errors, 0 warnings, 0 infos'
    """
    return ", ".join(f"{n} {severity}{'' if n == 1 else 's'}" for severity, n in result.counts.items())


def text_report(result: ModelCheckResult) -> str:
    """Render everything as plain text, as wide as it needs to be: findings first, then the tables in their order.

    Args:
        result: the check.

    Example:
        >>> what, why, action = "They do not fuse.", "Slow.", "Mark it."
        >>> finding = Finding("warning", "unfused", ("conv", "add_0"), what, why, action, requirement="A2")
        >>> print(text_report(ModelCheckResult((finding,))))
        Model check: 0 errors, 1 warning, 0 infos
        <BLANKLINE>
        1. warning: unfused (A2)
            They do not fuse.
            at:   conv
                  add_0
            why:  Slow.
            do:   Mark it.
        <BLANKLINE>
    """
    blocks = [f"Model check: {counts_line(result)}"]
    blocks += [_finding_text(number, finding) for number, finding in enumerate(result.findings, 1)]
    blocks += [_section_text(section) for section in result.sections]
    return "\n\n".join(blocks) + "\n"


def markdown_report(result: ModelCheckResult, rows: int = 30) -> str:
    """Render the findings and the first rows of every table as Markdown, for TensorBoard.

    Args:
        result: the check.
        rows: names and lines of YAML per finding, and rows per table, at most; the rest is in the file.

    Example:
        >>> section = Section("Called times:", ("name", "times"), (("a", 2),))
        >>> print(markdown_report(ModelCheckResult((), (section,))))
        **Model check: 0 errors, 0 warnings, 0 infos**
        <BLANKLINE>
        **Called times:**
        <BLANKLINE>
        ```
        name times
        ----------
        a        2
        ```
    """
    blocks = [f"**Model check: {counts_line(result)}**"]
    for number, finding in enumerate(result.findings, 1):
        blocks += _finding_markdown(number, finding, rows)
    for section in result.sections:
        title, note = _section_title(section), section.note
        blocks += [f"**{escape_markdown(title)}**"] if title else []
        blocks += [escape_markdown(note)] if note else []
        if section.rows:
            blocks.append(panel(section.columns, section.rows[:rows]))
        if len(section.rows) > rows:
            blocks.append(_more(len(section.rows) - rows, "rows"))
    return "\n\n".join(blocks)


@dataclass(frozen=True)
class ModelCheckSummary:
    """The findings for the terminal. Print it with ``crop=False``: lines of YAML are not wrapped, they will be copied.

    Args:
        result: the check.
        limit: how many names and how many lines of YAML are shown per finding.
        infos: how many findings of severity ``info`` are shown, and how many names and lines of each.
        file: where everything is; named in the last line.

    Example:
        >>> from lightning_qat.reporting.tables import console_text
        >>> print(console_text(ModelCheckSummary(ModelCheckResult(())), width=80).strip())
        Model check: 0 errors, 0 warnings, 0 infos
    """

    result: ModelCheckResult
    limit: int = 6
    infos: int = 3
    file: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"Model check: {counts_line(self.result)}", style="bold")
        infos = [finding for finding in self.result.findings if finding.severity == "info"]
        others = [finding for finding in self.result.findings if finding.severity != "info"]
        shown, more = self._shortened(infos, self.infos)
        for finding in [*others, *shown]:
            limit = self.infos if finding.severity == "info" else self.limit
            yield Text()
            yield from self._finding(finding, limit)
            lines, hint = self._shortened(_lines(finding.yaml), limit + 1)
            code = [*lines, *([f"# {hint}"] if hint else [])]
            if code:
                text = "\n".join(f"{_INDENT}{line}" for line in code)
                yield Text(text, style="green", no_wrap=True, overflow="ignore")
        if more or self.file:
            yield Text()
        if more:
            yield Text(f"{more} (severity info)")
        if self.file:
            yield Text(f"Everything, with the tables: {self.file}", overflow="fold")

    def _finding(self, finding: Finding, limit: int) -> Iterator[RenderableType]:
        head = Text(f"{finding.severity}: ", style=_STYLES[finding.severity])
        yield head.append(_heading(finding), style="bold")
        yield Padding(Text(finding.what, overflow="fold"), (0, 0, 0, 2))
        fields = Table.grid(padding=(0, 1, 0, 0))
        fields.add_column(style="dim", no_wrap=True)
        fields.add_column(overflow="fold")
        for label, value in _fields(finding):
            text = value
            if label == _LABELS["names"]:
                names, hint = self._shortened(finding.names, limit)
                if all(_mentions(finding.what, name) for name in names):
                    continue
                text = "\n".join([*names, *([hint] if hint else [])])
            fields.add_row(f"{label}:", Text(text, overflow="fold"))
        yield Padding(fields, (0, 0, 0, 2))

    def _shortened(self, items: Sequence[T], limit: int) -> tuple[Sequence[T], str]:
        """The first items, and how many more there are; a single one more is shown instead."""
        if len(items) <= limit + 1:
            return items, ""
        return items[:limit], f"and {len(items) - limit} more{', in the file' if self.file else ''}"


def read_model_check(path: str | os.PathLike[str]) -> ModelCheckResult:
    """Read a ``model_check_result.json`` back.

    Args:
        path: the file.

    Raises:
        ConfigurationError: it is no such file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        findings = tuple(Finding(**{**item, "names": tuple(item["names"])}) for item in data["rows"])
        sections = tuple(
            Section(**{**item, "columns": tuple(item["columns"]), "rows": tuple(map(_cells, item["rows"]))})
            for item in data["sections"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} is not the JSON file of a model check: {error}.") from error
    return ModelCheckResult(findings, sections)


def _cells(row: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(cell) if isinstance(cell, list) else cell for cell in row)


def _heading(finding: Finding) -> str:
    where = f", in {finding.region}" if finding.region else ""
    requirement = f" ({finding.requirement})" if finding.requirement else ""
    return f"{finding.kind}{requirement}{where}"


def _fields(finding: Finding) -> Iterator[tuple[str, str]]:
    """What is said about a finding beside its heading, its first sentence and its YAML."""
    values = {
        "names": "\n".join(finding.names),
        "location": finding.location,
        "why": finding.why,
        "action": finding.action,
    }
    yield from ((_LABELS[name], value) for name, value in values.items() if value)


def _finding_text(number: int, finding: Finding) -> str:
    lines = [f"{number}. {finding.severity}: {_heading(finding)}", f"{_INDENT}{finding.what}"]
    for label, value in _fields(finding):
        first, *others = _lines(value)
        lines.append(f"{_INDENT}{label + ':':<5} {first}")
        lines += [f"{_INDENT}      {other}" for other in others]
    lines += [f"{_INDENT}{line}" for line in _lines(finding.yaml)]
    return "\n".join(line.rstrip() for line in lines)


def _finding_markdown(number: int, finding: Finding, limit: int) -> list[str]:
    blocks = [f"**{number}. {finding.severity}: {escape_markdown(_heading(finding))}**", escape_markdown(finding.what)]
    for label, value in _fields(finding):
        lines = _lines(value)
        text = ", ".join(escape_markdown(line) for line in lines[:limit])
        if len(lines) > limit:
            text += f", and {_more(len(lines) - limit, 'names')}"
        blocks.append(f"*{label}*: {text}")
    if finding.yaml:
        lines = _lines(finding.yaml)
        more = [f"# and {len(lines) - limit} more lines in {FILE_NAME}.txt"] if len(lines) > limit else []
        blocks.append(fenced("\n".join([*lines[:limit], *more]), "yaml"))
    return blocks


def _section_text(section: Section) -> str:
    title = _section_title(section)
    if section.rows:
        return fixed_width(section.columns, section.rows, title=title, note=section.note)
    return "\n".join([line for line in (title, section.note) if line] or ["(empty)"])


def _section_title(section: Section) -> str:
    if not section.region or not section.title:
        return section.title
    return f"{section.title.removesuffix(':')} in {section.region}:"


def _more(count: int, what: str) -> str:
    return f"{count} more {what} in {escape_markdown(FILE_NAME)}.txt"


def _lines(text: str) -> list[str]:
    return text.rstrip().splitlines() if text.strip() else []


def _mentions(sentence: str, name: str) -> bool:
    """Whether a sentence names an op; a name that may as well be an English word does not count."""
    words = [word.strip("(),;:'\"") for word in sentence.removesuffix(".").split()]
    return name in words and any(not c.isalpha() for c in name)
