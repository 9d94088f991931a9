"""The files of a model check: what they are called, and how to read one back."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from lightning_qat.analysis.model_check.finding import Finding
from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult, Section
from lightning_qat.quantization.reading.files import Document

FILE_NAME = "model_check_result"
"""Without the ending; there are a txt and a json file."""


def read_model_check(path: str | os.PathLike[str]) -> ModelCheckResult:
    """Read a ``model_check_result.json`` back.

    Args:
        path: the file.

    Raises:
        DamagedFileError: it is no such file, or a value in it does not fit.
    """
    remedy = "give the one that ModelCheck() or the command check wrote"
    document = Document(path, "the JSON file of a model check", remedy)
    found = document.as_json(_Stored, ignore_unknown=True)
    sections = (replace(section, rows=tuple(map(_cells, section.rows))) for section in found.sections)
    return ModelCheckResult(found.rows, tuple(sections))


@dataclass(frozen=True)
class _Stored:
    """What the file holds of a result; it holds more, which follows from this."""

    rows: tuple[Finding, ...]
    sections: tuple[Section, ...]


def _cells(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(cell) if isinstance(cell, list) else cell for cell in row)
