"""Extra passes in the middle of training leave no trace: the run is bit for bit the one without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.passes.evaluation import evaluate
from lightning_qat.callbacks.passes.extra_batches import extra_batches
from lightning_qat.callbacks.passes.run_step import run_step
from lightning_qat.callbacks.preservation.undisturbed import undisturbed
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from tests.harness.classifier import Classifier, dataset, loader
from tests.harness.state import assert_same, state_of
from tests.harness.trainers import trainer


class Sensitive(Classifier):
    """Everything a step can leave behind: dropout, batch norm, metrics, lists, counters, numpy noise."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=4)
        self.mean = MeanMetric()
        self.dropout = nn.Dropout(0.3)
        self.outputs: list[Tensor] = []
        self.seen: dict[str, list[int]] = {"train": [], "val": []}
        self.steps = 0
        self.running = torch.zeros(())

    def loss(self, batch: Any) -> Tensor:
        self.steps += 1
        logits = self.dropout(self.net(batch[0]))
        self.running += logits.detach().mean()  # in place
        return F.cross_entropy(logits, batch[1]) + float(np.random.rand())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["train"].append(batch_idx)
        loss = self.loss(batch)
        self.mean(loss)
        self.log("train_mean", self.mean, on_epoch=True)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["val"].append(batch_idx)
        loss = self.loss(batch)
        self.outputs.append(loss)
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("val_loss", loss)
        self.log("val_acc", self.accuracy)

    def on_validation_epoch_end(self) -> None:
        self.log("val_outputs", torch.stack(self.outputs).sum())
        self.outputs.clear()


