"""Running the user's own project up to the point where training would start.

A command needs the same Trainer, module, data and callbacks that ``fit`` would train with. They are not guessed from a
file. The project runs as usual while ``Trainer.fit`` is replaced; the arguments of the call are the project. This works
for LightningCLI scripts, for scripts that call ``trainer.fit`` themselves, and for configuration files that name their
classes.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import runpy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI

from lightning_qat.cli.checkpoint_errors import blamed_on_checkpoint
from lightning_qat.cli.project import Project
from lightning_qat.cli.script_surroundings import command_line, fitting, on_one_device, replaced
from lightning_qat.quantization.errors import ConfigurationError

T = TypeVar("T")
_HINT = """\
The configuration was read without a script, so it has to name the classes:
  model: {class_path: my_package.MyModule, init_args: {...}}
If your script names them, give the script first: train.py --config fit.yaml"""


def run_project(
    script: str | None, arguments: Sequence[str], work: Callable[[Project], T], ckpt_path: str | None = None
) -> T:
    """Run the user's project up to its call of ``trainer.fit``, and do some work in the place of that call.

    The work is done inside the user's script, so everything that the script has set is in effect. The script ends after
    the work.

    Args:
        script: path of the script that trains; None for a configuration that names its classes (``class_path``), which
            a LightningCLI of our own reads.
        arguments: those of the script; for LightningCLI, those that follow ``fit``.
        work: is given the project.
        ckpt_path: checkpoint to give to ``trainer.fit``; None for the project's own.

    Returns:
        What ``work`` returned.

    Raises:
        ConfigurationError: there is no such script, it never calls ``trainer.fit``, LightningCLI does not understand
            its arguments, or LightningCLI is not installed.
        SystemExit: another script does not understand its arguments.
    """
    if script is not None:
        check_script(Path(script))
    if script is None and importlib.util.find_spec("jsonargparse") is None:
        raise ConfigurationError(
            "a configuration file without a script is read by LightningCLI, which needs jsonargparse: "
            "pip install 'lightning-qat[cli]'. Or give the script that trains: check train.py."
        )
    outcome: _Outcome[T] = _Outcome(work, ckpt_path)
    with ExitStack() as stack:
        stack.enter_context(replaced(pl.Trainer, "__init__", on_one_device(pl.Trainer.__init__)))
        stack.enter_context(replaced(pl.Trainer, "fit", _taken_over(pl.Trainer.fit, outcome)))
        stack.enter_context(replaced(LightningCLI, "__init__", fitting(LightningCLI.__init__, outcome.clis)))
        stack.enter_context(command_line(script, arguments))
        try:
            if script is None:
                _run_configuration()
            else:
                runpy.run_path(script, run_name="__main__")
        except _ProjectDone:
            pass
    return outcome.result(script)


def check_script(path: Path) -> None:
    """Refuse what is no script that can be run.

    Args:
        path: of the script.

    Raises:
        ConfigurationError: it is missing, or another kind of file.
    """
    if not path.is_file():
        raise ConfigurationError(f"there is no script {str(path)!r}.")
    if path.suffix in (".yaml", ".yml", ".json"):
        raise ConfigurationError(f"{str(path)!r} is a configuration, not a script: write train.py --config {path}.")
    if path.suffix not in (".py", ""):
        raise ConfigurationError(f"{str(path)!r} is not a Python script: give the one that trains, such as train.py.")


def _run_configuration() -> None:
    """Fit the configuration that ``sys.argv`` describes."""
    try:
        LightningCLI(save_config_callback=None, seed_everything_default=0)
    except ConfigurationError as error:
        about_classes = any(key in str(error) for key in ('"model"', '"data"', "fit.model"))
        raise ConfigurationError(f"{error}\n{_HINT}" if about_classes else str(error)) from error


class _ProjectDone(BaseException):
    """Ends the user's script; not an Exception, which the script may catch."""


class _Outcome(Generic[T]):
    """The result or the error of the work."""

    def __init__(self, work: Callable[[Project], T], ckpt_path: str | None = None) -> None:
        self.work = work
        self.ckpt_path = ckpt_path
        self.results: list[T] = []
        self.error: BaseException | None = None
        self.clis: list[LightningCLI] = []

    def run(self, project: Project) -> None:
        """Do the work, once."""
        if self.results or self.error is not None:
            return
        if self.ckpt_path is not None:
            project.arguments["ckpt_path"] = self.ckpt_path
        try:
            _check_checkpoint(project.arguments.get("ckpt_path"))
            self.results.append(self.work(project))
        except BaseException as error:  # raised outside of the script, which may catch anything
            self.error = blamed_on_checkpoint(error, project.arguments.get("ckpt_path"))

    def result(self, script: str | None) -> T:
        """Return what the work returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        if not self.results:
            raise ConfigurationError(
                f"{script or 'LightningCLI'} ended without calling trainer.fit. Give it the arguments it trains with."
            )
        return self.results[0]


def _taken_over(original: Callable[..., Any], outcome: _Outcome[Any]) -> Callable[..., Any]:
    @functools.wraps(original)  # LightningCLI reads the signature
    def fit(self: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        given = dict(inspect.signature(original).bind(self, *args, **kwargs).arguments)
        del given["self"]
        cli = outcome.clis[-1] if outcome.clis else None
        outcome.run(Project(self, given.pop("model"), given, functools.partial(original, self), cli))
        raise _ProjectDone

    return fit


def _check_checkpoint(path: Any) -> None:
    """Refuse a missing checkpoint in one line. Lightning itself reads URLs and words such as ``best``."""
    if isinstance(path, str) and Path(path).suffix == ".ckpt" and "://" not in path and not Path(path).exists():
        raise ConfigurationError(f"ckpt_path: there is no file {path!r}.")
