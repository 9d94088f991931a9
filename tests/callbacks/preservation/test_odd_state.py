"""What a pass between epochs has to put back beside tensors: settings, objects, datamodules, loaders."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import SumMetric

from lightning_qat.analysis.captured_calls import capture_calls
from lightning_qat.callbacks.analyses.undisturbed_analysis import undisturbed_analysis
from lightning_qat.callbacks.passes.extra_batches import extra_batches
from lightning_qat.callbacks.passes.run_step import run_step
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.quantization.modules.call import Call
from tests.harness.classifier import Classifier, dataset, loader
from tests.harness.trainers import qat_trainer
from tests.harness.trajectories import analysers, assert_no_trace, assert_same_trajectory, quantization, trajectory

pytestmark = pytest.mark.filterwarnings("ignore:PipelineCheck:", "ignore:ConvergenceMonitor")


@dataclass
class Bank:
    count: int = 0
    items: list[int] = field(default_factory=list)


class Augmentation:
    def __init__(self) -> None:
        self.random = np.random.default_rng(0)


class Holds(Classifier):
    """What a step changes inside of its attributes changes what the next step computes."""

    def __init__(self) -> None:
        super().__init__()
        self.array = np.zeros(2)
        self.bank = Bank()
        self.lists: tuple[list[int], ...] = ([],)
        self.augmentation = Augmentation()
        self.randoms = {"a": [random.Random(0)], "b": torch.Generator().manual_seed(0)}
        self.hidden = {"sum": SumMetric()}

    def loss(self, batch: Any) -> Tensor:
        self.array += 1
        self.bank.count += 1
        self.bank.items.append(1)
        self.lists[0].append(1)
        self.hidden["sum"].update(1.0)
        numbers = [*self.own_state(), self.augmentation.random.random(), self.randoms["a"][0].random()]  # type: ignore[index]
        noise = torch.rand((), generator=self.randoms["b"])  # type: ignore[call-overload]
        return super().loss((batch[0] + 0.01 * sum(numbers) + noise, batch[1]))

    def own_state(self) -> list[float]:
        total = float(self.hidden["sum"].sum_value)
        return [float(self.array[0]), self.bank.count, len(self.bank.items), len(self.lists[0]), total]


def test_arrays_objects_and_generators_inside_of_attributes(tmp_path: Path) -> None:
    assert_no_trace(tmp_path, Holds)
    off = trajectory(tmp_path, Holds, *quantization(start_epoch=9))
    assert_same_trajectory(trajectory(tmp_path, Holds), off)


class Freezes(Classifier):
    """A hook freezes, and the optimizer takes what is not frozen when it is built."""

    def on_train_epoch_start(self) -> None:
        self.net.conv1.requires_grad_(self.current_epoch > 0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def test_hooks_may_freeze(tmp_path: Path) -> None:
    off = trajectory(tmp_path, Freezes, *quantization(start_epoch=9))
    assert_same_trajectory(trajectory(tmp_path, Freezes), off)


class Schedules(Classifier):
    """Steps and hooks change the settings of the optimizer, and step the schedule."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        optimizer.param_groups[0]["lr"] *= 0.9
        self.lr_schedulers().step()  # type: ignore[union-attr]
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        self.trainer.optimizers[0].param_groups[0]["weight_decay"] += 0.001

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_settings_of_optimizers_and_schedulers(tmp_path: Path) -> None:
    assert_no_trace(tmp_path, Schedules)


class UsesTheTrainer(Classifier):
    """Steps write to the trainer, and stop it after so many batches."""

    def loss(self, batch: Any) -> Tensor:
        seen = self.trainer.__dict__.setdefault("seen", [0])[0] + 1
        self.trainer.seen = [seen]  # type: ignore[attr-defined]
        self.trainer.callback_metrics["written"] = torch.tensor(float(seen))
        self.trainer.should_stop = seen > 9
        return super().loss(batch)


def test_steps_that_write_to_the_trainer(tmp_path: Path) -> None:
    assert_no_trace(tmp_path, UsesTheTrainer, max_epochs=4)
    off = trajectory(tmp_path, UsesTheTrainer, *quantization(start_epoch=9), max_epochs=4)
    assert_same_trajectory(trajectory(tmp_path, UsesTheTrainer, max_epochs=4), off)


def test_batches_that_come_once_are_said_to_be_missing(tmp_path: Path) -> None:
    batches = (batch for batch in loader())
    with pytest.warns(UserWarning, match=r"the train data come from an iterator \(generator\), .*missing in the run"):
        qat_trainer(tmp_path, num_sanity_val_steps=0, limit_train_batches=4).fit(Classifier(), batches, loader(16))


