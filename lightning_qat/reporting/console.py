"""Results on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Any

from rich import get_console
from rich.console import Console
from rich.text import Text

from lightning_qat.analysis.results import Result
from lightning_qat.reporting.advice import TerminalAdvice
from lightning_qat.reporting.plain_text import literal, one_line, printable
from lightning_qat.reporting.tables import terminal_tables

_STYLES = {"healthy": "bold green", "cannot tell": "bold yellow"}


def show(result: Result[Any], console: Console | None = None, note: bool = True, file: str = "") -> None:
    """Print a result: its tables or its advice, and its note below.

    Args:
        result: what an analysis returned, such as :func:`lightning_qat.check`.
        console: the console to print on, such as that of a running progress bar; rich's global console if not given.
        note: print the whole note. False prints only the verdict at its beginning: the note follows as a warning.
        file: path of the complete report; the last line names it.

    Example:
        >>> from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult
        >>> show(ModelCheckResult(()))
        Model check: 0 errors, 0 warnings, 0 infos
    """
    console = console or get_console()
    blocks = result.blocks()
    for block in blocks:
        if block.columns:
            for table in terminal_tables(block.title, block.columns, block.rows, console.width):
                console.print(table)
        elif block.title:
            console.print(literal(one_line(block.title), style="bold"))
        if block.advice:
            console.print(TerminalAdvice(block.advice, in_file=bool(file)), crop=False)
    for text in (block.note for block in blocks if block.note):
        _show_note(console, text, result.verdict, note)
    if file:
        more = len(result.full_blocks()) > len(blocks)
        lead = "\n" if any(block.advice for block in blocks) else ""
        print_text(f"{lead}Everything{', with the tables' if more else ''}: {file}", console)


def console_text(result: Result[Any], width: int = 120, file: str = "") -> str:
    """Return what :func:`show` prints, without colours.

    Args:
        result: what to show.
        width: columns of the terminal; names fold, numbers are never cut.
        file: path of the complete report; the last line names it.
    """
    with StringIO() as text:
        show(result, Console(file=text, width=width, color_system=None, force_terminal=False), file=file)
        return text.getvalue()


def _show_note(console: Console, note: str, verdict: str, whole: bool) -> None:
    head, colon, rest = note.partition(":")
    if not verdict or not head.startswith(verdict):
        head, colon, rest = "", "", note
    text = literal(head, style=_STYLES.get(verdict, "bold red"))
    text = Text.assemble(text, printable(colon + rest) if whole else "")
    if text:
        console.print(text, highlight=False)


def print_advice(lines: Sequence[str], console: Console | None = None) -> None:
    """Print sentences, wrapped at words. Indented lines (YAML) are not wrapped, so that they can be copied.

    Args:
        lines: what to print.
        console: the console to print on; rich's global console if not given.
    """
    console = console or get_console()
    for line in lines:
        is_code = line.startswith(" ")
        text = literal(line, style="green" if is_code else "", overflow="fold")
        console.print(text, highlight=False, soft_wrap=is_code)


def print_text(text: str, console: Console | None = None) -> None:
    """Print text without inserting line breaks. A narrow terminal wraps it itself, so that copies stay whole."""
    (console or get_console()).print(literal(text), highlight=False, soft_wrap=True)


def print_note(text: str, console: Console | None = None) -> None:
    """Print a remark about what was done."""
    (console or get_console()).print(literal(f"Note: {text}", style="yellow"), highlight=False)
