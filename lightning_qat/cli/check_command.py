"""``python -m lightning_qat check``: the model check without training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import lightning.pytorch as pl

from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult
from lightning_qat.callbacks.model_check import FailOn, ModelCheck
from lightning_qat.callbacks.trainer.output_directory import shared_directory
from lightning_qat.cli.command import Command, add_quantization_options
from lightning_qat.cli.project import Project
from lightning_qat.cli.run_project import run_project
from lightning_qat.cli.written_result import write_and_show
from lightning_qat.reporting.model_check_file import FILE_NAME


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fail-on",
        choices=get_args(FailOn),
        default="never",
        help="exit with status 1 if a finding is at least this severe (default: never)",
    )
    add_quantization_options(parser)


def _run(options: argparse.Namespace, script: str | None, arguments: list[str]) -> int:
    def check(project: Project) -> tuple[ModelCheckResult, Path, list[str]]:
        def work(trainer: pl.Trainer, module: pl.LightningModule) -> tuple[ModelCheckResult, Path]:
            return ModelCheck().check(trainer, module), shared_directory(trainer)

        return *project.before_training(work, options.calibration_batches), project.notes

    result, directory, notes = run_project(script, arguments, check, options.ckpt_path)
    write_and_show(result, options.output or directory, FILE_NAME, notes)
    return int(options.fail_on != "never" and bool(result.at_least(options.fail_on)))


CHECK = Command(
    name="check",
    summary="what is wrong with the quantized model: unfused, unquantized, shared, not as configured",
    description=f"""Insert fake-quant into your project's model as training would, calibrate, and report what is wrong.

The findings are printed; {FILE_NAME}.txt and .json hold everything, with the tables.
""",
    example="",
    add_options=_add_options,
    run=_run,
)
