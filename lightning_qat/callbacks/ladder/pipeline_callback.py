"""The base of the checks of the training pipeline: when they run, what they write, what they print."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from typing_extensions import override

from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.ladder.measurements import Ladder
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult, cannot_tell
from lightning_qat.callbacks.ladder.ladder import measure_ladder
from lightning_qat.callbacks.preservation.rebinding import NotACopyError
from lightning_qat.callbacks.trainer._compat import steps_taken
from lightning_qat.callbacks.trainer.messages import rank_zero_info, rank_zero_warn
from lightning_qat.callbacks.trainer.misconfiguration import misconfiguration
from lightning_qat.callbacks.trainer.numeric_arguments import require_at_least
from lightning_qat.callbacks.trainer.output_directory import console_of, leaves_files, run_directory
from lightning_qat.callbacks.trainer.reporting_callback import ReportingCallback, described, ends_run
from lightning_qat.callbacks.trainer.stored_state import read_state
from lightning_qat.reporting.console import show
from lightning_qat.reporting.loggers import log_table

Known: TypeAlias = Fingerprint | dict[str, float] | None
"""The float run, as far as it is known: its fingerprint, or its metrics."""


class PipelineCallback(ReportingCallback):
    """Base of the checks of the training pipeline; subclasses measure rungs, this class runs them once and reports.

    A check that fails must not end the training run: its verdict is ``cannot tell``, with the reason.

    Args:
        batches: training batches per finetune and rank.
        eval_batches: validation batches per evaluation and rank; all if not given.
        at_epoch: the epoch before which the check runs; None to leave that to the subclass.
        stop: stop training on a bad verdict (Lightning still honours ``min_epochs`` and ``min_steps``).
        reference: path of the float run's fingerprint, or its metrics.

    Raises:
        MisconfigurationException: a value is not one of the choices.
    """

    name: ClassVar[str] = ""

    def __init__(
        self,
        batches: int,
        eval_batches: int | None,
        at_epoch: int | None,
        stop: bool,
        reference: str | dict[str, float] | None,
    ) -> None:
        super().__init__()
        require_at_least(type(self).__name__, batches=batches, eval_batches=eval_batches)
        require_at_least(type(self).__name__, least=0, at_epoch=at_epoch)
        self.batches = batches
        self.eval_batches = eval_batches
        self.at_epoch = at_epoch
        self.stop = stop
        if reference is not None and not isinstance(reference, (str, dict)):
            raise MisconfigurationException(
                f"{type(self).__name__}(reference={reference!r}): write the path of a fingerprint, or "
                "{'val_acc': 0.98}."
            )
        if isinstance(reference, dict):
            _check_metrics(type(self).__name__, reference)
        self.reference = reference
        self.known: Known = None
        self.result: PipelineResult | None = None
        self._done = False
        self._ran_before = False

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint; it holds the epoch, so that several checks do not share a state."""
        return self._generate_state_key(at_epoch=self.at_epoch)

    def should_run(self, trainer: pl.Trainer) -> bool:
        """Whether the check runs before this epoch. Override for another schedule; it runs once in any case."""
        return trainer.current_epoch == self.at_epoch

    def measure_rungs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> PipelineResult:
        """Measure and judge."""
        raise NotImplementedError

    def read_reference(self) -> Known:
        """Read the reference of the float run from its file; metrics given as a dictionary are returned as they are.

        Raises:
            MisconfigurationException: the file is missing, or is not a fingerprint.
        """
        if not isinstance(self.reference, str):
            return self.reference
        with misconfiguration():
            return Fingerprint.from_json(self.reference)

    def comparable(self, steps: int) -> Known:
        """Return the reference that was read, unless the weights to be checked have been trained since then.

        Args:
            steps: how many steps they have been trained.
        """
        if steps == 0 or self.known is None:
            return self.known
        rank_zero_warn(
            f"{type(self).__name__} does not compare this run with the reference: its weights have been trained since "
            "the float run (the run was resumed, the check runs later, or start_epoch is set).",
            category=PossibleUserWarning,
        )
        return None

    def measure_ladder(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        rungs: Collection[int],
        batches: int | None = None,
    ) -> Ladder:
        """Measure some rungs of the ladder with this callback's batches. The evaluation has to log the reference."""
        reference = self.known if isinstance(self.known, dict) else ()
        limit = math.inf if self.eval_batches is None else self.eval_batches
        return measure_ladder(trainer, pl_module, rungs, batches or self.batches, limit, type(self).__name__, reference)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.known = self.read_reference()
            # a second fit goes on where the first ended
            self._ran_before = (self._done or self._ran_before) and trainer.current_epoch > 0
            self._done = False
            self.result = self.result if self._ran_before else None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # before the first epoch begins, so that stopping leaves no half epoch behind
        self._run_once(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._run_once(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not (self._done or self._ran_before):
            rank_zero_warn(
                f"{type(self).__name__}(at_epoch={self.at_epoch}) did not run: this training had no start of that "
                "epoch. Write an at_epoch that is still to come."
            )

    def _run_once(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._done or not self.should_run(trainer):
            return
        self._done = True
        self.run_check(trainer, pl_module)

    def run_check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, judge and report now, on all ranks."""
        # what differs between ranks (noise, errors) must not let them disagree
        self.result = result = trainer.strategy.broadcast(self._measured(trainer, pl_module))
        self._report(trainer, result)
        if result.verdict != "healthy":
            rank_zero_warn(f"{type(self).__name__}: {result.note}")
        if result.is_bad and self.stop:
            rank_zero_info(f"{type(self).__name__} stops the training (stop=True).")
            trainer.should_stop = True

    def _measured(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> PipelineResult:
        try:
            return self.measure_rungs(trainer, pl_module)
        except NotACopyError as error:
            return cannot_tell(str(error))
        except Exception as error:
            if trainer.world_size > 1 or ends_run(trainer, error):
                raise
            if isinstance(error, MisconfigurationException):
                return cannot_tell(f"{error} Training goes on without the check.")
            return cannot_tell(
                f"the check failed with {described(error)}. Training goes on without it; the check copies "
                "the module and trains the copy, so look for attributes that cannot be copied."
            )

    def _report(self, trainer: pl.Trainer, result: PipelineResult) -> None:
        directory = run_directory(trainer)  # broadcasts: on all ranks
        if not trainer.is_global_zero:
            return
        file = ""
        if leaves_files(trainer):
            file = self._reports.write_result(result, directory, self.name, formats=("txt", "json"))
        step = steps_taken(trainer)
        self._reports.send(trainer.loggers, lambda loggers: log_table(loggers, self.name, result, step))
        note = result.verdict == "healthy"  # else it is a warning
        self._reports.attempt(lambda: show(result, console_of(trainer), note, file), f"{self.name} was not printed")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done or self._ran_before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = read_state(_Stored, state_dict, self).done


@dataclass(frozen=True)
class _Stored:
    done: bool


def _check_metrics(who: str, reference: Mapping[str, float]) -> None:
    """Refuse metrics of the float run that are not numbers.

    Raises:
        MisconfigurationException: a metric is not a number.
    """
    for metric, value in reference.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise MisconfigurationException(
                f"{who}(reference={{{metric!r}: {value!r}}}): write a number, such as 0.98."
            )
