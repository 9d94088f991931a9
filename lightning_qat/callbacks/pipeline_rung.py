"""What the checks of the training pipeline have in common: when they run, what they write, what they say."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from typing_extensions import override

from lightning_qat.analysis.pipeline import Measurement, PipelineResult
from lightning_qat.callbacks._compat import steps_taken
from lightning_qat.callbacks.extra_pass import require_regions
from lightning_qat.callbacks.finetune_copy import measure
from lightning_qat.callbacks.output_directory import console_of, run_directory
from lightning_qat.quantization.region import State
from lightning_qat.reporting.console import show
from lightning_qat.reporting.files import write_result
from lightning_qat.reporting.loggers import log_table


class PipelineRung(Callback):
    """Base of the finetune checks; subclasses measure, this class runs them once and reports.

    Args:
        batches: training batches per finetune and rank.
        eval_batches: validation batches per evaluation and rank; all if not given.
        at_epoch: before which epoch it runs.
        stop: stop training on a bad verdict.
    """

    name: ClassVar[str] = ""

    def __init__(self, batches: int, eval_batches: int | None, at_epoch: int, stop: bool) -> None:
        for what, value in (("batches", batches), ("eval_batches", eval_batches), ("at_epoch", at_epoch + 1)):
            if value is not None and value < 1:
                raise MisconfigurationException(f"{type(self).__name__}: {what} is too small.")
        self.batches = batches
        self.eval_batches = eval_batches
        self.at_epoch = at_epoch
        self.stop = stop
        self.result: PipelineResult | None = None
        self._done = False

    @property
    def eval_limit(self) -> float:
        """Validation batches per evaluation."""
        return math.inf if self.eval_batches is None else self.eval_batches

    def measure_rungs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> PipelineResult:
        """Measure and judge."""
        raise NotImplementedError

    def measured_as(self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: State) -> Measurement:
        """Evaluate the module with all its regions in ``state``."""
        with ExitStack() as stack:
            for region in require_regions(pl_module, type(self).__name__).values():
                stack.enter_context(region.state(state))
            return measure(trainer, pl_module, self.eval_limit)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._done or trainer.current_epoch != self.at_epoch:
            return
        self._done = True
        self.result = self.measure_rungs(trainer, pl_module)
        self._report(trainer, self.result)
        if self.result.verdict != "healthy":
            rank_zero_warn(f"{type(self).__name__}: {self.result.note}")
            if self.stop:
                trainer.should_stop = True

    def _report(self, trainer: pl.Trainer, result: PipelineResult) -> None:
        directory = run_directory(trainer)  # broadcasts: on all ranks
        if not trainer.is_global_zero:
            return
        write_result(result, directory, self.name, formats=("txt", "json"))
        log_table(trainer.loggers, f"lightning_qat/{self.name}", result, steps_taken(trainer))
        show(result, console_of(trainer))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = bool(state_dict["done"])
