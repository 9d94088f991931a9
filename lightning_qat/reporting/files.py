"""Results as files: csv and json hold every row and column; txt is the same table for people."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.results import Result
from lightning_qat.atomic_files import json_text, json_value, write_atomically
from lightning_qat.quantization.errors import unknown_choice
from lightning_qat.reporting.reports import text_report

Format = Literal["csv", "txt", "json"]
_LINE_BREAK = re.compile("[\\r\\v\\f\\x1c-\\x1e\\x85\\u2028\\u2029]")
"""What ends a line for csv readers or ``str.splitlines``; Python's writer knows of ``\\n`` alone."""


def write_csv(result: Result[Any], path: str | os.PathLike[str]) -> Path:
    """Write all rows and columns of a result as CSV.

    A file that exists is replaced at once: a reader sees the old or the new one, never half of it.

    Args:
        result: what an analysis returned.
        path: the file; its folder is made if missing.

    Example:
        >>> import tempfile
        >>> from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult
        >>> path = write_csv(SensitivityResult((), metric="KL"), tempfile.mkdtemp() + "/sensitivity.csv")
        >>> path.read_text().split(",")[:4]
        ['op_name', 'sensitive_type', 'op_type', 'KL']
    """
    return write_atomically(path, csv_lines([result.columns(), *csv_rows(result)]))


def write_json(result: Result[Any], path: str | os.PathLike[str], epoch: int | None = None) -> Path:
    """Write a whole result as JSON: its ``rows``, and its other fields beside them.

    Numbers that JSON does not have become the strings ``inf``, ``-inf`` and ``nan``. An existing file is replaced at
    once.

    Args:
        result: what an analysis returned.
        path: the file; its folder is made if missing.
        epoch: the epoch it is about; the file holds it under this name.

    Example:
        >>> import tempfile
        >>> from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult
        >>> path = write_json(SensitivityResult((), metric="KL"), tempfile.mkdtemp() + "/sensitivity.json")
        >>> json.loads(path.read_text())["metric"]
        'KL'
    """
    about = {**({} if epoch is None else {"epoch": epoch}), **result.about()}
    head = "".join(f"  {json.dumps(k)}: {json_text(v)},\n" for k, v in about.items())
    rows = ",\n".join(f"    {json_text(row)}" for row in result.to_dicts())
    return write_atomically(path, f'{{\n{head}  "rows": [{rows and chr(10) + rows + chr(10) + "  "}]\n}}\n')


def write_text(result: Result[Any], path: str | os.PathLike[str], epoch: int | None = None) -> Path:
    """Write everything about a result as plain text for people, as wide as it needs to be.

    Args:
        result: what an analysis returned.
        path: the file; its folder is made if missing.
        epoch: the epoch it is about; the first line names it.
    """
    return write_atomically(path, text_report(result, epoch))


def write_result(
    result: Result[Any],
    directory: str | os.PathLike[str],
    name: str,
    formats: Sequence[Format] = ("csv", "txt", "json"),
) -> list[Path]:
    """Write a result as ``<name>.<format>`` in every format.

    Args:
        result: what to write.
        directory: made if missing.
        name: first part of the file names, such as ``sensitivity``.
        formats: which files.

    Returns:
        The paths written.

    Raises:
        ConfigurationError: there is no such format.
    """
    for format in formats:
        if format not in _WRITERS:
            raise unknown_choice("format", format, _WRITERS)
    return [_WRITERS[format](result, Path(directory) / f"{name}.{format}") for format in formats]


def write_fingerprint(fingerprint: Fingerprint, path: str | os.PathLike[str]) -> Path:
    """Write the fingerprint of a training pipeline as JSON; :meth:`Fingerprint.from_json` reads it.

    Args:
        fingerprint: of the pipeline.
        path: the file; its folder is made if missing.
    """
    return write_atomically(path, json.dumps(json_value(fingerprint), indent=1) + "\n")


def csv_rows(result: Result[Any]) -> list[list[Any]]:
    """The cells of all rows, in the order of the columns; several values in one cell are separated by commas."""
    columns = result.columns()
    rows = [[row[column] for column in columns] for row in result.to_dicts()]
    return [[", ".join(map(str, cell)) if isinstance(cell, (tuple, list)) else cell for cell in row] for row in rows]


def csv_lines(rows: Iterable[Sequence[Any]]) -> str:
    """Format rows as lines of CSV. Whatever ends a line for somebody is quoted, so that a row stays one row."""
    buffer = io.StringIO()
    plain, quoting = (csv.writer(buffer, lineterminator="\n", quoting=q) for q in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    for cells in rows:
        row = [cell.replace("\0", r"\x00") if isinstance(cell, str) else cell for cell in cells]  # some readers fail
        breaks = any(isinstance(cell, str) and _LINE_BREAK.search(cell) for cell in row)
        (quoting if breaks else plain).writerow(row)
    return buffer.getvalue()


_WRITERS: dict[str, Callable[[Result[Any], Path], Path]] = {"csv": write_csv, "txt": write_text, "json": write_json}
