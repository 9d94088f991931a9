"""``python -m lightning_qat report``: the page of a run, from its files."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_qat.cli.command import Command
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.reporting.console import print_text
from lightning_qat.reporting.html.judged_run import JudgedRun
from lightning_qat.reporting.html.node_data import write_node_data
from lightning_qat.reporting.html.page import FILE_NAME, write_page
from lightning_qat.reporting.html.run_folder import read_run, require_run

_USAGE = "python -m lightning_qat report RUN_DIR [RUN_DIR ...] [--output FILE] [--node-data COLUMN]"


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the file to write; {FILE_NAME} beside the files of the last run if not given",
    )
    parser.add_argument(
        "--node-data",
        action="append",
        default=[],
        metavar="COLUMN",
        help="also write this column of the points, such as score, for Model Explorer; may be given several times",
    )


def _run(options: argparse.Namespace, script: str | None, arguments: list[str]) -> int:
    unknown = [word for word in arguments if word.startswith("-")]
    if script is None or unknown:
        problem = f"there is no option {unknown[0]}" if unknown else "report takes the log directory of a run"
        raise ConfigurationError(f"{problem}: {_USAGE}")
    runs, output = [require_run(run) for run in (script, *arguments)], options.output
    if output is not None and output.is_dir():
        output = output / FILE_NAME
    judged = [JudgedRun.of(read_run(run)) for run in runs]
    path = write_page(judged, output)
    for column in options.node_data:
        print_text(f"Node data: {write_node_data(judged[-1].points, column, path.parent).resolve()}")
    print_text(f"Report: {path.resolve()}")
    return 0


REPORT = Command(
    name="report",
    summary="one HTML page about a run: verdict, findings, metrics, all points; several runs side by side",
    description="""Write one HTML page about a run from the files in its log directory.

With several runs, the earliest first, the page is about the last one and compares it with the others. The page needs no
network and no other file, so it can be sent to a colleague. It needs Jinja2: pip install 'lightning-qat[html]'.

--node-data COLUMN writes node_data_COLUMN.json beside it. Google's Model Explorer colours the ONNX file of
"python -m lightning_qat export" with it.
""",
    example="",
    add_options=_add_options,
    run=_run,
    usage=_USAGE,
)