class Record(Callback):
    """The trajectory of a run, and an extra pass in its middle."""

    def __init__(self, extra: Callable[[Trainer, LightningModule], Any] | None, hook: str) -> None:
        self.extra, self.hook = extra, hook
        self.trajectory: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run("on_train_start", trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step % 3 == 2:
            self._run("on_train_batch_end", trainer, pl_module)
        optimizer = trainer.optimizers[0]
        self.trajectory.append(
            {
                **state_of(pl_module),
                **{f"adam {i} {k}": v.clone() for i, s in enumerate(optimizer.state.values()) for k, v in s.items()},
                **{f"metric {k}": v.clone() for k, v in trainer.callback_metrics.items()},
                "random": torch.random.get_rng_state(),
                "numpy": torch.tensor(np.random.get_state()[1][:5].astype(np.int64)),
                "running": getattr(pl_module, "running", torch.zeros(())).clone(),
            }
        )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._run("on_before_optimizer_step", trainer, pl_module)  # gradients are there

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run("on_train_epoch_end", trainer, pl_module)

    def _run(self, hook: str, trainer: Trainer, module: LightningModule) -> None:
        if self.extra is not None and hook == self.hook:
            self.extra(trainer, module)


def train_steps(trainer: Trainer, module: LightningModule) -> None:
    """Forward and backward in train mode."""
    with undisturbed(trainer, module, trains=True):
        module.train()
        for extra in extra_batches(trainer, module, 2, "train"):
            run_step(trainer, module, extra, "train").backward()


def raises(trainer: Trainer, module: LightningModule) -> None:
    """A pass that fails in its middle."""

    def fails() -> None:
        with undisturbed(trainer, module):
            for extra in extra_batches(trainer, module, 2):
                run_step(trainer, module, extra)
                raise KeyError

    with pytest.raises(KeyError):
        fails()


PASSES = {"evaluate": evaluate, "train steps": train_steps, "raises": raises}
HOOKS = ("on_train_start", "on_train_batch_end", "on_before_optimizer_step", "on_train_epoch_end")


def trajectory(
    path: Path, extra: Any, hook: str = "", module: type[LightningModule] | None = None, data: Any = None, **kwargs: Any
) -> list[dict[str, Tensor]]:
    seed_everything(3, verbose=False)
    record = Record(extra, hook)
    callbacks = [QuantizationAwareTraining(activation_scales="ema"), Calibration(batches=2)]
    run = trainer(path, *callbacks, record, **{"max_epochs": 2, **kwargs})
    run.fit((module or Sensitive)(), *([data()] if data else []))
    return record.trajectory


@pytest.fixture(scope="module")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return trajectory(tmp_path_factory.mktemp("plain"), None)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("extra", PASSES)
def test_training_is_the_same_with_and_without_a_pass(
    tmp_path: Path, undisturbed_run: list[dict[str, Tensor]], extra: str, hook: str
) -> None:
    """Weights, optimizer, batch norm, scales, random states, callback_metrics (lightning-facts.md)."""
    disturbed = trajectory(tmp_path, PASSES[extra], hook)
    assert len(disturbed) == len(undisturbed_run) == 8
    for one, other in zip(disturbed, undisturbed_run, strict=True):
        assert_same(one, other)


class OwnOrder(Sampler[int]):
    """Another order every time, by counters and generators of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.passes = 0
        self.numpy = np.random.default_rng(0)
        self.torch = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        shift = self.passes + int(self.numpy.integers(10)) + int(torch.randint(10, (1,), generator=self.torch))
        return iter([(i + shift) % self.size for i in range(self.size)])


class Noisy(Dataset[Any]):
    """Augments with a generator of its own."""

    def __init__(self) -> None:
        self.noise = np.random.RandomState(0)

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        image, label = dataset()[index]
        return image + float(self.noise.rand()), label


LOADERS: dict[str, Callable[[], Any]] = {
    "global random state": lambda: loader(shuffle=True),
    "own generator": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(1)),
    "own sampler": lambda: DataLoader(dataset(), batch_size=8, sampler=OwnOrder(32)),
    "own dataset noise": lambda: DataLoader(Noisy(), batch_size=8),
    "several": lambda: {"a": loader(shuffle=True), "b": loader(16, shuffle=True)},
}


class TakesAll(Sensitive):
    def loss(self, batch: Any) -> Tensor:
        parts = batch.values() if isinstance(batch, dict) else [batch]
        return torch.stack([super(TakesAll, self).loss(part) for part in parts]).mean()


@pytest.mark.parametrize("data", LOADERS)
def test_given_loaders_are_where_they_were(tmp_path: Path, data: str) -> None:
    """Order, generators and counters of loader instances that the user passed to fit."""
    expected = trajectory(tmp_path, None, module=TakesAll, data=LOADERS[data])
    disturbed = trajectory(tmp_path, train_steps, "on_train_batch_end", module=TakesAll, data=LOADERS[data])
    for one, other in zip(disturbed, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_end"])
def test_persistent_workers_keep_all_batches_of_the_epoch(tmp_path: Path, hook: str) -> None:
    """lightning-facts.md: iterating the loader of the run cut the epoch from 8 to 4 batches, silently."""

    def data() -> Any:
        return loader(32, 4, num_workers=1, persistent_workers=True)

    steps = trajectory(tmp_path, train_steps, hook, module=Classifier, data=data, max_epochs=1)
    assert len(steps) == 8


def test_callback_metrics_are_not_overwritten(tmp_path: Path) -> None:
    """lightning-facts.md: `validation_step` with logging on overwrites `callback_metrics["val_loss"]`."""
    seen: list[float] = []

    class Check(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before = float(trainer.callback_metrics["val_loss"])
            torch.nn.init.normal_(pl_module.net.head.weight, std=10)
            evaluate(trainer, pl_module)
            seen.extend([before, float(trainer.callback_metrics["val_loss"])])

    trainer(tmp_path, Check()).fit(Classifier())
    assert seen[0] == seen[1]


def test_train_mode_is_put_back_submodule_by_submodule(tmp_path: Path) -> None:
    class Check(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.net.bn1.eval()
            before = [module.training for module in pl_module.modules()]
            evaluate(trainer, pl_module)
            assert [module.training for module in pl_module.modules()] == before

    trainer(tmp_path, Check(), limit_train_batches=1).fit(Classifier())


def test_a_pass_under_inference_mode_leaves_ordinary_tensors(tmp_path: Path) -> None:
    """Calibrating or testing under inference_mode and training afterwards must work."""
    module = Sensitive()
    callbacks = [QuantizationAwareTraining(activation_scales="ema"), Calibration(batches=2)]
    trainer(tmp_path, *callbacks).validate(module, verbose=False)
    assert not any(t.is_inference() for t in [*module.buffers(), *module.parameters(), module.running])
    trainer(tmp_path, *callbacks).fit(module)


def test_every_step_signature(tmp_path: Path) -> None:
    class Short(Classifier):
        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            return self.loss(batch)

        def validation_step(self, *args: Any) -> None:
            batch, _ = args
            self.log("val_loss", self.loss(batch))

    found = []

    class Check(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            train_steps(trainer, pl_module)
            found.append(evaluate(trainer, pl_module))

    trainer(tmp_path, Check()).fit(Short())
    assert found[0].batches == 2


def test_accumulated_gradients_survive(tmp_path: Path, undisturbed_run: Any) -> None:
    """accumulate_grad_batches: gradients of earlier batches are waiting while the pass runs."""
    expected = trajectory(tmp_path, None, accumulate_grad_batches=2)
    disturbed = trajectory(tmp_path, train_steps, "on_train_batch_end", accumulate_grad_batches=2)
    for one, other in zip(disturbed, expected, strict=True):
        assert_same(one, other)


def test_weights_that_a_hook_swaps_in_for_evaluation_are_put_back(tmp_path: Path) -> None:
    """An average is swapped in when evaluation starts; the hook that swaps it out does not run in extra passes."""

    class Averaged(Classifier):
        def on_validation_epoch_start(self) -> None:
            with torch.no_grad():
                for p in self.parameters():
                    p.zero_()

    seen: list[bool] = []

    class Passing(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before = [p.detach().clone() for p in pl_module.parameters()]
            with undisturbed(trainer, pl_module):
                for extra in extra_batches(trainer, pl_module, 1, "validate"):
                    run_step(trainer, pl_module, extra, "validate")
            seen.append(all(torch.equal(a, b) for a, b in zip(before, pl_module.parameters(), strict=True)))

    trainer(tmp_path, Passing(), max_steps=1, num_sanity_val_steps=0).fit(Averaged())
    assert seen == [True]