class OwnOrder(Sampler[list[int]]):
    def __init__(self) -> None:
        super().__init__()
        self.passes: list[int] = []

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        self.passes.append(len(self.passes))
        return iter([[(i + 8 * k + len(self.passes)) % 32 for i in range(8)] for k in range(4)])


class Collate:
    """Counts batches, and augments with a generator of its own."""

    def __init__(self) -> None:
        self.batches = 0
        self.augmentation = Augmentation()

    def __call__(self, items: Any) -> tuple[Tensor, Tensor]:
        self.batches += 1
        images = torch.stack([item[0] for item in items]) + 0.1 * self.batches + self.augmentation.random.random()
        return images.float(), torch.stack([item[1] for item in items])


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.order = OwnOrder()
        self.collate = Collate()
        self.seen: list[bool] = []
        self.random = np.random.default_rng(0)

    def train_dataloader(self) -> Any:
        self.asked += 1
        return DataLoader(dataset(), batch_sampler=self.order, collate_fn=self.collate)

    def val_dataloader(self) -> Any:
        return loader(16, seed=self.asked)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(True)
        return (batch[0] + 0.01 * len(self.seen) + float(self.random.random()), batch[1])


class Arrays(Dataset[tuple[Tensor, Tensor]]):
    """Images as torchvision's CIFAR10 keeps them."""

    def __init__(self) -> None:
        images, labels = dataset().tensors
        self.images, self.labels = images.numpy(), labels.numpy()
        self.deviation = np.float32(1.0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.images[index] / self.deviation), torch.tensor(self.labels[index])


FITS: dict[str, Callable[[], dict[str, Any]]] = {
    "datamodule": lambda: {"datamodule": Data()},
    "loader": lambda: {
        "train_dataloaders": DataLoader(dataset(), batch_sampler=OwnOrder(), collate_fn=Collate()),
        "val_dataloaders": loader(16),
    },
    "arrays": lambda: {"train_dataloaders": DataLoader(Arrays(), batch_size=8), "val_dataloaders": loader(16)},
}


@pytest.mark.parametrize("fit", FITS)
def test_datamodules_and_loaders_that_count(tmp_path: Path, fit: str) -> None:
    assert_no_trace(tmp_path, Classifier, fit=FITS[fit])
    off = trajectory(tmp_path, Classifier, *quantization(start_epoch=9), fit=FITS[fit])
    assert_same_trajectory(trajectory(tmp_path, Classifier, fit=FITS[fit]), off)


class Diverges(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e30)


@pytest.mark.filterwarnings("ignore:SensitivityAnalysis, epoch", "ignore:LayerComparison, epoch")
def test_a_model_that_diverges_is_analysed_to_the_end(tmp_path: Path) -> None:
    """Exactly this run is to be looked at: no analysis may end it."""
    assert_no_trace(tmp_path, Diverges)


@pytest.mark.filterwarnings("ignore:.* is smaller than", "ignore:SensitivityAnalysis, epoch")
def test_the_sensitivity_of_a_model_that_gives_nan_is_nan(tmp_path: Path) -> None:
    run = qat_trainer(tmp_path, SensitivityAnalysis(), num_sanity_val_steps=0)
    run.fit(Diverges())
    assert run.callback_metrics["sensitivity/max_score"].isnan()


class TakesLists(Classifier):
    """Training batches are lists of two; a validation step that gets one fails inside of the model."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[0], batch_idx) + self.loss(batch[1])

    def train_dataloader(self) -> Any:
        return [loader(shuffle=True), loader(16, 4, shuffle=True)]


def test_a_step_that_fails_in_the_model_leaves_no_call_behind(tmp_path: Path) -> None:
    """The training step takes the batch then: kept is what that step gives to the model, two calls, and no other."""
    found: list[tuple[Any, list[Call]]] = []

    class Captures(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with undisturbed_analysis(trainer, pl_module, "Captures") as regions:
                for extra in extra_batches(trainer, pl_module, 2):
                    calls = capture_calls(regions, partial(run_step, trainer, pl_module, extra))
                    found.append((extra.batch, calls["net"]))

    qat_trainer(tmp_path, *analysers(), Captures()).fit(TakesLists())
    assert len(found) == 2
    for batch, calls in found:
        assert [len(call.args) for call in calls] == [1, 1]
        assert all(torch.equal(call.args[0], images) for call, (images, _) in zip(calls, batch, strict=True))
