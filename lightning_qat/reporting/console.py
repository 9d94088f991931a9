"""Results on the terminal."""

from __future__ import annotations

from typing import Any

from rich import get_console
from rich.console import Console

from lightning_qat.analysis.results import Result


def show(result: Result[Any], console: Console | None = None) -> None:
    """Print a result as a table, and its note below.

    Args:
        result: what to show.
        console: where; a running progress bar has its own. The process-wide rich console if not given.
    """
    console = console or get_console()
    console.print(result)
    note = getattr(result, "note", "")
    if note:
        console.print(note, markup=False, highlight=False, soft_wrap=False)
