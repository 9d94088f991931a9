"""``python -m lightning_qat compare-pipelines``: what differs between two fingerprints."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.fingerprint.fingerprint_differences import compare_fingerprints
from lightning_qat.cli.command import Command
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.reporting.console import show
from lightning_qat.reporting.files import write_result

_USAGE = "python -m lightning_qat compare-pipelines FLOAT.json OTHER.json [--output DIR]"


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="also write pipeline_differences.txt and .json there"
    )


def _run(options: argparse.Namespace, script: str | None, arguments: list[str]) -> int:
    paths = [*([script] if script is not None else []), *arguments]
    if len(paths) != 2:
        raise ConfigurationError(f"give two fingerprints, that of the float run first: {_USAGE}")
    result = compare_fingerprints(*map(Fingerprint.from_json, paths))
    show(result)
    if options.output:
        write_result(result, options.output, "pipeline_differences", formats=("txt", "json"))
    return int(bool(result.strong))


COMPARE_PIPELINES = Command(
    name="compare-pipelines",
    summary="what differs between two pipelines, the most suspicious first",
    description="""Compare two fingerprints. Give the one of the float run first.

Exit status 1 if one of the differences alone can ruin training.
""",
    example="",
    add_options=_add_options,
    run=_run,
    usage=_USAGE,
)
