"""Results as tables: fixed-width text for files, Markdown for TensorBoard, rich for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_qat.reporting.plain_text import literal, one_line, printable

Row = Mapping[str, Any] | Sequence[Any]
"""A row of a table: values by column, or in the order of the columns."""

_MARKDOWN = str.maketrans(
    {c: f"\\{c}" for c in "\\`*_{}[]()#+!|"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;", "~": "&#126;", "$": "&#36;"}
)
"""A backslash before ``<``, ``~`` or ``$`` would be shown by some renderers, TensorBoard's among them."""


_GAP, _EDGES = 3, 2
"""Columns of the terminal between two columns of a table, and around it."""

_SENTENCE = 60
"""A cell with spaces that is longer than this is read as a sentence, not as an entry."""


def fixed_width(columns: Sequence[str], rows: Sequence[Row], title: str = "", note: str = "", digits: int = 7) -> str:
    """Render a table as plain text. Every column is as wide as its widest cell: nothing is cut or wrapped.

    Args:
        columns: the columns to show, in order.
        rows: their values: by column, or one for each column.
        title: a line above the table.
        note: a line between title and table.
        digits: significant digits of a number.

    Example:
        >>> print(fixed_width(["point", "min"], [{"point": "fc.weight", "min": -0.25}, {"point": "fc", "min": 1.0}]))
        point       min
        ---------------
        fc.weight -0.25
        fc            1
    """
    values = [_values(row, columns) for row in rows]
    padded, widths = [], []
    for index, column in enumerate(columns):
        texts = [one_line(column), *(_cell_line(row[index], digits) for row in values)]
        width = max(map(len, texts))
        pad = str.rjust if _is_numeric(row[index] for row in values) else str.ljust
        padded.append([pad(text, width) for text in texts])
        widths.append(width)
    heading, *lines = (" ".join(texts).rstrip() for texts in zip(*padded, strict=True)) if columns else ("",)
    rule = "-" * (sum(widths) + max(0, len(widths) - 1))
    return "\n".join([*(text for text in (one_line(title), printable(note)) if text), heading, rule, *lines])


