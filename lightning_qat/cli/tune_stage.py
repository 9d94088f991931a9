"""One stage of a tuning, in a process of its own: ``python -m lightning_qat.cli.tune_stage request.json``."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl

import lightning_qat
from lightning_qat.cli.expected_errors import EXPECTED, fail
from lightning_qat.cli.project import Project
from lightning_qat.cli.run_project import run_project
from lightning_qat.tuning.manifest import StageOutcome
from lightning_qat.tuning.stage_callbacks import configure, prepare_training, rules_in_effect
from lightning_qat.tuning.stage_configuration import write_configuration
from lightning_qat.tuning.stage_request import StageRequest, write_outcome
from lightning_qat.tuning.stage_work import stage_work
from lightning_qat.tuning.tuning_settings import file_hash


def run_stage(path: str) -> None:
    """Run the user's project as a request says, and write what came out beside it.

    Args:
        path: of the request.
    """
    request = StageRequest.read(Path(path))
    settings = request.settings
    places = [Path.cwd(), *([Path(settings.script).resolve().parent] if settings.script else [])]

    def work(project: Project) -> None:
        configured = configure(project.trainer, request, project.arguments)
        inputs = {**configured.inputs, **imported_from(places)}
        folder = Path(request.folder)

        def write(module: pl.LightningModule) -> None:
            write_configuration(folder, configured, project.cli, rules_in_effect(module))

        def without_training(trainer: pl.Trainer, module: pl.LightningModule) -> StageOutcome:
            write(module)
            return stage_work(trainer, module, request)

        if request.kind == "train":
            prepare_training(project.trainer, request, project.arguments, inputs, write)
            project.fit(project.module, **project.arguments)
        else:
            outcome = project.before_training(without_training)
            write_outcome(request.folder, replace(outcome, inputs=inputs))

    ckpt_path = settings.ckpt_path
    if ckpt_path is not None and Path(ckpt_path).exists():  # the script may change the directory
        ckpt_path = str(Path(ckpt_path).resolve())
    run_project(settings.script, settings.arguments, work, ckpt_path)


def imported_from(places: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of every module that is imported from some folders or below: the project's own code.

    What is installed below them, such as in a virtual environment, is left out.

    Args:
        places: the folders.
    """
    files = {Path(path).resolve() for m in list(sys.modules.values()) if (path := getattr(m, "__file__", None))}
    own = [file for file in files if file.suffix == ".py" and any(file.is_relative_to(place) for place in places)]
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    installed = [Path(path).resolve() for path in (*libraries, lightning_qat.__path__[0])]
    return {
        str(file): file_hash(file)
        for file in sorted(own)
        if file.is_file() and not any(file.is_relative_to(folder) for folder in installed)
    }


def main() -> int:
    """Run the stage that the command line names; errors are one line."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run_stage(sys.argv[1])
    except EXPECTED as error:
        return fail(error)
    return 0


def _end_with_parent() -> None:
    """End this process when the one that asked for the stage has ended: two must not train in one folder."""
    os.read(0, 1)  # not sys.stdin, whose lock is needed to end the interpreter
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
