"""What `trainer.callback_metrics` and its siblings show in our evaluation, against Lightning's own loop.

The kind is a module that reads, in any hook or step of its evaluation, what it has logged so far.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_qat.callbacks.passes.evaluation import evaluate
from tests.harness.classifier import Classifier, loader
from tests.harness.trainers import trainer

Shown = tuple[str, dict[str, float], dict[str, float], dict[str, float]]


class Reads(Classifier):
    """Logs on every level, and reads at every moment."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.seen: list[Shown] = []

    def read(self, at: str) -> None:
        t = self.trainer
        shown = [{k: float(v) for k, v in d.items()} for d in (t.callback_metrics, t.logged_metrics)]
        self.seen.append((at, shown[0], shown[1], {k: float(v) for k, v in t.progress_bar_metrics.items()}))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.read("step")
        values = self(batch[0]).mean(dim=1)
        self.log("a", values.mean())
        self.log("b", values.max(), on_step=True, on_epoch=True, prog_bar=True, reduce_fx="max")
        self.log("c", values.min(), logger=False, batch_size=3)
        self.mean(values)
        self.log("m", self.mean, on_epoch=True)
        self.read("after logging")

    def on_validation_epoch_start(self) -> None:
        self.read("epoch start")

    def on_validation_batch_end(self, *args: Any) -> None:
        self.read("batch end")

    def on_validation_epoch_end(self) -> None:
        name = "a/dataloader_idx_1" if self.trainer.num_val_batches[1:] else "a"
        self.log("twice", 2 * self.trainer.callback_metrics[name], prog_bar=True)
        self.read("epoch end")


class Evaluates(Callback):
    """Evaluates at the start of an epoch of validation, and compares what the trainer shows before and after."""

    def __init__(self) -> None:
        self.seen: list[Shown] = []
        self.numbers: dict[str, float] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Reads)
        connector = trainer._logger_connector
        before = [dict(d) for d in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)]
        state = connector._first_loop_iter, connector._current_fx, trainer._results
        inner: list[Shown] = []
        pl_module.read = lambda at: inner.append(_shown(trainer, at))  # type: ignore[method-assign]
        self.numbers = evaluate(trainer, pl_module).metrics
        del pl_module.read
        self.seen = inner
        assert [trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics] == before
        assert (connector._first_loop_iter, connector._current_fx, trainer._results) == state


def _shown(trainer: Trainer, at: str) -> Shown:
    shown = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
    callback, logged, bar = ({k: float(v) for k, v in d.items()} for d in shown)
    return at, callback, logged, bar


@pytest.mark.parametrize("loaders", [1, 2])
def test_what_is_shown_is_what_validate_shows(tmp_path: Path, loaders: int) -> None:
    module, callback = Reads(), Evaluates()
    data = [loader(seed=seed) for seed in range(loaders)]
    run = trainer(tmp_path, callback)
    run.validate(module, data if loaders > 1 else data[0], verbose=False)
    assert [at for at, *_ in module.seen].count("step") == 4 * loaders
    assert callback.seen == module.seen
    assert callback.numbers == {k: float(v) for k, v in run.callback_metrics.items()}


def test_in_a_fit_they_are_beside_those_of_training(tmp_path: Path) -> None:
    """In every epoch; what an earlier validation showed is not taken for this one's."""
    torch.manual_seed(0)

    class Trains(Reads):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            assert isinstance(loss, Tensor)
            self.log("own_loss", loss)
            return loss

    seen: list[tuple[list[Shown], list[Shown]]] = []

    class Compares(Evaluates):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert isinstance(pl_module, Reads)
            seen.append((self.seen, list(pl_module.seen)))
            pl_module.seen.clear()

    trainer(tmp_path, Compares(), max_epochs=2, num_sanity_val_steps=0).fit(Trains(), loader(), loader())
    assert len(seen) == 2
    for ours, real in seen:
        assert len(ours) == len(real) > 0
        assert ours == real
        assert "own_loss" in ours[-1][1]
