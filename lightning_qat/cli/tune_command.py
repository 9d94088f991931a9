"""``python -m lightning_qat tune``: from a float checkpoint and a target to the smallest share of wide types."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_qat.cli.command import Command
from lightning_qat.cli.run_project import check_script
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.reporting.console import print_text, show
from lightning_qat.tuning.manifest import ManifestFile
from lightning_qat.tuning.time_estimate import estimate, most_trainings
from lightning_qat.tuning.tune import tune
from lightning_qat.tuning.tuning_settings import SKIPPABLE, TuningSettings, default_directory, read_target


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="TARGET",
        help="1%% of float (the default), or val_acc=0.97, mAP=1%%: repeat it for several metrics",
    )
    parser.add_argument("--metric", action="append", default=[], metavar="NAME", help="metric that counts; repeat it")
    parser.add_argument("--dtypes", default="int8,int16", metavar="NARROW,WIDE", help="default: int8,int16")
    parser.add_argument(
        "--always", action="append", default=[], metavar="POINT", help="point at the wide type; repeat it"
    )
    parser.add_argument("--skip", action="append", default=[], metavar="STAGE", help=f"one of: {', '.join(SKIPPABLE)}")
    parser.add_argument("--calibration-only", action="store_true", help="leave out every training")
    parser.add_argument("--repeat", action="append", default=[], metavar="STAGE", help="run a stage once more")
    parser.add_argument("--explore", action="store_true", help="go on after the target is met, to fill the table")
    parser.add_argument("--dry-run", action="store_true", help="print the stages, and run nothing")
    parser.add_argument(
        "--model-output", metavar="PATH", help="output of the quantized part that errors are measured at"
    )
    parser.add_argument("--ckpt_path", metavar="FILE", help="checkpoint with the weights, as for trainer.fit")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where everything goes; tuning_<script> if not given"
    )


def _run(options: argparse.Namespace, script: str | None, arguments: list[str]) -> int:
    if script is not None:
        check_script(Path(script))
    dtypes = tuple(options.dtypes.split(","))
    if len(dtypes) != 2:
        raise ConfigurationError(f"--dtypes {options.dtypes}: write the narrow and the wide type, such as int8,int16.")
    target = read_target(options.target)
    skip = [*options.skip, *(name for name in SKIPPABLE if options.calibration_only and name.endswith("QAT"))]
    folder = options.output or default_directory(script)
    if options.dry_run:
        settings = TuningSettings(
            script,
            tuple(arguments),
            *dtypes,
            target,
            tuple(options.metric),
            tuple(options.always),
            options.ckpt_path,
            tuple(skip),
            options.explore,
            output=options.model_output,
        )
        print_text(planned(settings, folder))
        return 0
    result = tune(
        script,
        arguments,
        target=target,
        metrics=options.metric,
        dtypes=(dtypes[0], dtypes[1]),
        always=options.always,
        ckpt_path=options.ckpt_path,
        skip=skip,
        repeat=options.repeat,
        explore=options.explore,
        output=options.model_output,
        folder=folder,
        say=print_text,
    )
    show(result, file=str(folder / "result.txt"))
    return int(not result.recommended)


def planned(settings: TuningSettings, folder: Path) -> str:
    """Return the stages of a tuning as lines of text, with what each costs at most."""
    narrow, wide = settings.narrow, settings.wide
    stages = [
        ("float", "evaluation without fake-quant, and the model check"),
        ("wide calibrated", f"all points at {wide}: calibration and evaluation; ends here if it collapses"),
        ("wide QAT", f"one training at {wide}"),
        ("narrow calibrated", f"all points at {narrow}: calibration and evaluation; done if it meets the target"),
        ("narrow QAT", f"one training at {narrow}, unless calibration has collapsed; done if it meets the target"),
        ("search", f"one measurement of errors, and at most {settings.evaluations} evaluations of mixes"),
        ("mixed calibrated", "calibration and evaluation of the mix that the search found"),
        ("mixed QAT", f"at most {settings.trainings} trainings, of smaller or larger mixes"),
    ]
    lines = [f"  {name:18} {what}" for name, what in stages if name not in settings.skip]
    head = f"At most {most_trainings(settings)} trainings; everything goes to {folder}."
    return "\n".join([head, *lines, f"Time: {_time(settings, folder)}."])


def _time(settings: TuningSettings, folder: Path) -> str:
    """The estimate of a tuning whose first stage has run; else when there will be one."""
    first = ManifestFile(folder, settings).outcome("float")
    if first is None:
        return (
            "nothing has run yet; the first stage measures an evaluation and a few training steps on a copy, and says "
            "how long the others take"
        )
    return estimate(settings, first.seconds, first.times)


TUNE = Command(
    name="tune",
    summary="find the smallest share of wide types (int16) that meets a target, unattended",
    description="""Run your project stage by stage: float, all wide, all narrow, then mixes, until a target is met.

Each stage is a run of your own training with other types, in a folder of its own. Killed at any moment, the same
command goes on where it was. The result: recommended.yaml, ready for fit, and the table of all stages. Exit status 1 if
the target is missed.
""",
    example=" --target val_acc=1%",
    add_options=_add_options,
    run=_run,
)
