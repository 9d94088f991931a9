"""The user's own project, run up to the point where training would start.

A command needs exactly what ``fit`` would train: the same Trainer, module, data and callbacks. Instead of guessing them
from a file, the project is run as usual, and ``Trainer.fit`` is taken over for that time: what it is called with is the
project. This works for LightningCLI scripts, for scripts that call ``trainer.fit`` themselves, and for configuration
files that name their classes.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, Checkpoint, LearningRateFinder, ModelSummary
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.cli.configuration_errors import readable
from lightning_qat.quantization.errors import ConfigurationError

T = TypeVar("T")
Work = Callable[[pl.Trainer, pl.LightningModule], T]
_WRITES_OR_TRAINS = (Checkpoint, LearningRateFinder, BatchSizeFinder, ModelSummary, SaveConfigCallback)
_DEFAULT_CALIBRATION_BATCHES = 8
_HINT = """\
The configuration was read without a script, so it has to name the classes:
  model: {class_path: my_package.MyModule, init_args: {...}}
If your script names them, give the script first: train.py --config fit.yaml"""


@dataclass(frozen=True)
class Project:
    """A call of ``trainer.fit``, as the user's code made it.

    Args:
        trainer: the Trainer; on one device, whatever the project asks for.
        module: the module.
        arguments: the other arguments of the call: loaders or datamodule, ``ckpt_path``.
        fit: Lightning's own method, of this trainer.
        notes: what a command had to change, for the user.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    arguments: dict[str, Any]
    fit: Callable[..., None]
    notes: list[str] = field(default_factory=list)

    def before_training(self, work: Work[T], calibration_batches: int | None = None) -> T:
        """Set everything up as ``fit`` does, calibrate, do some work in the place of training, and tear down.

        Fake-quant is inserted, weights are loaded, the module is on its device and the optimizers exist. Callbacks that
        would train, write or analyse are left out, and loggers are silent.

        Args:
            work: is given the trainer and the module.
            calibration_batches: how many batches to calibrate with; 0 for none. As configured if not given.

        Returns:
            What ``work`` returned.
        """
        kept = [c for c in _callbacks(self.trainer) if not _is_left_out(c)]
        return self._in_place_of_training(work, self._quantizing(kept, calibration_batches))

    def without_fake_quant(self, work: Work[T]) -> T:
        """The same in float, for a float project: no callback of this package takes part.

        Args:
            work: is given the trainer and the module.
        """
        ours = (QuantizationAwareTraining, Calibration)
        kept = [c for c in _callbacks(self.trainer) if not _is_left_out(c) and not isinstance(c, ours)]
        return self._in_place_of_training(work, kept)

    def _in_place_of_training(self, work: Work[T], callbacks: list[Callback]) -> T:
        trainer, last = self.trainer, _InPlaceOfTraining(work)
        trainer.callbacks = [*callbacks, last]  # type: ignore[attr-defined]
        if trainer.loggers:
            trainer.loggers = [DummyLogger()]
        self.fit(self.module, **self.arguments)
        return last.results[0]

    def _quantizing(self, callbacks: list[Callback], calibration_batches: int | None) -> list[Callback]:
        """Complete the callbacks: fake-quant from the first step on, and calibrated as asked for."""
        if not any(isinstance(c, QuantizationAwareTraining) for c in callbacks):
            weights = self.arguments.pop("ckpt_path", None)  # of a float run
            callbacks = [QuantizationAwareTraining(init_from=weights), *callbacks]
            self.notes.append(
                "QuantizationAwareTraining is not among the callbacks of this project: its defaults were used (int8), "
                + (f"from {weights}." if weights else "from the weights that the project starts with.")
            )
        if calibration_batches is not None:
            callbacks = [c for c in callbacks if not isinstance(c, Calibration)]
        if not any(isinstance(c, Calibration) for c in callbacks) and calibration_batches != 0:
            callbacks = [*callbacks, Calibration(batches=calibration_batches or _DEFAULT_CALIBRATION_BATCHES)]
        for callback in callbacks:
            if isinstance(callback, QuantizationAwareTraining):  # start_epoch, or a schedule of the user's
                callback.__dict__["should_quantize"] = lambda trainer: True
        return callbacks


class _InPlaceOfTraining(Callback, Generic[T]):
    """Does the work when everything is set up, and leaves nothing to train."""

    def __init__(self, work: Work[T]) -> None:
        self.work = work
        self.results: list[T] = []

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback in _callbacks(trainer):
            if isinstance(callback, Calibration):  # from the module's configure_callbacks: these come last
                callback.calibrate_if_needed(trainer, pl_module)
        self.results.append(self.work(trainer, pl_module))
        trainer.num_sanity_val_steps = 0
        trainer.fit_loop.epoch_loop.max_steps = 0
        trainer.fit_loop.max_epochs = -1  # a checkpoint of a finished training is restored after this


