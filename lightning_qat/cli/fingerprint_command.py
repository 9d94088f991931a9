"""``python -m lightning_qat fingerprint``: the fingerprint of a float project that is trained already."""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl

from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.callbacks.pipeline_fingerprint import FILE_NAME, take_fingerprint
from lightning_qat.callbacks.trainer.output_directory import shared_directory
from lightning_qat.cli.command import Command, add_project_options, number_of_batches
from lightning_qat.cli.project import Project
from lightning_qat.cli.run_project import run_project
from lightning_qat.reporting.console import print_note, print_text
from lightning_qat.reporting.files import write_fingerprint


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batches", type=number_of_batches, default=8, metavar="N", help="batches per stage to look at (default: 8)"
    )
    add_project_options(parser)


def _run(options: argparse.Namespace, script: str | None, arguments: list[str]) -> int:
    def look(project: Project) -> tuple[Fingerprint, Path, bool]:
        def work(trainer: pl.Trainer, module: pl.LightningModule) -> tuple[Fingerprint, Path]:
            return take_fingerprint(trainer, module, max(1, options.batches)), shared_directory(trainer)

        has_weights = bool(project.arguments.get("ckpt_path"))
        return *project.without_fake_quant(work), has_weights

    fingerprint, directory, has_weights = run_project(script, arguments, look, options.ckpt_path)
    if not has_weights:
        print_note(
            "no --ckpt_path was given: this is the fingerprint of the weights that the project starts with. "
            "If it does not load trained ones itself, give them: --ckpt_path float.ckpt"
        )
    path = write_fingerprint(fingerprint, (options.output or directory) / FILE_NAME)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in {**fingerprint.metrics, **fingerprint.losses}.items())
    print_text(
        f"{path}\n{numbers}\nIn QAT: PipelineCheck(reference={str(path)!r}), or pipeline-check --reference {path}"
    )
    return 0


FINGERPRINT = Command(
    name="fingerprint",
    summary="describe a float pipeline (data, preprocessing, loss, modes, weights) for a comparison with QAT",
    description=f"""Run a float project with its trained weights on the first batches, and write {FILE_NAME}.

Give the checkpoint with --ckpt_path float.ckpt, unless the script loads the trained weights itself. Nothing is
quantized. Hand the file to pipeline-check, to PipelineCheck(reference=...), or to compare-pipelines.
""",
    example=" --ckpt_path float.ckpt",
    add_options=_add_options,
    run=_run,
)
