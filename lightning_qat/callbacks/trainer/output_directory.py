"""Where the files go."""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
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


def move_outputs(trainer: pl.Trainer, directory: str | os.PathLike[str]) -> None:
    """Let a Trainer that has not run yet write everything into another directory: root, loggers and checkpoints.

    Loggers are replaced by one of the package's kinds: TensorBoard if the trainer had one, else CSV.
    """
    root = os.fspath(directory)
    trainer._default_root_dir = root  # type: ignore[attr-defined]
    had_tensorboard = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
    kind = TensorBoardLogger if had_tensorboard else CSVLogger
    trainer.loggers = [kind(root, name="", version="logs")] if trainer.loggers else []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.dirpath = os.path.join(root, "checkpoints")
