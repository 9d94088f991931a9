"""One stage of a tuning, in a process of its own: ``python -m lightning_qat.cli.tune_stage request.json``."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.cli.project import Project
from lightning_qat.cli.run_project import run_project
from lightning_qat.quantization.errors import ConfigurationError, TracingError
from lightning_qat.tuning.stage_callbacks import configure, prepare_training
from lightning_qat.tuning.stage_configuration import write_configuration
from lightning_qat.tuning.stage_request import StageRequest, write_outcome
from lightning_qat.tuning.stage_work import stage_work


def run_stage(path: str) -> None:
    """Run the user's project as a request says, and write what came out beside it.

    Args:
        path: of the request.
    """
    request = StageRequest.read(Path(path))
    settings = request.settings

    def work(project: Project) -> None:
        quantization = configure(project.trainer, request, project.arguments)
        write_configuration(Path(request.folder), quantization, project.cli)
        if request.kind == "train":
            prepare_training(project.trainer, request, project.arguments)
            project.fit(project.module, **project.arguments)
        else:
            outcome = project.before_training(lambda trainer, module: stage_work(trainer, module, request))
            write_outcome(request.folder, outcome)

    run_project(settings.script, settings.arguments, work, settings.ckpt_path)


def main() -> int:
    """Run the stage that the command line names; errors are one line."""
    try:
        run_stage(sys.argv[1])
    except (ConfigurationError, MisconfigurationException, TracingError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
