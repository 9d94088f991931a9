"""`target: auto` and tracing through the module's own steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_qat.quantization.region.region import find_regions
from tests.harness.classifier import Classifier, Net, loader
from tests.harness.state import assert_same, only_region, state_of
from tests.harness.trainers import qat_trainer


def targets(path: Path, module: LightningModule, **kwargs: Any) -> list[str]:
    """Where a run inserts."""
    qat_trainer(path, fast_dev_run=True, **kwargs).fit(module)
    return list(find_regions(module))


class Mixed(Classifier):
    """Training goes through `self(x)`, validation through `self.net(x)`."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def test_steps_that_call_different_levels_share_the_inner_one(tmp_path: Path) -> None:
    """With the module as target, the step that goes around it would silently stay float."""
    assert targets(tmp_path, Mixed()) == ["net"]


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean(dim=(2, 3)))


class Parts(Classifier):
    """Validation runs the net, training its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Wrapped()  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = self.net.backbone(batch[0]).mean(dim=(2, 3))
        return F.cross_entropy(self.net.head(features), batch[1])


def test_parts_that_training_calls_one_by_one_are_the_targets(tmp_path: Path) -> None:
    assert targets(tmp_path, Parts()) == ["net.backbone", "net.head"]


def test_a_target_that_one_step_goes_around_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"target 'net' is not called by the train step, which stays float"):
        targets(tmp_path, Parts(), qat={"target": "net"})


class PerceptualLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(4, 4)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.features(logits), labels)


class WithLoss(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = PerceptualLoss()
        self.accuracy = MulticlassAccuracy(num_classes=4)

    def loss(self, batch: Any) -> Tensor:
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        return self.criterion(logits, batch[1])


def test_losses_and_metrics_are_no_targets(tmp_path: Path) -> None:
    assert targets(tmp_path, WithLoss()) == ["net"]


class OnlyInTraining(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.auxiliary(self.net(batch[0])), batch[1])


def test_submodules_that_only_training_calls_are_no_targets(tmp_path: Path) -> None:
    """They are not deployed, and calibration would not reach them."""
    assert targets(tmp_path, OnlyInTraining()) == ["net"]


def test_keyword_and_several_arguments(tmp_path: Path) -> None:
    """#7926, #15862: forward with several or keyword arguments."""

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(36, 4)

        def forward(self, images: Tensor, shift: Tensor, *, gain: Tensor, flags: dict[str, bool]) -> dict[str, Tensor]:
            x = self.linear(images.flatten(1)) * gain + shift
            return {"logits": F.relu(x) if flags["relu"] else x}

    class Module(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = Several()  # type: ignore[assignment]

        def loss(self, batch: Any) -> Tensor:
            images, labels = batch
            out = self.net(images, torch.ones(4), gain=torch.full((1,), 2.0), flags={"relu": True})
            return F.cross_entropy(out["logits"], labels)

    module = Module()
    assert targets(tmp_path, module) == ["net"]
    assert {"linear.weight", "mul_0.output", "relu_0.output"} <= set(only_region(module).points)


class Manual(Classifier):
    """Manual optimization, without a validation step."""

    validation_step = LightningModule.validation_step
    val_dataloader = LightningModule.val_dataloader
    test_step = LightningModule.test_step

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        first, second = self.optimizers()  # type: ignore[misc]
        scheduler = self.lr_schedulers()
        with first.toggle_model(sync_grad=True) if hasattr(first, "toggle_model") else torch.enable_grad():
            loss = self.loss(batch)
            first.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(first, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            first.step()
        second.optimizer.zero_grad() if hasattr(second, "optimizer") else None
        score = self.critic(self.net(batch[0]).detach()).pow(2).mean()
        self.manual_backward(score)
        second.step()
        second.zero_grad()
        scheduler.step()  # type: ignore[union-attr]
        self.log("train_loss", loss)

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.net.parameters(), 0.05)
        return [first, torch.optim.SGD(self.critic.parameters(), 0.05)], [torch.optim.lr_scheduler.StepLR(first, 10)]


def test_manual_optimization(tmp_path: Path) -> None:
    """Tracing and calibration run the whole training step without optimizing; training then does optimize."""
    module = Manual()
    before = state_of(module)
    at_start: dict[str, Tensor] = {}
    run = qat_trainer(tmp_path)

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            at_start.update({k: v for k, v in state_of(pl_module).items() if "_quantization" not in k})

    run.callbacks.append(Start())
    run.fit(module)
    assert_same(at_start, before)
    assert list(find_regions(module)) == ["net", "critic"]
    assert not torch.equal(module.critic.weight, before["critic.weight"])
    assert not torch.equal(module.net.head.weight, before["net.head.weight"])


class NeedsEpochStart(Classifier):
    """The steps use what hooks prepare."""

    def on_validation_epoch_start(self) -> None:
        self.prompts = torch.ones(4)
        self.outputs: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0]) + self.prompts
        self.outputs.append(F.cross_entropy(logits, batch[1]))

    def on_validation_epoch_end(self) -> None:
        assert len(self.outputs) <= 2  # batches of the loader: none of another pass
        self.log("val_loss", torch.stack(self.outputs).mean())