def run_project(
    script: str | None, arguments: Sequence[str], work: Callable[[Project], T], ckpt_path: str | None = None
) -> T:
    """Run the user's project up to its call of ``trainer.fit``, and do some work in the place of that call.

    The work is done inside the user's script, which is ended then: everything the script has set is still in effect.

    Args:
        script: path of the script that trains; None for a configuration that names its classes (``class_path``), which
            a LightningCLI of our own reads.
        arguments: those of the script; for LightningCLI, those that follow ``fit``.
        work: is given the project.
        ckpt_path: checkpoint to give to ``trainer.fit``; what the project gives if None.

    Returns:
        What ``work`` returned.

    Raises:
        ConfigurationError: there is no such script, it never calls ``trainer.fit``, LightningCLI does not understand
            its arguments, or LightningCLI is not installed.
        SystemExit: another script does not understand its arguments.
    """
    if script is not None:
        _check_script(Path(script))
    if script is None and importlib.util.find_spec("jsonargparse") is None:
        raise ConfigurationError(
            "a configuration file without a script is read by LightningCLI, which needs jsonargparse: "
            "pip install 'lightning-qat[cli]'. Or give the script that trains: check train.py."
        )
    outcome: _Outcome[T] = _Outcome(work, ckpt_path)
    with ExitStack() as stack:
        stack.enter_context(_replaced(pl.Trainer, "__init__", _on_one_device(pl.Trainer.__init__)))
        stack.enter_context(_replaced(pl.Trainer, "fit", _taken_over(pl.Trainer.fit, outcome)))
        stack.enter_context(_replaced(LightningCLI, "__init__", _fitting(LightningCLI.__init__)))
        stack.enter_context(_command_line(script, arguments))
        try:
            if script is None:
                _run_configuration()
            else:
                runpy.run_path(script, run_name="__main__")
        except _ProjectDone:
            pass
    return outcome.result(script)


def _check_script(path: Path) -> None:
    if not path.is_file():
        raise ConfigurationError(f"there is no script {str(path)!r}.")
    if path.suffix in (".yaml", ".yml", ".json"):
        raise ConfigurationError(f"{str(path)!r} is a configuration, not a script: write train.py --config {path}.")
    if path.suffix not in (".py", ""):
        raise ConfigurationError(f"{str(path)!r} is not a Python script: give the one that trains, such as train.py.")


def _run_configuration() -> None:
    """Fit what ``sys.argv`` describes."""
    try:
        LightningCLI(save_config_callback=None, seed_everything_default=0)
    except ConfigurationError as error:
        about_classes = any(key in str(error) for key in ('"model"', '"data"', "fit.model"))
        raise ConfigurationError(f"{error}\n{_HINT}" if about_classes else str(error)) from error


class _ProjectDone(BaseException):
    """Ends the user's script; not an Exception, which the script may catch."""


class _Outcome(Generic[T]):
    """What became of the work."""

    def __init__(self, work: Callable[[Project], T], ckpt_path: str | None = None) -> None:
        self.work = work
        self.ckpt_path = ckpt_path
        self.results: list[T] = []
        self.error: BaseException | None = None

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
            self.error = error

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
        outcome.run(Project(self, given.pop("model"), given, functools.partial(original, self)))
        raise _ProjectDone

    return fit


def _check_checkpoint(path: Any) -> None:
    """Say in one line that there is no such checkpoint; Lightning's own words (best, last, ...) and addresses pass."""
    if isinstance(path, str) and Path(path).suffix == ".ckpt" and "://" not in path and not Path(path).exists():
        raise ConfigurationError(f"ckpt_path: there is no file {path!r}.")


def _on_one_device(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **one_device(kwargs))

    return __init__


def one_device(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a Trainer's arguments for one device: other ranks would run the script again, and train.

    The first device that is named stays. Strategies that shard the model stay too: they are an error of their own.

    Example:
        >>> one_device({"devices": [2, 3], "strategy": "ddp", "precision": "bf16-mixed"})
        {'devices': [2], 'strategy': 'auto', 'precision': 'bf16-mixed', 'num_nodes': 1}
    """
    devices, strategy = arguments.get("devices", "auto"), arguments.get("strategy", "auto")
    if isinstance(devices, str) and "," in devices:
        devices = [int(number) for number in devices.split(",") if number.strip()]
    if devices not in (0, "0", []):  # Lightning says what is wrong with those
        devices = list(devices[:1]) if isinstance(devices, (list, tuple)) else 1
    if type(strategy) is DDPStrategy or (isinstance(strategy, str) and strategy.startswith("ddp")):
        strategy = "auto"
    return {**arguments, "devices": devices, "strategy": strategy, "num_nodes": 1}


def _fitting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let a LightningCLI fit, unless it is told another subcommand, or has none.

    A mistake in its arguments is one error, not pages of options.
    """

    @functools.wraps(original)
    def __init__(self: LightningCLI, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(original).bind(self, *args, **kwargs)
        words = sys.argv[1:2]
        if (
            given.arguments.get("run", True)
            and given.arguments.get("args") is None
            and not (words and words[0] in self.subcommands())
        ):
            sys.argv.insert(1, "fit")
        options = given.arguments.get("parser_kwargs") or {}
        raising = {name: {**options.get(name, {}), "exit_on_error": False} for name in self.subcommands()}
        given.arguments["parser_kwargs"] = {**options, "exit_on_error": False, **raising}
        try:
            original(*given.args, **given.kwargs)
        except Exception as error:
            if (short := readable(error)) is None:
                raise
            raise short from error

    return __init__


@contextmanager
def _command_line(script: str | None, arguments: Sequence[str]) -> Iterator[None]:
    """``sys.argv`` and ``sys.path`` as ``python script.py arguments`` has them."""
    argv, path = sys.argv, sys.path
    sys.argv = [script or "lightning_qat", *arguments]
    sys.path = [str(Path(script).resolve().parent) if script else str(Path.cwd()), *path]
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path


@contextmanager
def _replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _is_left_out(callback: Callback) -> bool:
    if isinstance(callback, (QuantizationAwareTraining, Calibration)):
        return False
    ours = any(base.__module__.startswith("lightning_qat.") for base in type(callback).__mro__)
    return ours or isinstance(callback, _WRITES_OR_TRAINS)


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
