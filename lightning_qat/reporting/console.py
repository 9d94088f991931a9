"""Results on the terminal."""

from __future__ import annotations

from typing import Any

from rich import get_console
from rich.console import Console

from lightning_qat.analysis.model_check_result import ModelCheckResult
from lightning_qat.analysis.results import Result
from lightning_qat.reporting.model_check_report import ModelCheckSummary


def show(result: Result[Any], console: Console | None = None, note: bool = True, file: str = "") -> None:
    """Print a result as a table, and its note below; of a model check, print the findings.

    Args:
        result: what to show.
        console: where; a running progress bar has its own. The process-wide rich console if not given.
        note: also print the note; not if it follows as a warning.
        file: of a model check: where the rest is.
    """
    console = console or get_console()
    if isinstance(result, ModelCheckResult):
        console.print(ModelCheckSummary(result, file=file), crop=False)
    else:
        for part in result.parts():
            console.print(part)
    text = getattr(result, "note", "")
    if text and note:
        console.print(text, markup=False, highlight=False, soft_wrap=False)


def print_text(text: str, console: Console | None = None) -> None:
    """Print text as it is; a terminal that is too narrow wraps it, and what is copied from it is whole."""
    (console or get_console()).print(text, markup=False, highlight=False, soft_wrap=True)


def print_note(text: str, console: Console | None = None) -> None:
    """Print a remark about what was done."""
    (console or get_console()).print(f"Note: {text}", style="yellow", markup=False, highlight=False)
