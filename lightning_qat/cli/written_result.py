"""A result of a command: written, and printed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_qat.analysis.results import Result
from lightning_qat.atomic_files import NotWrittenError
from lightning_qat.reporting.console import print_note, show
from lightning_qat.reporting.files import write_result


def write_and_show(result: Result[Any], directory: Path, name: str, notes: Iterable[str]) -> None:
    """Write a result as ``<name>.txt`` and ``.json`` and print it, with remarks about how it was made.

    Raises:
        NotWrittenError: a file cannot be written. What took minutes to measure is printed before.
    """
    try:
        file = str(write_result(result, directory, name, formats=("txt", "json"))[0])
    except NotWrittenError:
        show(result)
        raise
    for note in notes:
        print_note(note)
    show(result, file=file)
