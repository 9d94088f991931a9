"""Advice as plain text, as Markdown and on the terminal.

All three forms have the same parts in the same order: what, where, why, what to do, and what to paste.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lightning_qat.analysis.results import Advice
from lightning_qat.reporting.plain_text import literal, one_line, printable
from lightning_qat.reporting.tables import escape_markdown, fenced

T = TypeVar("T")
_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
_NAMES = "at"
"""Label of the names concerned."""
_INDENT = "    "


def advice_text(number: int, advice: Advice) -> str:
    """Format advice as plain text, with its number.

    Example:
        >>> facts = (("why", "Slow."), ("do", "Mark it."))
        >>> print(advice_text(1, Advice("unfused", "warning", "They do not fuse.", ("conv", "add_0"), facts)))
        1. warning: unfused
            They do not fuse.
            at:   conv
                  add_0
            why:  Slow.
            do:   Mark it.
    """
    lines = [f"{number}. {_heading(advice)}", f"{_INDENT}{advice.text}"]
    for label, value in (*((_NAMES, "\n".join(map(one_line, advice.names))),), *advice.facts):
        for index, line in enumerate(_lines(value)):
            lines.append(f"{_INDENT}{'' if index else f'{label}:':<5} {line}")
    lines += [f"{_INDENT}{line}" for line in _lines(advice.yaml)]
    return printable("\n".join(line.rstrip() for line in lines))


def advice_markdown(number: int, advice: Advice, limit: int, file: str) -> list[str]:
    """Format advice as paragraphs of Markdown.

    Args:
        number: the number of the advice.
        advice: the advice.
        limit: how many names and how many lines of YAML, at most.
        file: the file that holds the rest, for the reader.
    """
    where = f" in {file}" if file else ""
    paragraphs = [f"**{number}. {escape_markdown(_heading(advice))}**", escape_markdown(advice.text)]
    if advice.names:
        text = ", ".join(map(escape_markdown, advice.names[:limit]))
        if len(advice.names) > limit:
            text += f", and {len(advice.names) - limit} more names{escape_markdown(where)}"
        paragraphs.append(f"*{_NAMES}*: {text}")
    paragraphs += [
        f"*{escape_markdown(label)}*: {', '.join(map(escape_markdown, _lines(value)))}" for label, value in advice.facts
    ]
    if advice.yaml:
        lines = _lines(advice.yaml)
        more = [f"# and {len(lines) - limit} more lines{where}"] if len(lines) > limit else []
        paragraphs.append(fenced(printable("\n".join([*lines[:limit], *more])), "yaml"))
    return paragraphs


@dataclass(frozen=True)
class TerminalAdvice:
    """Advice for the terminal. Print it with ``crop=False``: lines of YAML are not wrapped, they will be copied.

    Args:
        advice: the advice.
        limit: how many names and how many lines of YAML are shown of each.
        infos: how many entries of level ``info`` are shown, and how many names and lines of each.
        in_file: whether a file holds everything; the text then says that the rest is in the file.
    """

    advice: tuple[Advice, ...]
    limit: int = 6
    infos: int = 3
    in_file: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        infos = [one for one in self.advice if one.level == "info"]
        others = [one for one in self.advice if one.level != "info"]
        shown, more = self._shortened(infos, self.infos)
        for advice in (*others, *shown):
            limit = self.infos if advice.level == "info" else self.limit
            yield Text()
            yield from self._one(advice, limit)
            lines, hint = self._shortened(_lines(advice.yaml), limit + 1)
            code = [*lines, *([f"# {hint}"] if hint else [])]
            if code:
                text = "\n".join(f"{_INDENT}{line}" for line in code)
                yield literal(text, style="green", no_wrap=True, overflow="ignore")
        if more:
            yield Text(f"\n{more} (severity info)")

    def _one(self, advice: Advice, limit: int) -> Iterator[RenderableType]:
        head = Text(f"{advice.level}: " if advice.level else "", style=_STYLES.get(advice.level, "bold"))
        yield head.append(literal(advice.heading, style="bold"))
        yield Padding(literal(advice.text, overflow="fold"), (0, 0, 0, 2))
        fields = Table.grid(padding=(0, 1, 0, 0))
        fields.add_column(style="dim", no_wrap=True)
        fields.add_column(overflow="fold")
        names, hint = self._shortened(advice.names, limit)
        if not all(_mentions(advice.text, name) for name in names):
            lines = [*map(one_line, names), *([hint] if hint else [])]
            fields.add_row(f"{_NAMES}:", literal("\n".join(lines), overflow="fold"))
        for label, value in advice.facts:
            fields.add_row(literal(f"{label}:"), literal(value, overflow="fold"))
        yield Padding(fields, (0, 0, 0, 2))

    def _shortened(self, items: Sequence[T], limit: int) -> tuple[Sequence[T], str]:
        """The first items, and how many more there are. If only one more is left, it is shown instead."""
        if len(items) <= limit + 1:
            return items, ""
        return items[:limit], f"and {len(items) - limit} more{', in the file' if self.in_file else ''}"


def _heading(advice: Advice) -> str:
    return f"{advice.level}: {advice.heading}" if advice.level else advice.heading


def _lines(text: str) -> list[str]:
    return text.rstrip().split("\n") if text.strip() else []


def _mentions(sentence: str, name: str) -> bool:
    """Whether a sentence names an op; a name that may as well be an English word does not count."""
    words = [word.strip("(),;:'\"") for word in sentence.removesuffix(".").split()]
    return name in words and any(not c.isalpha() for c in name)
