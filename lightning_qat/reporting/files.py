"""Results as files: csv and json hold everything, txt is the same table for people."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult
from lightning_qat.analysis.results import Result, write_atomically
from lightning_qat.quantization.errors import unknown_choice
from lightning_qat.reporting.model_check_report import text_report
from lightning_qat.reporting.tables import fixed_width

Format = Literal["csv", "txt", "json"]


def write_result(
    result: Result[Any],
    directory: str | os.PathLike[str],
    name: str,
    epoch: int | None = None,
    formats: Sequence[Format] = ("csv", "txt", "json"),
) -> list[Path]:
    """Write a result as ``<name>.<format>``, or ``<name>_epoch<N>.<format>``, in every format.

    A file that exists is replaced at once: a reader sees the old or the new one, never half of it.

    Args:
        result: what to write.
        directory: made if missing.
        name: first part of the file names, such as ``sensitivity``.
        epoch: the epoch it belongs to; None for the result of the whole run.
        formats: which files.

    Returns:
        The paths written.

    Raises:
        ConfigurationError: there is no such format.
    """
    stem = name if epoch is None else f"{name}_epoch{epoch}"
    return [_write(result, Path(directory) / f"{stem}.{format}", format) for format in formats]


def _write(result: Result[Any], path: Path, format: Format) -> Path:
    if format == "csv":
        return result.to_csv(path)
    if format == "json":
        return result.to_json(path)
    if format == "txt" and isinstance(result, ModelCheckResult):
        return write_atomically(path, text_report(result))
    if format == "txt":
        tables = (
            fixed_width(part.columns(), part.to_dicts(), title=part.title, note=getattr(part, "note", ""))
            for part in result.parts()
        )
        return write_atomically(path, "\n\n".join(tables) + "\n")
    raise unknown_choice("format", format, get_args(Format))
