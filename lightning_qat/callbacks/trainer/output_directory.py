"""Where the files go."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from rich import get_console
from rich.console import Console


def run_directory(trainer: pl.Trainer) -> Path:
    """Return ``<log_dir or default_root_dir>/lightning_qat`` of this run.

    ``trainer.log_dir`` broadcasts: call this on all ranks, and write on global zero.
    """
    return Path(trainer.log_dir or trainer.default_root_dir) / "lightning_qat"


def shared_directory(trainer: pl.Trainer) -> Path:
    """Return ``<default_root_dir>/lightning_qat``, for what is kept across runs."""
    return Path(trainer.default_root_dir) / "lightning_qat"


def leaves_files(trainer: pl.Trainer) -> bool:
    """Whether this rank writes files in this run; a ``fast_dev_run`` leaves none."""
    return bool(trainer.is_global_zero and not trainer.fast_dev_run)  # type: ignore[attr-defined]


def console_of(trainer: pl.Trainer) -> Console:
    """Return the console to print on: that of a running rich progress bar, so that neither overwrites the other."""
    progress = getattr(trainer.progress_bar_callback, "progress", None)
    console = getattr(progress, "console", None)
    return console if isinstance(console, Console) else get_console()
