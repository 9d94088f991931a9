"""The accuracy table of all runs as files: json to be read again, csv and Markdown for people."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lightning_qat.analysis.runs.accuracy import RESULT_TABLE_VERSION, AccuracyResult, ResultTable
from lightning_qat.atomic_files import json_value, write_atomically
from lightning_qat.reporting.files import write_csv
from lightning_qat.reporting.tables import markdown


def write_result_table(table: ResultTable, path: str | os.PathLike[str]) -> Path:
    """Write the values of all runs as JSON; :meth:`ResultTable.read` reads them.

    Args:
        table: all runs.
        path: the file; its folder is made if missing.
    """
    document = {"version": RESULT_TABLE_VERSION, "runs": table.runs}
    return write_atomically(path, json.dumps(json_value(document), indent=2) + "\n")


def write_accuracy(result: AccuracyResult, path: str | os.PathLike[str], note: str) -> list[Path]:
    """Write the table as csv and as Markdown.

    Args:
        result: the table.
        path: the file, whatever its ending.
        note: a sentence below the Markdown table.
    """
    text = f"{markdown(result.columns(), result.to_dicts())}\n\n{note}\n"
    return [write_csv(result, Path(path).with_suffix(".csv")), write_atomically(Path(path).with_suffix(".md"), text)]
