"""The accuracy table of all runs as files: json to be read again, csv and Markdown for people.

Runs of several processes and machines write it at the same time. So each process writes its values to a file of its
own, ``result_table/<run>/<time>.json``, and ``result_table.json`` holds what all of them say, joined. This needs no
lock: locks do not work on every network file system, or stay when their owner is killed. Making a folder is atomic
everywhere.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_qat.analysis.open_question import OpenQuestion
from lightning_qat.analysis.runs.accuracy import RESULT_TABLE_VERSION, AccuracyResult, AccuracyRow, ResultTable
from lightning_qat.atomic_files import NotWrittenError, json_value, write_atomically
from lightning_qat.quantization.reading.files import Document
from lightning_qat.quantization.reading.plain_values import must
from lightning_qat.quantization.reading.schema import read_as
from lightning_qat.reporting.files import write_csv
from lightning_qat.reporting.plain_text import digest, file_name
from lightning_qat.reporting.tables import escape_markdown, markdown


def read_result_table(path: str | os.PathLike[str]) -> ResultTable:
    """Read the values of all runs: those in ``result_table.json``, and those that runs have noted beside it.

    Args:
        path: of ``result_table.json``; a missing file is an empty table.

    Raises:
        ConfigurationError: one of the files is not a result table; it is left alone.
    """
    runs = ResultTable.read(path).runs
    for part in sorted(_folder(Path(path)).glob("*/*.json"), key=lambda part: part.name):
        for run, stages in ResultTable.read(part).runs.items():
            known = runs.setdefault(run, {})
            for stage, values in stages.items():
                known.setdefault(stage, {}).update(values)
    return ResultTable(runs)


def write_result_table(table: ResultTable, path: str | os.PathLike[str]) -> Path:
    """Write the values of all runs as JSON; :func:`read_result_table` reads them.

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
    text = f"{markdown(result.columns(), result.to_dicts())}\n\n{escape_markdown(note)}\n"
    return [write_csv(result, Path(path).with_suffix(".csv")), write_atomically(Path(path).with_suffix(".md"), text)]


OWN_TABLE = "accuracy.json"
"""In the folder of a run: the table as seen from this run, with its target, as ``write_json`` writes it."""
_PASSED = {"pass": True, "FAIL": False, None: None}


def read_own_accuracy(path: str | os.PathLike[str]) -> AccuracyResult:
    """Read the accuracy table of one run back.

    Args:
        path: of its ``accuracy.json``.

    Raises:
        DamagedFileError: it is no such file.
    """
    document = Document(path, "the accuracy table of a run", "evaluate the run again with AccuracyTable()")
    found = document.as_json(_OwnTable, ignore_unknown=True)
    with document.checked():
        rows = tuple(_own_row(row, found.stages) for row in found.rows)
    return AccuracyResult(**{**vars(found), "rows": rows, "finding": found.finding or found.note})


@dataclass(frozen=True)
class _OwnTable:
    rows: tuple[dict[str, Any], ...]
    stages: tuple[str, ...]
    run: str
    own: tuple[str, ...]
    note: str = ""
    finding: str = ""
    next_step: str = ""
    left_open: OpenQuestion = ""
    samples: int | None = None


def _own_row(row: dict[str, Any], stages: tuple[str, ...]) -> AccuracyRow:
    passed = row.get("passed")
    if not (passed is None or isinstance(passed, str)) or passed not in _PASSED:
        raise must("pass or FAIL", passed, ".passed")
    values = {stage: read_as(float, row[stage]) for stage in stages if row.get(stage) is not None}
    known = {name: None if row.get(name) is None else read_as(float, row[name]) for name in ("float", "target")}
    return AccuracyRow(read_as(str, row.get("metric")), known["float"], known["target"], values, _PASSED[passed])


class RunEntry:
    """What one process notes about one run in the result table.

    Args:
        path: of ``result_table.json``.
        name: what the run is called. If other values stand under this name, it becomes ``name (2)``.
        run: the entry to continue, of a run that is resumed.

    Attributes:
        run: the entry; with another number than before if :meth:`save` finds that it is taken by now.
    """

    def __init__(self, path: str | os.PathLike[str], name: str, run: str | None = None) -> None:
        self.path = Path(path)
        self.run = run or name
        self._name = name
        self._is_resumed = run is not None
        self._values: dict[str, dict[str, float]] = {}
        self._file: Path | None = None

    def note(self, stage: str, metrics: Mapping[str, float]) -> None:
        """Keep values of a stage; :meth:`save` writes them."""
        self._values.setdefault(stage, {}).update(metrics)

    def save(self) -> None:
        """Write all that was noted, and join it to the table.

        Raises:
            NotWrittenError: a file cannot be written.
            ConfigurationError: a file of the table is damaged; what was noted is written, but not joined.
        """
        if self._file is None:
            self._file = self._claimed() / f"{time.time_ns()}-{secrets.token_hex(2)}.json"
        write_result_table(ResultTable({self.run: self._values}), self._file)
        self.publish(lambda table: write_result_table(table, self.path))

    def publish(self, write: Callable[[ResultTable], Any]) -> None:
        """Write something about all runs; again if another process has noted something meanwhile.

        Whoever notes a value writes afterwards. So the last one to write has seen everything.

        Args:
            write: gets the table of all runs.
        """
        seen = None
        while (present := self._present()) != seen:
            write(self.table())
            seen = present

    def table(self) -> ResultTable:
        """The table of all runs, with what was noted here, be it saved or not."""
        table = read_result_table(self.path)
        if self._file is None and not self._is_resumed:
            self.run = table.entry(self._name, *self._first())
        return self._added_to(table)

    def alone(self) -> ResultTable:
        """The table of this run."""
        return self._added_to(ResultTable())

    def _added_to(self, table: ResultTable) -> ResultTable:
        for stage, metrics in self._values.items():
            table.record(self.run, stage, metrics)
        return table

    def _first(self) -> tuple[str, dict[str, float]]:
        """The stage that was noted first, which decides whether this is a run of its own."""
        return next(iter(self._values.items()))

    def _claimed(self) -> Path:
        """Find the entry, and make its folder: of processes that begin a run of the same name, one succeeds."""
        table = read_result_table(self.path)
        while True:
            run = self.run if self._is_resumed else table.entry(self._name, *self._first())
            folder = _folder(self.path) / f"{file_name(run)}-{digest(run)}"
            is_known = self._is_resumed or run in table.runs
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir(exist_ok=is_known)
            except FileExistsError as error:
                if not folder.is_dir():
                    raise NotWrittenError.of(folder, error) from error
                table.runs[run] = {}  # taken a moment ago
                continue
            except OSError as error:
                raise NotWrittenError.of(folder, error) from error
            self.run = run
            return folder

    def _present(self) -> list[tuple[str, int, int]]:
        """What all processes have written by now."""
        files = ((str(part), part.stat()) for part in _folder(self.path).glob("*/*.json"))
        return sorted((name, status.st_ino, status.st_mtime_ns) for name, status in files)


def _folder(path: Path) -> Path:
    return path.with_suffix("")
