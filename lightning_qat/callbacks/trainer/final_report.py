"""The base of callbacks that report at the end of training: they also do so in a resumed run without training.

A run may be killed behind its last checkpoint, before its reports are made. When it resumes, Lightning finds nothing
left to train, and calls neither ``on_train_start`` nor ``on_train_end``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, WeightAveraging
from typing_extensions import override

from lightning_qat.callbacks.trainer.after_hook import AfterHook
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.callbacks.trainer.messages import rank_zero_info
from lightning_qat.quantization.region.region import find_regions


class FinalReport(Callback):
    """Reports at the end of training, and in a resumed run that has nothing left to train."""

    def report_without_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report on the model of a checkpoint whose training is complete. Called on all ranks."""
        self.on_train_end(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_first(trainer):
            vars(trainer.fit_loop).pop("run", None)  # of a fit that failed before its loop ran
        if trainer.ckpt_path is not None:
            _behind_skipped_training(trainer, partial(self._report_resumed, trainer, pl_module))

    def _is_first(self, trainer: pl.Trainer) -> bool:
        return listed(trainer, FinalReport)[0] is self

    def _report_resumed(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_first(trainer):
            rank_zero_info("Nothing is left to train: the final reports are made from the checkpoint.")
        with _final_weights(trainer, pl_module):
            self.report_without_training(trainer, pl_module)


def last_epoch(trainer: pl.Trainer) -> int:
    """Return the number of the latest epoch that has begun, from 0; behind it, ``current_epoch`` is one more."""
    return max(0, trainer.fit_loop.epoch_progress.current.ready - 1)


def _behind_skipped_training(trainer: pl.Trainer, then: Callable[[], None]) -> None:
    """Call a function behind the fit loop, if the loop finds nothing to train."""
    loop = trainer.fit_loop
    inner = loop.run
    started: list[bool] = []

    def run() -> None:
        vars(loop).pop("run", None)
        start = AfterHook(loop, "on_run_start", partial(started.append, True))
        inner()
        start.cancel()
        if not started:
            then()

    vars(loop)["run"] = run


@contextmanager
def _final_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Put averages into the module, as at the end of training; put the weights of the last step back."""
    averaging = listed(trainer, WeightAveraging)
    try:
        for callback in averaging:
            callback.on_validation_epoch_start(trainer, pl_module)
        _expect_other_weights(pl_module, bool(averaging))
        yield
    finally:
        for callback in averaging:
            callback.on_validation_epoch_end(trainer, pl_module)
        _expect_other_weights(pl_module, bool(averaging))


def _expect_other_weights(pl_module: pl.LightningModule, are_other: bool) -> None:
    for region in find_regions(pl_module).values():
        if are_other and "weight" in region.updates:
            region.scales.expect_other_weights()
