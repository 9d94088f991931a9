"""Results to the loggers of a run: scalars to all, tables and histograms to those that show them (TensorBoard).

Loggers are used by what they can do, so this works without lightning: anything with ``log_metrics(dict, step)``, and an
``experiment`` that may have ``add_text`` and ``add_histogram``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_qat.analysis.results import Result
from lightning_qat.analysis.statistics.code_histogram import CodeHistogram
from lightning_qat.reporting.reports import markdown_report


def method_of(logger: Any, name: str) -> Callable[..., Any] | None:
    """Return a method of what a logger writes with; None if it has none of this name.

    Args:
        logger: one of ``trainer.loggers``.
        name: of the method, such as ``add_text``.
    """
    found = getattr(getattr(logger, "experiment", None), name, None)
    return found if callable(found) else None


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
        columns: which columns; the result's short selection if not given.
        rows: how many rows at most; the files hold all.

    Returns:
        Class names of the loggers that cannot show text: for them there are only the files.
    """
    first, *others = result.full_blocks() if columns else result.blocks()
    blocks = [first.only(columns) if columns else first, *others]
    return log_text(loggers, tag, markdown_report(blocks, rows), step)


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
        add_text = method_of(logger, "add_text")
        if add_text is not None:
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
        add_histogram = method_of(logger, "add_histogram")
        if add_histogram is not None:
            add_histogram(tag, finite, global_step=step)


def log_code_histogram(loggers: Iterable[Any], tag: str, histogram: CodeHistogram, step: int) -> None:
    """Send how the values of a point are spread over its codes to every logger that takes histograms in bins.

    Args:
        loggers: ``trainer.loggers``.
        tag: where the logger files it.
        histogram: of the point; what is clipped has bins of its own beyond the ends.
        step: the x-axis.
    """
    width = histogram.codes_per_bin
    counts = np.array([histogram.below, *histogram.counts, histogram.above], dtype=np.float64)
    limits = histogram.first_code - 0.5 + width * np.arange(len(counts), dtype=np.float64)
    centers = limits - width / 2
    if not counts.sum():
        return
    for logger in loggers:
        add_raw = method_of(logger, "add_histogram_raw")
        if add_raw is not None:
            add_raw(
                tag,
                min=float(centers[0]),
                max=float(centers[-1]),
                num=int(counts.sum()),
                sum=float((counts * centers).sum()),
                sum_squares=float((counts * centers**2).sum()),
                bucket_limits=limits.tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )


def log_layout(loggers: Iterable[Any], layout: Mapping[str, Any]) -> None:
    """Send a layout of charts to every logger that has a tab for it.

    Args:
        loggers: ``trainer.loggers``.
        layout: charts by category and title.
    """
    for logger in loggers:
        add_custom_scalars = method_of(logger, "add_custom_scalars")
        if add_custom_scalars is not None:
            add_custom_scalars(layout)
