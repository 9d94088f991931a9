"""The callback that runs all rungs of the pipeline ladder and gives one verdict.

The verdict blames the pipeline, the hyperparameters or quantization, or calls the run healthy.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.rungs import FLOAT_MODEL, RUNGS
from lightning_qat.analysis.ladder.verdict import judge
from lightning_qat.callbacks.convergence_monitor import ConvergenceMonitor
from lightning_qat.callbacks.ladder.pipeline_callback import PipelineCallback
from lightning_qat.callbacks.ladder.starting_point import StartingPoint
from lightning_qat.callbacks.pipeline_fingerprint import take_comparable, take_fingerprint
from lightning_qat.callbacks.quantized_run import is_calibrated, require_regions
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.callbacks.trainer.messages import rank_zero_info
from lightning_qat.callbacks.trainer.stored_state import read_state

_LONGER = 10
"""A check after a flag uses at most this many times the batches of a check before training."""


class PipelineCheck(PipelineCallback):
    """Find out whether the pipeline, the hyperparameters or quantization is to blame, before training or on demand.

    The check is a ladder of rungs. Each rung changes one thing, and the first rung that breaks names the cause:

    - 0: the float model as it is;
    - 1: fake-quant inserted but off; every value must stay the same, bit for bit;
    - 2: learning rate 0, batch norm fixed;
    - 3: learning rate 0, batch norm moving;
    - 4: learning rate 0, quantized;
    - 5: trained as in QAT, without fake-quant;
    - 6: QAT itself.

    Every rung trains a deep copy with fresh loaders. The run itself stays bit-identical.

    With a ``reference`` the verdict also says *what* is misaligned. The reference is the fingerprint of the float run;
    :class:`PipelineFingerprint` and ``python -m lightning_qat fingerprint`` write it. Without a reference the check
    cannot detect wrong labels, a wrong loss or a wrong checkpoint.

    The check runs before ``at_epoch``. If :class:`ConvergenceMonitor` flags the run, it runs once more at the next
    epoch boundary. This second check starts from the weights, optimizers and schedules that the run started from (a
    copy is kept in main memory). It uses as many batches as the run took until the flag, but at most ten times
    ``batches``.

    Goes to: ``pipeline_check.txt|json`` in the run's ``lightning_qat`` directory, TensorBoard, the terminal; a warning
    unless the verdict is healthy. Rungs 5 and 6 need automatic optimization.

    Args:
        reference: path of the float run's fingerprint, or its metrics such as ``{val_acc: 0.98}``.
        batches: training batches per rung and rank.
        eval_batches: validation batches per evaluation and rank; all if not given.
        at_epoch: the epoch before which the check runs; None to run it only after a flag.
        after_flag: also run the check after ConvergenceMonitor has flagged the run.
        stop: stop training on a bad verdict.
        rungs: numbers of the rungs to run, such as ``[2, 3]``; all if not given. Rung 0 always runs.

    Raises:
        MisconfigurationException: a value is not one of the choices, the reference cannot be read, or (raised before
            the first step) the validation step does not log a metric that the reference names.

    Attributes:
        result: evidence and verdict, after it ran.

    Example::

        trainer = Trainer(callbacks=[QuantizationAwareTraining(), Calibration(), ConvergenceMonitor(),
                                     PipelineCheck(reference="pipeline_fingerprint.json")])
    """

    name = "pipeline_check"

    def __init__(
        self,
        reference: str | dict[str, float] | None = None,
        batches: int = 50,
        eval_batches: int | None = None,
        at_epoch: int | None = 0,
        after_flag: bool = True,
        stop: bool = False,
        rungs: list[int] | None = None,
    ) -> None:
        super().__init__(batches, eval_batches, at_epoch, stop, reference)
        unknown = [number for number in rungs or () if number not in RUNGS]
        if unknown or (rungs is not None and not rungs):
            raise MisconfigurationException(
                f"PipelineCheck(rungs={rungs}): write numbers from 0 to {RUNGS[-1]}, such as [2, 3]; all if left out."
            )
        if at_epoch is None and not after_flag:
            raise MisconfigurationException(
                "PipelineCheck(at_epoch=None, after_flag=False) never runs: write at_epoch=0."
            )
        self.after_flag = after_flag
        self.rungs = tuple(sorted({FLOAT_MODEL, *(rungs if rungs is not None else RUNGS)}))
        self._start: tuple[int, StartingPoint] | None = None
        self._flag_done = False
        self._flag = ""
        self._steps = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._start, self._flag, self._flag_done, self._steps = None, "", False, 0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        later = self._monitor(trainer) is not None or bool(self.at_epoch and not self._done)
        if self._start is None and later and is_calibrated(pl_module):
            self._start = trainer.global_step, StartingPoint(trainer, pl_module)
        self._steps += 1

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._run_after_flag(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.at_epoch is not None:
            super().on_train_end(trainer, pl_module)
        self._run_after_flag(trainer, pl_module)

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> PipelineResult:
        """Measure and judge now; nothing is written.

        Args:
            trainer: with optimizers.
            pl_module: its module, with fake-quant inserted.
        """
        self.known = self.read_reference()
        return self.measure_rungs(trainer, pl_module)

    @override
    def measure_rungs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> PipelineResult:
        """Measure and judge the rungs, from the weights that the run started from."""
        require_regions(trainer, pl_module, "PipelineCheck")
        started, start = self._start if self._start is not None else (trainer.global_step, None)
        known = self.comparable(started)
        batches = min(max(self.batches, self._steps), _LONGER * self.batches) if self._flag else self.batches
        with start.restored(trainer, pl_module) if start is not None else nullcontext():
            if isinstance(known, Fingerprint):
                here = take_comparable(trainer, pl_module, known)
            else:
                here = take_fingerprint(trainer, pl_module, steps=started)
            ladder = self.measure_ladder(trainer, pl_module, self.rungs, batches)
        return judge(ladder, known, here, self.rungs, flag=self._flag)

    def _run_after_flag(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        monitor = self._monitor(trainer)
        if self._flag_done or monitor is None or monitor.result is None or not monitor.result.is_bad:
            return
        self._flag_done = True
        self._flag = monitor.result.verdict
        rank_zero_info(f"ConvergenceMonitor has flagged this run ({self._flag}): PipelineCheck looks for the cause.")
        self.run_check(trainer, pl_module)

    def _monitor(self, trainer: pl.Trainer) -> ConvergenceMonitor | None:
        return next(iter(listed(trainer, ConvergenceMonitor)), None) if self.after_flag else None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "flag_done": self._flag_done}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._flag_done = read_state(_Stored, state_dict, self).flag_done

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_start": None}


@dataclass(frozen=True)
class _Stored:
    flag_done: bool
