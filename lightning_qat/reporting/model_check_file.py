"""The files of a model check: what they are called, and how to read one back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lightning_qat.analysis.model_check.findings import Finding
from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult, Section
from lightning_qat.quantization.errors import ConfigurationError

FILE_NAME = "model_check_result"
"""Without the ending; there are a txt and a json file."""


def read_model_check(path: str | os.PathLike[str]) -> ModelCheckResult:
    """Read a ``model_check_result.json`` back.

    Args:
        path: the file.

    Raises:
        ConfigurationError: it is no such file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        findings = tuple(Finding(**{**item, "names": tuple(item["names"])}) for item in data["rows"])
        sections = tuple(
            Section(**{**item, "columns": tuple(item["columns"]), "rows": tuple(map(_cells, item["rows"]))})
            for item in data["sections"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} is not the JSON file of a model check: {error}.") from error
    return ModelCheckResult(findings, sections)


def _cells(row: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(cell) if isinstance(cell, list) else cell for cell in row)
