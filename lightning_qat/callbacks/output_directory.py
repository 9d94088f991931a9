"""Where the files go."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl


def run_directory(trainer: pl.Trainer) -> Path:
    """Return ``<log_dir or default_root_dir>/lightning_qat`` of this run.

    ``trainer.log_dir`` broadcasts: call this on all ranks, and write on global zero.
    """
    return Path(trainer.log_dir or trainer.default_root_dir) / "lightning_qat"


def shared_directory(trainer: pl.Trainer) -> Path:
    """Return ``<default_root_dir>/lightning_qat``, for what is kept across runs."""
    return Path(trainer.default_root_dir) / "lightning_qat"
