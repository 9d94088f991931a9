"""The outputs of an analysis in a run: one csv that grows, txt and json of the last epoch, and logger entries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_qat.analysis.results import Result
from lightning_qat.analysis.statistics.statistics import LayerStatisticsResult
from lightning_qat.reporting.files import write_json, write_text
from lightning_qat.reporting.growing_table import GrowingTable
from lightning_qat.reporting.loggers import log_code_histogram, log_histogram, log_layout, log_scalars, log_table
from lightning_qat.reporting.plain_text import one_line
from lightning_qat.reporting.reports_of_run import RunReports
from lightning_qat.reporting.tensorboard_tags import Tags, WorstPoints, layout

_DRAWN = 3
"""Points whose histogram of codes is sent."""


class RunOutputs:
    """Files and logger entries of one analysis that is repeated in the course of a run.

    Args:
        name: first part of the file names: ``<name>.csv``, ``<name>.txt``, ``<name>.json``.
        tags: what goes to the loggers, and under which tags.
        reports: of the callback; they go on if a file cannot be written or a logger fails.
    """

    def __init__(self, name: str, tags: Tags, reports: RunReports) -> None:
        self.name = name
        self.tags = tags
        self._reports = reports
        self._table: GrowingTable | None = None
        self._directory: Path | None = None
        self._has_warned = self._has_layout = False
        self._worst = WorstPoints(tags)

    def write(self, result: Result[Any], directory: str | os.PathLike[str], epoch: int) -> None:
        """Put the rows of an epoch into the csv, and replace txt and json.

        Args:
            result: of this epoch. The csv has one set of rows per epoch: later ones replace those that are there.
            directory: of the run; made if missing.
            epoch: its number.
        """
        place = Path(directory)
        if self._table is None or self._directory != place:  # another fit
            self._table, self._directory = GrowingTable(place / f"{self.name}.csv"), place
            self._has_layout, self._worst = False, WorstPoints(self.tags)
        self._reports.write(place / f"{self.name}.csv", partial(self._write_rows, self._table, result, epoch))
        for write, path in ((write_text, place / f"{self.name}.txt"), (write_json, place / f"{self.name}.json")):
            self._reports.write(path, partial(write, result, path, epoch))

    def _write_rows(self, table: GrowingTable, result: Result[Any], epoch: int) -> None:
        moved = table.write(result, epoch)
        if moved:
            self._reports.warn(moved)

    def log(
        self, result: Result[Any], loggers: Sequence[Any], step: int, rows: int = 50, per_point: bool = False
    ) -> None:
        """Send numbers to all loggers, table and histograms to those that show them; warn once about the others.

        The numbers are those of the worst points. A point that has been among them once is followed from then on.

        Args:
            result: what was found.
            loggers: ``trainer.loggers``.
            step: the x-axis.
            rows: rows of the table at most.
            per_point: send the numbers of every point.
        """
        if not loggers:
            return
        numbers = {**(self.tags.numbers(result) if per_point else {}), **self._worst.numbers(result)}
        without = self._reports.send(loggers, partial(self._send, result, step, rows, numbers))
        self._has_layout = True
        if without and not self._has_warned:
            self._has_warned = True
            self._reports.warn(f"{', '.join(without)} shows no tables: those of {self.name} are only in the files.")

    def _send(
        self, result: Result[Any], step: int, rows: int, numbers: dict[str, float], loggers: list[Any]
    ) -> list[str]:
        log_scalars(loggers, numbers, step)
        if self.tags.worst and not self._has_layout:
            log_layout(loggers, layout())
        followed = self._worst.chosen("sqnr")[:_DRAWN]
        for histogram in result.histograms if isinstance(result, LayerStatisticsResult) else ():
            point = self.tags.full_name({"point": histogram.point, "region": histogram.region})
            if point in followed:
                log_code_histogram(loggers, f"{self.tags.name}.codes/{one_line(point)}", histogram, step)
        for tag, values in self.tags.distributions(result):
            log_histogram(loggers, tag, values, step)
        return log_table(loggers, self.tags.name, result, step, self.tags.table, rows)
