"""Results to the loggers of a run: scalars to all, tables and histograms to those that show them (TensorBoard).

Loggers are used by what they can do, so this works without lightning: anything with ``log_metrics(dict, step)``, and an
``experiment`` that may have ``add_text`` and ``add_histogram``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_qat.analysis.results import Result
from lightning_qat.reporting.tables import escape_markdown, panel


def point_scalars(
    result: Result[Any], prefix: str, columns: Sequence[str], region: str = "region", point: str = "point"
) -> dict[str, float]:
    """Return one scalar per row and column, keyed ``<prefix>.<column>/<region>.<point>``.

    A key's part before the slash is a group of its own in TensorBoard: the hundreds of scalars of a column fold into
    one line there. The keys of a row depend only on its names, so they are the same every time. Values that are missing
    (None) are left out.

    Args:
        result: rows with a point and a region.
        prefix: first part of the keys.
        columns: which columns; they have to hold numbers.
        region: column with the path of the target.
        point: column with the name of the point.
    """
    scalars: dict[str, float] = {}
    for row in result.to_dicts():
        name = f"{row[region]}.{row[point]}" if row[region] else row[point]
        for column in columns:
            if row[column] is not None:
                scalars[f"{prefix}.{column}/{name}"] = float(row[column])
    return scalars


def log_scalars(loggers: Iterable[Any], scalars: Mapping[str, float], step: int) -> None:
    """Send scalars to every logger, all in one call: a CSV logger writes one row per call and step.

    Args:
        loggers: ``trainer.loggers``.
        scalars: values by key.
        step: the x-axis.
    """
    if scalars:
        for logger in loggers:
            logger.log_metrics(dict(scalars), step=step)


def log_table(
    loggers: Iterable[Any],
    tag: str,
    result: Result[Any],
    step: int,
    columns: Sequence[str] | None = None,
    rows: int = 50,
) -> list[str]:
    """Send the first rows of a result, as Markdown, to every logger that shows text.

    Args:
        loggers: ``trainer.loggers``.
        tag: where the logger files it.
        result: what to show.
        step: the x-axis.
        columns: which columns; the result's short view if not given.
        rows: how many rows at most; the files hold all.

    Returns:
        Class names of the loggers that cannot show text: for them there are only the files.
    """
    note = getattr(result, "note", "")
    blocks = [escape_markdown(note)] if note else []
    for number, part in enumerate(result.parts()):
        blocks += [f"**{escape_markdown(part.title)}**"] if number else []
        shown = (columns if columns and not number else None) or part.shown or part.columns()
        blocks.append(panel(shown, part.to_dicts()[:rows]))
        if len(part.rows) > rows:
            blocks.append(f"The first {rows} of {len(part.rows)} rows; all are in the files.")
    return log_text(loggers, tag, "\n\n".join(blocks), step)


def log_text(loggers: Iterable[Any], tag: str, text: str, step: int) -> list[str]:
    """Send Markdown to every logger that shows text.

    Args:
        loggers: ``trainer.loggers``.
        tag: where the logger files it.
        text: Markdown.
        step: the x-axis.

    Returns:
        Class names of the loggers that cannot show text.
    """
    without = []
    for logger in loggers:
        add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
        if callable(add_text):
            add_text(tag, text, global_step=step)
        else:
            without.append(type(logger).__name__)
    return without


def log_histogram(loggers: Iterable[Any], tag: str, values: Iterable[float | None], step: int) -> None:
    """Send the distribution of values (one per point) to every logger that draws histograms.

    Args:
        loggers: ``trainer.loggers``.
        tag: where the logger files it.
        values: the values; None and values that are not finite are left out, and without any nothing is sent.
        step: the x-axis.
    """
    finite = np.array([v for v in values if v is not None and math.isfinite(v)], dtype=np.float64)
    if not finite.size:
        return
    for logger in loggers:
        add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
        if callable(add_histogram):
            add_histogram(tag, finite, global_step=step)