def test_steps_that_use_what_epoch_hooks_prepare(tmp_path: Path) -> None:
    module = NeedsEpochStart()
    qat_trainer(tmp_path).fit(module)
    assert only_region(module).is_calibrated


class NeedsTrainer(Classifier):
    """A training augmentation that depends on the state of the run."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        if self.trainer.training:
            strength = self.trainer.current_epoch / self.trainer.max_epochs  # type: ignore[operator]
            images = images + strength * torch.randn_like(images) + self.trainer.global_step * 0
        return images, labels


def test_augmentation_that_asks_the_trainer(tmp_path: Path) -> None:
    assert targets(tmp_path, NeedsTrainer()) == ["net"]


class UsesExample(LightningModule):
    """Its step cannot run before training starts; its example can."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.example_input_array = torch.randn(2, 1, 6, 6)
        self.ready = False

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def on_fit_start(self) -> None:
        self.ready = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.ready:
            raise RuntimeError("on_fit_start did not run")
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


def test_example_input_array_is_traced_where_no_step_can_run(tmp_path: Path) -> None:
    """lightning-facts.md: on_fit_start has not run yet. Calibration runs after it only if it starts later."""
    module = UsesExample()
    qat_trainer(tmp_path, qat={"start_epoch": 1}, max_epochs=2).fit(module, DataLoader(loader().dataset, batch_size=8))
    assert list(find_regions(module)) == [""]
    assert only_region(module).is_calibrated


def test_ops_of_only_one_mode_are_planned(tmp_path: Path) -> None:
    """design.md section 3: both modes are traced."""

    class TrainOnly(Net):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return torch.tanh(logits) if self.training else logits

    class Module(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = TrainOnly()

    module = Module()
    qat_trainer(tmp_path).fit(module)
    status = {name: op.reason for name, op in only_region(module).plan.status.items() if "tanh" in name}
    assert list(status.values()) == ["runs in train mode only: not part of the deployed model"]
    assert not only_region(module).unplanned


def test_tracing_leaves_no_trace(tmp_path: Path) -> None:
    """Momentum updates in the training step, lists, random state."""

    class Momentum(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = Net()
            self.history: dict[str, list[float]] = {"loss": []}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                for mine, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                    mine.data = mine.data * 0.5 + other.data * 0.5
            self.history["loss"].append(float(loss))
            return loss

    module = Momentum()
    before = state_of(module)
    random = torch.random.get_rng_state()
    run = qat_trainer(tmp_path)
    run.callbacks[0].setup(run, module, "fit")
    run.strategy.connect(module)
    run._data_connector.attach_data(module)
    run.state.fn = "fit"  # type: ignore[assignment]
    module.configure_model()
    run.callbacks[0].teardown(run, module, "fit")
    assert torch.equal(torch.random.get_rng_state(), random)
    assert_same({k: v for k, v in state_of(module).items() if "_quantization" not in k}, before)
    assert module.history == {"loss": []}
    assert find_regions(module)
