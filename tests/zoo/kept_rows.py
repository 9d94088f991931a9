"""Rows of a table that takes long, kept one by one as they are measured: a script goes on where it was ended."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any


def kept_rows(file: Path | None) -> list[dict[str, Any]]:
    """Return the rows of an earlier run as plain data; none without a file."""
    if file is None or not file.exists():
        return []
    return [json.loads(text) for text in file.read_text().splitlines()]


def keep_row(file: Path | None, row: Any) -> None:
    """Add a row, a dataclass, to the file if there is to be one."""
    if file is not None:
        with file.open("a") as opened:
            opened.write(json.dumps(dataclasses.asdict(row)) + "\n")
