"""``python -m lightning_qat pipeline-check``: is the pipeline to blame, before anything is trained."""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl

from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.callbacks.pipeline_check import PipelineCheck
from lightning_qat.callbacks.trainer.output_directory import shared_directory
from lightning_qat.cli.command import Command, add_quantization_options, number_of_batches
from lightning_qat.cli.project import Project
from lightning_qat.cli.run_project import run_project
from lightning_qat.cli.written_result import write_and_show


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference", metavar="FILE", help="fingerprint of the float run, from the command fingerprint"
    )
    parser.add_argument(
        "--batches", type=number_of_batches, default=50, metavar="N", help="training batches per rung (default: 50)"
    )
    add_quantization_options(parser)


def _run(options: argparse.Namespace, script: str | None, arguments: list[str]) -> int:
    check = PipelineCheck(reference=options.reference, batches=options.batches)
    check.read_reference()  # rather now than after the project has been loaded

    def climb(project: Project) -> tuple[PipelineResult, Path, list[str]]:
        def work(trainer: pl.Trainer, module: pl.LightningModule) -> tuple[PipelineResult, Path]:
            return check.check(trainer, module), shared_directory(trainer)

        return *project.before_training(work, options.calibration_batches), project.notes

    result, directory, notes = run_project(script, arguments, climb, options.ckpt_path)
    write_and_show(result, options.output or directory, PipelineCheck.name, notes)
    return int(result.is_bad)


PIPELINE_CHECK = Command(
    name="pipeline-check",
    summary="is the pipeline, the hyperparameters or quantization to blame for a QAT that collapses",
    description="""Train copies of your project's model for a few batches each, changing one thing at a time.

The first rung that breaks names the cause; pipeline_check.txt and .json hold the evidence. Exit status 1 if the
pipeline, the hyperparameters or quantization is to blame.
""",
    example=" --reference pipeline_fingerprint.json",
    add_options=_add_options,
    run=_run,
)
