"""Results on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import get_console
from rich.console import Console
from rich.text import Text

from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult
from lightning_qat.analysis.results import Result
from lightning_qat.reporting.model_check_report import ModelCheckSummary

_STYLES = {"healthy": "bold green", "cannot tell": "bold yellow"}


def show(result: Result[Any], console: Console | None = None, note: bool = True, file: str = "") -> None:
    """Print a result as a table, and its note below; of a model check, print the findings.

    Args:
        result: what to show.
        console: where; a running progress bar has its own. The process-wide rich console if not given.
        note: also print the note; if it follows as a warning, print only the verdict that it begins with.
        file: where everything is.
    """
    console = console or get_console()
    if isinstance(result, ModelCheckResult):
        console.print(ModelCheckSummary(result, file=file), crop=False)
    else:
        for part in result.parts():
            console.print(part)
        _show_note(console, getattr(result, "note", ""), getattr(result, "verdict", ""), note)
        if file:
            print_text(f"Everything: {file}", console)


def _show_note(console: Console, note: str, verdict: str, whole: bool) -> None:
    head, colon, rest = note.partition(":")
    if not verdict or not head.startswith(verdict):
        head, colon, rest = "", "", note
    text = Text.assemble((head, _STYLES.get(verdict, "bold red")), colon + rest if whole else "")
    if text:
        console.print(text, highlight=False)


def print_advice(lines: Sequence[str], console: Console | None = None) -> None:
    """Print sentences, wrapped at words; lines that are indented (YAML) stay whole, they will be copied.

    Args:
        lines: what to print.
        console: where; the process-wide rich console if not given.
    """
    console = console or get_console()
    for line in lines:
        is_code = line.startswith(" ")
        text = Text(line, style="green" if is_code else "", overflow="fold")
        console.print(text, highlight=False, soft_wrap=is_code)


def print_text(text: str, console: Console | None = None) -> None:
    """Print text as it is; a terminal that is too narrow wraps it, and what is copied from it is whole."""
    (console or get_console()).print(text, markup=False, highlight=False, soft_wrap=True)


def print_note(text: str, console: Console | None = None) -> None:
    """Print a remark about what was done."""
    (console or get_console()).print(f"Note: {text}", style="yellow", markup=False, highlight=False)
