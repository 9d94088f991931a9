"""``python -m lightning_qat inspect``: the tensors of one point, as files and figures."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl

from lightning_qat.analysis.comparison.point_inspection import PointInspection, inspect_point, unknown_point
from lightning_qat.callbacks.analyses.chosen_samples import chosen_samples
from lightning_qat.callbacks.analyses.undisturbed_analysis import undisturbed_analysis
from lightning_qat.callbacks.passes.run_step import run_step
from lightning_qat.callbacks.trainer.output_directory import shared_directory
from lightning_qat.cli.command import Command, add_quantization_options
from lightning_qat.cli.project import Project
from lightning_qat.cli.run_project import run_project
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.region import Region
from lightning_qat.reporting.console import print_note, print_text
from lightning_qat.reporting.inspection_files import summary, write_inspection


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--point",
        required=True,
        metavar="NAME",
        help="the point, such as layers.0.conv1.weight; <region>.<point> where several regions have it",
    )
    parser.add_argument(
        "--samples",
        type=_sample_numbers,
        metavar="I,J,...",
        help="numbers of samples of the validation data, from 0, such as 0,3; the first batch if not given",
    )
    parser.add_argument("--no-figures", action="store_true", help="draw nothing (then matplotlib is not needed)")
    add_quantization_options(parser)


def _run(options: argparse.Namespace, script: str | None, arguments: list[str]) -> int:
    def inspect(project: Project) -> tuple[PointInspection, Path, list[str]]:
        def work(trainer: pl.Trainer, module: pl.LightningModule) -> tuple[PointInspection, Path]:
            with undisturbed_analysis(trainer, module, "inspect") as regions:
                region, point = find_point(regions, options.point)
                batch = chosen_samples(trainer, module, options.samples)
                inspection = inspect_point(
                    regions[region], point, lambda: run_step(trainer, module, batch, "validate"), region
                )
            return inspection, shared_directory(trainer) / "inspect"

        return *project.before_training(work, options.calibration_batches), project.notes

    inspection, directory, notes = run_project(script, arguments, inspect, options.ckpt_path)
    for note in notes:
        print_note(note)
    print_text(summary(inspection))
    paths = write_inspection(inspection, options.output or directory, figures=not options.no_figures)
    print_text("\n".join(map(str, paths)))
    return 0


def find_point(regions: Mapping[str, Region], name: str) -> tuple[str, str]:
    """Return region path and point name for what the user wrote.

    Args:
        regions: by the path of their target.
        name: a point name, or ``<region>.<point>``.

    Raises:
        ConfigurationError: there is no such point, or several regions have one of that name.
    """
    points = {path: region.points for path, region in regions.items()}
    found = [path for path, names in points.items() if name in names]
    if len(found) == 1:
        return found[0], name
    for path, names in points.items():
        if path and name.startswith(f"{path}.") and name[len(path) + 1 :] in names:
            return path, name[len(path) + 1 :]
    if found:
        choices = ", ".join(f"{path}.{name}" for path in found)
        raise ConfigurationError(f"several regions have a point {name!r}: write one of {choices}.")
    raise unknown_point(name, [point for names in points.values() for point in names])


def _sample_numbers(text: str) -> tuple[int, ...]:
    numbers = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sample numbers: write one such as 0,3")
    return tuple(int(word) for word in numbers)


INSPECT = Command(
    name="inspect",
    summary="one point of the quantized model: its tensors, their range, histogram and error, as files and figures",
    description="""Run samples through the quantized model in evaluation mode, and save the tensors of one point.

Written to <output>/<point>/: tensors.npz (float, quantized and error of every quantization), summary.txt, histogram.csv
and three figures. The names of the points are those of the reports, such as model_check_result.txt.
""",
    example=" --point layers.0.conv1.weight",
    add_options=_add_options,
    run=_run,
)
