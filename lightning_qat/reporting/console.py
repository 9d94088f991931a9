"""Results on the terminal."""

from __future__ import annotations

from typing import Any

from rich import get_console
from rich.console import Console

from lightning_qat.analysis.results import Result


def show(result: Result[Any], console: Console | None = None, note: bool = True) -> None:
    """Print a result as a table, and its note below.

    Args:
        result: what to show.
        console: where; a running progress bar has its own. The process-wide rich console if not given.
        note: also print the note; not if it follows as a warning.
    """
    console = console or get_console()
    console.print(result)
    text = getattr(result, "note", "")
    if text and note:
        console.print(text, markup=False, highlight=False, soft_wrap=False)
