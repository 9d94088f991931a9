"""``python -m lightning_qat analyse``: the reports that a run would have made at its end, from its checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_qat.cli.command import Command
from lightning_qat.cli.project import Project
from lightning_qat.cli.run_project import run_project
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.reporting.console import print_text

_REPORTING = "SensitivityAnalysis(), LayerComparison(), LayerStatistics() or AccuracyTable()"


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt_path", metavar="FILE", help="checkpoint of the run, as for trainer.fit")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="the files go to lightning_qat in this directory; in default_root_dir if not given",
    )


def _run(options: argparse.Namespace, script: str | None, arguments: list[str]) -> int:
    def analyse(project: Project) -> tuple[tuple[str, ...], Path]:
        if not project.arguments.get("ckpt_path"):
            raise ConfigurationError("analyse needs a checkpoint of the run: add --ckpt_path last.ckpt.")
        return project.final_reports(options.output)

    names, directory = run_project(script, arguments, analyse, options.ckpt_path)
    if not names:
        raise ConfigurationError(
            f"no callback of this project reports at the end of training: add {_REPORTING} to its callbacks."
        )
    print_text(f"{directory}\nFrom the checkpoint: {', '.join(names)}")
    return 0


ANALYSE = Command(
    name="analyse",
    summary="the reports of the end of training, from a checkpoint: for a run that was killed before it made them",
    description="""Let your project's own callbacks make their final reports of a checkpoint. Nothing is trained.

These are SensitivityAnalysis, LayerComparison, LayerStatistics, ConvergenceMonitor, ModelCheck, AccuracyTable, and
checks of the pipeline that were still to come. A run that is resumed and has nothing left to train makes them too.
""",
    example=" --ckpt_path last.ckpt",
    add_options=_add_options,
    run=_run,
)
