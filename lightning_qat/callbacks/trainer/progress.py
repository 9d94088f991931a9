"""Progress bars for passes over data outside the Trainer's own loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_qat.reporting.plain_text import printable


@contextmanager
def progress(trainer: pl.Trainer, what: str, total: int | None) -> Iterator[Any]:
    """Show a progress bar for an extra pass on rank 0, unless the trainer shows none; yields ``advance()``."""
    bar = trainer.progress_bar_callback
    if not trainer.is_global_zero or not isinstance(bar, ProgressBar) or getattr(bar, "is_disabled", False):
        yield lambda: None
        return
    live = getattr(bar, "progress", None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = live if live is not None else Progress(*columns, transient=True)
    if live is None:
        shown.start()
    task = shown.add_task(escape(printable(what)), total=total)  # a metric may be called "[/x]"
    try:
        yield lambda: shown.advance(task)
    finally:
        shown.remove_task(task)
        if live is None:
            shown.stop()
