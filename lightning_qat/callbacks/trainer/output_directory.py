"""Where the files go: into local folders. Lightning's own files may also go to other stores (``s3://bucket/run``)."""

from __future__ import annotations

import os
import re
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich import get_console
from rich.console import Console

from lightning_qat.reporting.plain_text import file_name

_URL = re.compile(r"(?P<protocol>\w[\w+.:-]+)://(?P<place>.*)", re.DOTALL)
_LOCAL_URL = re.compile(r"(file|local):/+(?P<place>.*)", re.DOTALL)
"""Lightning normalizes two slashes to one."""
_INSTEAD = "lightning_qat_reports"


def run_directory(trainer: pl.Trainer) -> Path:
    """Return ``<log_dir or default_root_dir>/lightning_qat`` of this run.

    ``trainer.log_dir`` broadcasts: call this on all ranks, and write on global zero.
    """
    return local_folder(trainer.log_dir or trainer.default_root_dir) / "lightning_qat"


def shared_directory(trainer: pl.Trainer) -> Path:
    """Return ``<default_root_dir>/lightning_qat``, for what is kept across runs."""
    return local_folder(trainer.default_root_dir) / "lightning_qat"


def local_folder(place: str | os.PathLike[str]) -> Path:
    """Return a folder of this machine for what Lightning takes as a place for files.

    Args:
        place: a path, or a URL. For one of another store (``s3://bucket/run``), the folder is
            ``lightning_qat_reports/s3/bucket/run`` below the working directory.

    Example:
        >>> local_folder("file:///tmp/logs").as_posix(), local_folder("s3://bucket/run").relative_to(Path.cwd()).as_posix()
        ('/tmp/logs', 'lightning_qat_reports/s3/bucket/run')
    """
    place = os.fspath(place)  # loggers may give a Path
    if local := _LOCAL_URL.fullmatch(place):
        return Path("/", local["place"])
    url = _URL.fullmatch(place)
    if url is None:
        return Path(place)
    parts = [url["protocol"], *re.split(r"[/\\]", url["place"])]
    return Path.cwd().joinpath(_INSTEAD, *(file_name(part) for part in parts if part))


def local_instead_of_url(trainer: pl.Trainer) -> str:
    """Say where the files go if the run's own go to another store; empty if they do not. Call it on all ranks."""
    places = [os.fspath(place) for place in (trainer.log_dir, trainer.default_root_dir) if place]
    urls = dict.fromkeys(place for place in places if local_folder(place) != Path(place))
    found = [f"{url}: {local_folder(url)}" for url in urls if not _LOCAL_URL.fullmatch(url)]
    if not found:
        return ""
    return (
        f"lightning_qat writes its files to folders of this machine only, so they do not go where this run's logs and "
        f"checkpoints go. For {'; for '.join(found)}. Copy them from there, or give a local default_root_dir."
    )


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
