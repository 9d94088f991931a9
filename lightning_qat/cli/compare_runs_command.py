"""``python -m lightning_qat compare-runs``: two runs side by side."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from lightning_qat.analysis.runs.run_comparison import compare_runs
from lightning_qat.cli.command import Command
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.reporting.console import print_text, show
from lightning_qat.reporting.files import write_result

FILE_NAME = "run_comparison"
_SHOWN = 40
"""Rows on the terminal, at most; changed points are shown in any case."""
_USAGE = "python -m lightning_qat compare-runs BEFORE AFTER [--output DIR]"


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"also write {FILE_NAME}.csv, .txt and .json there",
    )


def _run(options: argparse.Namespace, script: str | None, arguments: list[str]) -> int:
    if script is None or len(arguments) != 1:
        raise ConfigurationError(f"compare-runs takes two runs, the earlier one first: {_USAGE}")
    result = compare_runs(script, arguments[0])
    shown = replace(result, rows=result.rows[: max(_SHOWN, len(result.changed))])
    show(shown)
    if len(shown.rows) < len(result.rows):
        print_text(f"{len(result.rows) - len(shown.rows)} more rows: all are in the files that --output DIR writes.")
    if options.output is not None:
        print_text("\n".join(map(str, write_result(result, options.output, FILE_NAME))))
    return 0


COMPARE_RUNS = Command(
    name="compare-runs",
    summary="two runs side by side: did the changed points become less sensitive, and how did accuracy change",
    description="""Compare the files of two runs: their accuracy and, point by point, configuration and sensitivity.

BEFORE and AFTER are log directories (or lightning_qat in them), or a sensitivity or layer_comparison file each.
""",
    example="",
    add_options=_add_options,
    run=_run,
    usage=_USAGE,
)
