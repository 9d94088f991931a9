"""Any LightningModule: callbacks that analyse leave no trace in the run, and none of them fails."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, random_split

from lightning_qat.callbacks.accuracy_table import AccuracyTable
from lightning_qat.callbacks.ladder.finetune_copy import finetune_copy
from lightning_qat.callbacks.ladder.starting_point import StartingPoint
from lightning_qat.callbacks.pipeline_check import PipelineCheck
from lightning_qat.callbacks.preservation.module_copy import copied_module
from lightning_qat.callbacks.trainer.muted_loggers import muted_loggers
from lightning_qat.quantization.region.insertion import insert
from tests.harness.classifier import Classifier, dataset, loader
from tests.harness.state import only_region
from tests.harness.trainers import qat_trainer, trainer
from tests.harness.trajectories import assert_no_trace, assert_same_trajectory, quantization, trajectory

pytestmark = pytest.mark.filterwarnings("ignore:PipelineCheck:", "ignore:ConvergenceMonitor")


class Splits(Classifier):
    """Loader hooks that draw: a split, a shuffled list of files, a random crop."""

    def train_dataloader(self) -> Any:
        part, _ = random_split(dataset(), [24, 8])
        return DataLoader(part, batch_size=8, shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(16, seed=random.randrange(1) + int(np.random.rand()))


def test_loader_hooks_may_draw_random_numbers(tmp_path: Path) -> None:
    """Asking for a fresh loader, or whether there is one, is no part of the run."""
    assert_no_trace(tmp_path, Splits)
    off = trajectory(tmp_path, Splits, *quantization(start_epoch=9))
    assert_same_trajectory(trajectory(tmp_path, Splits), off)


class CountsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.linear(x) + 0.001 * self.calls
        return result


class Counting(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.head = CountsCalls()  # type: ignore[assignment]

    def own_state(self) -> list[int]:
        return [self.net.head.calls]  # type: ignore[list-item]


def test_tracing_does_not_count_as_a_call_of_the_model(tmp_path: Path) -> None:
    off = trajectory(tmp_path, Counting, *quantization(start_epoch=9))
    assert_same_trajectory(trajectory(tmp_path, Counting), off)


class WarmsUp(Classifier):
    """Sets the learning rate in a hook, through the trainer's optimizers, and logs it in the step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["lr"] * 0.5

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return super().training_step(batch, batch_idx)


def test_a_warm_up_by_hand_acts_on_the_copy_that_is_trained(tmp_path: Path) -> None:
    rates: list[Any] = []

    class Copies(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            settings: dict[str, Any] = {"eval_batches": 1, "state": "off", "zero_lr": False}
            rates.append(finetune_copy(trainer, pl_module, batches=3, **settings).learning_rates)
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    qat_trainer(tmp_path, Copies(), max_steps=1).fit(WarmsUp(lr=0.08))
    assert rates == [(0.01, 0.04), 0.08]


class LooksAtOptimizers(WarmsUp):
    """Both steps need optimizers, which do not exist yet while the module is traced."""

    def on_train_epoch_start(self) -> None:
        self.rate = self.trainer.optimizers[0].param_groups[0]["lr"]

    def on_validation_epoch_start(self) -> None:
        self.rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]


def test_steps_that_look_at_the_optimizers_can_be_traced(tmp_path: Path) -> None:
    module = LooksAtOptimizers()
    run = qat_trainer(tmp_path, limit_train_batches=1, limit_val_batches=1)
    run.fit(module)
    assert only_region(module).is_calibrated
    assert run.optimizers[0].param_groups[0]["params"][0] is module.net.conv1.weight


class PlansItsLength(Splits):
    """Manual optimization; the schedule asks how long the training is, for which Lightning sets up the loaders."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)]


def test_a_schedule_that_asks_for_the_length_of_the_training(tmp_path: Path) -> None:
    off = trajectory(tmp_path, PlansItsLength, *quantization(start_epoch=9))
    assert_same_trajectory(trajectory(tmp_path, PlansItsLength), off)


class KeepsResults(Classifier):
    """Keeps losses with their gradient history, and holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.losses: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with self.lock:
            self.last = super().training_step(batch, batch_idx)
            self.losses.append({"loss": self.last})
        return self.last


