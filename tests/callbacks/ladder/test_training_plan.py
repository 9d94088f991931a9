"""The plan of a training is that of the training itself: its schedules to the end, its steps, its groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.analysis.fingerprint.training_plan import TrainingPlan
from lightning_qat.callbacks.ladder.training_plan import plan_of, with_updates
from lightning_qat.callbacks.pipeline_check import PipelineCheck
from lightning_qat.callbacks.pipeline_fingerprint import PipelineFingerprint, take_fingerprint
from tests.harness.trainers import qat_trainer, quiet


class Linear(LightningModule):
    """Linear regression with a group for each parameter."""

    def __init__(self, schedule: Callable[[Any], dict[str, Any] | None] = lambda optimizer: None, **sgd: Any) -> None:
        super().__init__()
        self.linear, self.schedule, self.sgd = nn.Linear(4, 1), schedule, {"lr": 0.1} | sgd

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.linear(batch[0]).squeeze(1) - batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.linear.weight]}, {"params": [self.linear.bias], "lr": 0.05}]
        optimizer = torch.optim.SGD(groups, **self.sgd)
        config = self.schedule(optimizer)
        return optimizer if config is None else {"optimizer": optimizer, "lr_scheduler": config}

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x.sum(1)), 8)

    val_dataloader = train_dataloader


class Planning(Callback):
    """The plan ahead of training, and the learning rates that training then has."""

    def __init__(self) -> None:
        self.plan: TrainingPlan | None = None
        self.rates: list[list[float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.plan = with_updates(trainer, pl_module, plan_of(trainer, pl_module), seed=0)
        assert all(torch.equal(before[name], p) for name, p in pl_module.named_parameters())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def fitted(model: LightningModule, path: Path, **kwargs: Any) -> tuple[TrainingPlan, list[list[float]]]:
    seed_everything(0, verbose=False)
    callback = Planning()
    Trainer(callbacks=[callback], default_root_dir=path, **(quiet() | {"max_epochs": 3} | kwargs)).fit(model)
    assert callback.plan is not None
    return callback.plan, callback.rates


def per(interval: str, make: Callable[[Any], Any], frequency: int = 1) -> Callable[[Any], dict[str, Any]]:
    return lambda optimizer: {"scheduler": make(optimizer), "interval": interval, "frequency": frequency}


SCHEDULES: dict[str, Callable[[Any], dict[str, Any] | None]] = {
    "none": lambda optimizer: None,
    "per batch": per("step", lambda o: lr_scheduler.StepLR(o, 1, 0.1)),
    "per epoch": per("epoch", lambda o: lr_scheduler.StepLR(o, 1, 0.1)),
    "every third step": per("step", lambda o: lr_scheduler.ExponentialLR(o, 0.5), 3),
    "one cycle": per("step", lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.05], total_steps=60)),
    "from ten times": per("step", lambda o: lr_scheduler.LambdaLR(o, lambda k: max(1.0, 10.0 - k))),
    "warm-up and cosine": per(
        "step",
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 25)], [5]
        ),
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_simulated_schedule_is_the_one_that_training_has(name: str, accumulate: int, tmp_path: Path) -> None:
    """Against the rates of the run itself; accumulation of four of ten batches makes three steps per epoch."""
    plan, rates = fitted(Linear(SCHEDULES[name]), tmp_path, accumulate_grad_batches=accumulate)
    assert plan.steps == len(rates)
    for number, own in enumerate(zip(*rates, strict=True)):
        assert plan.rates[number] == pytest.approx(max(own))
        assert plan.first_rates[number] == pytest.approx(own[0])
        assert plan.rate_shares[number] == pytest.approx(sum(own) / len(own) / max(own))
    assert plan.base_rates == pytest.approx((0.004, 0.002) if name == "one cycle" else (0.1, 0.05))
    assert plan.samples == pytest.approx({1: 8.0, 4: 80 / 3}[accumulate])


def test_update_of_a_step_is_that_of_the_optimizer(tmp_path: Path) -> None:
    """Against lr * gradient of the first batch; weight decay does not count."""
    model = Linear(lr=1e-6, weight_decay=0.5)
    batch = next(iter(model.train_dataloader()))
    model.training_step(batch, 0).backward()
    expected = []
    for p, rate in ((model.linear.weight, 1e-6), (model.linear.bias, 0.05)):
        assert p.grad is not None
        expected.append(rate * float(p.grad.norm()) / float(p.detach().norm()))
        p.grad = None
    seed_everything(0, verbose=False)
    callback = Planning()
    settings = quiet() | {"max_epochs": 1, "limit_train_batches": 1}
    Trainer(callbacks=[callback], default_root_dir=tmp_path, **settings).fit(model)
    assert callback.plan is not None
    assert callback.plan.updates[0] == pytest.approx(expected[0], rel=0.03)
    assert callback.plan.kept is None or callback.plan.kept == 1.0
    assert callback.plan.horizon == 1.0


def test_step_that_takes_many_batches_is_measured(tmp_path: Path) -> None:
    """No step within the usual number of batches must not look like steps that move nothing."""
    plan, _ = fitted(Linear(), tmp_path, accumulate_grad_batches=100, max_epochs=1)
    assert (plan.steps, plan.samples) == (1, 80.0)
    assert min(plan.updates) > 0


@pytest.mark.parametrize(
    ("clip", "kept"),
    [(None, 1.0), (1e-4, None)],
)
def test_share_that_clipping_leaves(clip: float | None, kept: float | None, tmp_path: Path) -> None:
    plan, _ = fitted(Linear(), tmp_path, gradient_clip_val=clip)
    free, _ = fitted(Linear(), tmp_path)
    assert plan.kept is not None
    if kept is not None:
        assert plan.kept == pytest.approx(kept)
    else:
        assert plan.kept < 1e-2
        assert plan.updates[0] < 1e-2 * free.updates[0]


def test_float_run_keeps_the_plan_it_began_with(tmp_path: Path) -> None:
    """At its end the schedule has brought the learning rate down; the steps are measured at the highest."""
    seed_everything(0, verbose=False)
    callback = PipelineFingerprint(batches=2)
    model = Linear(per("epoch", lambda o: lr_scheduler.StepLR(o, 1, 0.0)))
    trainer = Trainer(callbacks=[callback], default_root_dir=tmp_path, **(quiet() | {"max_epochs": 3}))
    trainer.fit(model)
    assert callback.fingerprint is not None
    plan = callback.fingerprint.plan
    assert plan is not None
    assert (plan.rates, plan.rate_shares) == ((0.1, 0.05), pytest.approx((1 / 3, 1 / 3)))
    assert all(update > 0 for update in plan.updates)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0
    again = PipelineFingerprint()
    again.load_state_dict(callback.state_dict())
    assert again._plan is not None
    assert again._plan.rates == plan.rates


def test_schedules_that_cannot_be_simulated_end_no_run(tmp_path: Path) -> None:
    """A scheduler that cannot be copied; a module that cannot be trained in a copy."""

    class Stubborn(lr_scheduler.LambdaLR):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("not copied")

    seed_everything(0, verbose=False)
    callback = PipelineFingerprint(batches=2)
    model = Linear(per("step", lambda o: Stubborn(o, lambda k: 1.0)))
    Trainer(callbacks=[callback], default_root_dir=tmp_path, **(quiet() | {"max_epochs": 1})).fit(model)
    assert callback.fingerprint is not None
    assert callback.fingerprint.plan is None


COSINE = per("step", lambda o: lr_scheduler.LambdaLR(o, lambda k: (1 + math.cos(math.pi * min(1, k / 100))) / 2))
"""Over ten epochs of ten steps; from the ninth on, little is left of the rate."""
SHARE = "mean of highest lr, group 0"


def shares(check: PipelineCheck) -> list[float | None]:
    """What the check knows of the schedule."""
    assert check.result is not None
    return [row.value for row in check.result.rows if row.metric == SHARE]


@pytest.mark.filterwarnings("ignore:PipelineCheck. cannot tell:UserWarning")
@pytest.mark.parametrize("resumed", [False, True])
def test_schedule_is_not_judged_from_the_middle(resumed: bool, tmp_path: Path) -> None:
    """QAT at the end of a cosine, by start_epoch or in a resumed run: what is left of it is no short schedule."""
    seed_everything(0, verbose=False)
    check = PipelineCheck(batches=4, at_epoch=9, rungs=[5])
    qat = {"target": "linear", "start_epoch": 0 if resumed else 9}
    if resumed:
        early = qat_trainer(tmp_path, qat=qat, max_epochs=9)
        early.fit(Linear(COSINE))
        early.save_checkpoint(tmp_path / "nine.ckpt")
    late = qat_trainer(tmp_path, check, qat=qat, max_epochs=10)
    late.fit(Linear(COSINE), ckpt_path=tmp_path / "nine.ckpt" if resumed else None)
    assert late.global_step == 100
    assert shares(check) == []
    assert check.result is not None
    assert "the schedule leaves" not in check.result.note


@pytest.mark.filterwarnings("ignore:PipelineCheck. cannot tell:UserWarning")
@pytest.mark.parametrize("at_epoch", [0, 1])
def test_later_check_knows_the_schedule_that_training_began_with(at_epoch: int, tmp_path: Path) -> None:
    """It restores the start, and with it the schedule: half of a cosine's rate is its mean."""
    seed_everything(0, verbose=False)
    check = PipelineCheck(batches=4, at_epoch=at_epoch, rungs=[5])
    settings: dict[str, Any] = {"max_epochs": 10, "max_steps": 100, "qat": {"target": "linear"}}
    qat_trainer(tmp_path, check, **settings).fit(Linear(COSINE))
    assert shares(check) == [pytest.approx(0.5, abs=0.01)]


def test_fingerprint_of_a_training_in_progress_has_no_plan(tmp_path: Path) -> None:
    """Also that of a float run whose callback was added when it was resumed."""
    plans: list[TrainingPlan | None] = []

    class Later(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            plans.append(take_fingerprint(trainer, pl_module, batches=1).plan)

    seed_everything(0, verbose=False)
    trainer = Trainer(callbacks=[Later()], default_root_dir=tmp_path, **(quiet() | {"max_epochs": 2}))
    trainer.fit(Linear(COSINE))
    assert [plan is None for plan in plans] == [False, True]
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    added = PipelineFingerprint(batches=1)
    Trainer(callbacks=[added], default_root_dir=tmp_path, **(quiet() | {"max_epochs": 3})).fit(
        Linear(COSINE), ckpt_path=tmp_path / "two.ckpt"
    )
    assert added.fingerprint is not None
    assert added.fingerprint.plan is None
    assert added.fingerprint.sizes == {"linear.weight": 4, "linear.bias": 1}