def panel(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Render a table as Markdown for TensorBoard, which breaks the words and numbers of a Markdown table anywhere.

    Names and numbers become fixed-width text, which TensorBoard scrolls; rows with sentences become paragraphs, and
    cells of several lines (YAML) stay as they are, to be copied.

    Args:
        columns: the columns to show, in order.
        rows: their values: by column, or one for each column.

    Example:
        >>> print(panel(["point", "MSE"], [{"point": "fc", "MSE": 0.5}]))
        ```
        point MSE
        ---------
        fc    0.5
        ```
        >>> sentence = "Calibration saw only small values: give it more, or more representative, batches."
        >>> print(panel(["point", "verdict", "action"], [("fc", "clipping", sentence)]))
        **fc**, verdict: clipping
        <BLANKLINE>
        Calibration saw only small values: give it more, or more representative, batches.
    """
    values = [_values(row, columns) for row in rows]
    if not any(_is_long(value) for row in values for value in row):
        return fenced(fixed_width(columns, values, digits=4))
    blocks: list[str] = []
    for first, *others in values:
        named = [(c, cell_text(v, 4)) for c, v in zip(columns[1:], others, strict=True) if cell_text(v)]
        entries = [f"{escape_markdown(c)}: {escape_markdown(text)}" for c, text in named if not _is_long(text)]
        blocks.append(", ".join([f"**{escape_markdown(cell_text(first))}**", *entries]))
        blocks += [
            fenced(printable(text).rstrip(), "yaml") if "\n" in text.strip() else escape_markdown(text)
            for _, text in named
            if _is_long(text)
        ]
    return "\n\n".join(blocks)


def fenced(text: str, language: str = "") -> str:
    """Put a text into a fenced block of code; the fence is longer than any in the text.

    Example:
        >>> print(fenced("a: 1", "yaml"))
        ```yaml
        a: 1
        ```
    """
    fence = "`" * 3
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Render a table as Markdown (GitHub's dialect); names are escaped, numbers short.

    Example:
        >>> print(markdown(["point", "MSE"], [{"point": "a|b_c.weight", "MSE": 0.5}]))
        | point | MSE |
        |:--|--:|
        | a\\|b\\_c.weight | 0.5 |
    """

    def line(texts: Sequence[str]) -> str:
        return f"| {' | '.join(texts)} |"

    values = [_values(row, columns) for row in rows]
    right = (_is_numeric(row[index] for row in values) for index in range(len(columns)))
    rules = "|".join("--:" if numeric else ":--" for numeric in right)
    body = [line([escape_markdown(cell_text(value, digits=4)) for value in row]) for row in values]
    return "\n".join([line([escape_markdown(column) for column in columns]), f"|{rules}|", *body])


def escape_markdown(text: str) -> str:
    """Escape every character that Markdown or HTML would interpret.

    Example:
        >>> escape_markdown("layers_0*<b>")
        'layers\\\\_0\\\\*&lt;b&gt;'
    """
    return one_line(text).translate(_MARKDOWN)


def terminal_tables(title: str, columns: Sequence[str], rows: Sequence[Row], width: int) -> list[Table]:
    """Render a table for the terminal. Numbers are short, right-aligned and never cut; long names are wrapped.

    Columns for which there is no room follow in further tables, each with the first column, which says what a row is.

    Args:
        title: a line above everything.
        columns: the columns to show, in order.
        rows: their values: by column, or one for each column.
        width: of the terminal.
    """
    values = [_values(row, columns) for row in rows]
    found = [_terminal_column(name, [row[index] for row in values]) for index, name in enumerate(columns)]
    parts = [found[:1]] if found else []
    for column in found[1:]:
        taken = sum(other.least + _GAP for other in parts[-1])
        if taken + column.least + _EDGES > width and len(parts[-1]) > 1:
            parts.append(found[:1])
        parts[-1].append(column)
    return [_terminal_table(title if number == 0 else "", part, width) for number, part in enumerate(parts)]


@dataclass(frozen=True)
class _TerminalColumn:
    """A column as the terminal shows it: it may be as narrow as ``least``, and needs no more than ``most``."""

    heading: str
    texts: Sequence[str]
    justify: Literal["left", "right"]
    least: int
    most: int


def _terminal_column(name: str, values: Sequence[Any]) -> _TerminalColumn:
    """Format the values of a column, and say how narrow it may be: a heading and an entry fold, a number does not."""
    heading, texts = one_line(name), [printable(cell_text(value, digits=4)) for value in values]
    widest = max(map(len, texts), default=0)
    most = max(len(heading), widest)
    if _is_numeric(values):
        return _TerminalColumn(heading, texts, "right", max(widest, min(len(heading), 8)), most)
    return _TerminalColumn(heading, texts, "left", min(most, 12), most)


def _terminal_table(title: str, columns: Sequence[_TerminalColumn], width: int) -> Table:
    widths = [column.least for column in columns]  # rich would narrow all alike, and go beyond the terminal
    room = width - _EDGES - sum(widths) - _GAP * (len(widths) - 1)
    while room > 0 and (growing := [i for i, column in enumerate(columns) if widths[i] < column.most]):
        widths[min(growing, key=lambda i: widths[i])] += 1
        room -= 1
    table = Table(
        title=literal(one_line(title), style="table.title") if title else None,
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for column, own in zip(columns, widths, strict=True):
        table.add_column(literal(column.heading), justify=column.justify, overflow="fold", width=own)
    for texts in zip(*(column.texts for column in columns), strict=True):
        table.add_row(*map(literal, texts))
    return table


def cell_text(value: Any, digits: int = 7) -> str:
    """Format a value: floats with ``digits`` significant digits, None as an empty text, several values with commas.

    Example:
        >>> [cell_text(v) for v in (0.26427540, 1e-9, float("nan"), None, True, ("a", "b"))]
        ['0.2642754', '1e-09', 'nan', '', 'yes', 'a, b']
    """
    if type(value) is str:
        return value
    if value is None:
        return ""
    if isinstance(value, (tuple, list)):
        return ", ".join(cell_text(part, digits) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.{digits}g}" if math.isfinite(value) else str(value)
    return str(value)


def _cell_line(value: Any, digits: int) -> str:
    text = cell_text(value, digits)
    return text if type(value) in (float, int, bool) else one_line(text)


def _is_long(value: Any) -> bool:
    """Whether a value is a sentence, or has several lines."""
    return isinstance(value, str) and ("\n" in value.strip() or (len(value) > _SENTENCE and " " in value))


def _values(row: Row, columns: Sequence[str]) -> list[Any]:
    return [row[column] for column in columns] if isinstance(row, Mapping) else list(row)


def _is_numeric(values: Iterable[Any]) -> bool:
    """Whether a column holds numbers."""
    return any(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