def test_pipeline_check_of_a_module_that_cannot_be_copied(tmp_path: Path) -> None:
    assert_no_trace(tmp_path, KeepsResults, check_val_every_n_epoch=9, num_sanity_val_steps=0)
    check = PipelineCheck(batches=1, eval_batches=1, at_epoch=1, rungs=[0, 1, 2])
    qat_trainer(tmp_path, check, max_epochs=2, check_val_every_n_epoch=9).fit(KeepsResults())
    assert check.result is not None
    assert "cannot be copied" not in check.result.note


def test_a_copy_has_the_values_of_kept_results() -> None:
    layer = nn.Linear(3, 2)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    layer.results = [{"y": layer(torch.ones(1, 3))}]
    layer.lock = threading.Lock()
    layer.name = ["a"]
    copy = copied_module(layer)
    assert torch.equal(copy.results[0]["y"], layer.results[0]["y"])  # type: ignore[index]
    assert copy.lock is layer.lock
    assert copy.name == ["a"]
    assert copy.name is not layer.name
    with torch.no_grad():
        copy.weight_orig.zero_()
    assert layer.weight_orig.any()


class LogsItself(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logger: Any = self.logger
        assert isinstance(logger, CSVLogger)
        assert Path(logger.log_dir).name == "version_0"
        logger.log_metrics({"direct": 1.0})
        logger.experiment.log_metrics({"directer": 1.0})
        super().validation_step(batch, batch_idx)


def test_what_a_step_sends_to_its_logger_is_sent_by_the_run_alone(tmp_path: Path) -> None:
    sent: list[str] = []

    class Recording(CSVLogger):
        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
            sent.extend(metrics)

    options: dict[str, Any] = {"num_sanity_val_steps": 0, "limit_val_batches": 1}
    for number, extra in enumerate([[], [PipelineCheck(batches=1, eval_batches=1)]]):
        sent.clear()
        run = qat_trainer(tmp_path / str(number), *extra, logger=Recording(tmp_path / str(number)), **options)
        run.fit(LogsItself())
        assert sent.count("direct") == 1
        assert not hasattr(run.logger, "_logger")


def test_muted_loggers_are_put_back(tmp_path: Path) -> None:
    run = trainer(tmp_path, logger=CSVLogger(tmp_path))
    before = run.loggers
    with muted_loggers(run), muted_loggers(run):
        run.logger.experiment.add_image["x"].y(1)  # type: ignore[union-attr]
        assert isinstance(run.logger, CSVLogger)
        assert run.log_dir == before[0].log_dir
    assert run.loggers is before
    with pytest.raises(AttributeError), muted_loggers(run):
        run.logger.there_is_no_such_method()  # type: ignore[union-attr]
    assert run.loggers is before


class AddsGroup(Callback):
    """As BaseFinetuning does: the optimizer gets a group on the way."""

    def __init__(self) -> None:
        self.start: StartingPoint | None = None
        self.rates: list[list[float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = StartingPoint(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.25})
        assert self.start is not None
        with self.start.restored(trainer, pl_module):
            self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def test_the_start_can_be_restored_after_a_group_was_added(tmp_path: Path) -> None:
    adds = AddsGroup()
    trainer(tmp_path, adds).fit(Classifier())
    at_the_start, afterwards = adds.rates
    assert at_the_start == [0.05, 0.25]
    assert afterwards == [0.5, 0.25]


def test_a_training_that_ends_before_start_epoch_has_an_accuracy_table(tmp_path: Path) -> None:
    """There are no scales then: the float column is all there is."""
    qat_trainer(tmp_path, AccuracyTable(), qat={"start_epoch": 9}).fit(Classifier())
    (run,) = json.loads((tmp_path / "lightning_qat" / "result_table.json").read_text())["runs"].values()
    assert "float" in json.dumps(run)
    assert "QAT" not in json.dumps(run)


def test_copy_is_never_the_module_itself() -> None:
    """A module that refuses to be copied is known to its region, which could pass it off as an attribute to share."""

    class Refusing(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise TypeError("not this one")

    module = Refusing(2, 2)
    insert(module, (torch.ones(1, 2),))
    with pytest.raises(TypeError, match="not this one"):
        copied_module(module)
