"""Learned scales (LSQ) in a Trainer: optimizers, resuming, freezing, several ranks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.insertion.quantized_checkpoint import load_quantized
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.zero_lr_finetune import ZeroLRFinetune
from lightning_qat.quantization.region.parameter_groups import parameter_groups
from tests.harness.classifier import Classifier, Net, loader
from tests.harness.state import assert_same, only_region, scales, state_of
from tests.harness.trainers import qat_trainer, trainer

LEARNED: dict[str, Any] = {"activation_scales": "learned", "weight_scales": "learned"}


class Learner(Classifier):
    """Its optimizer has the learned scales in their own group."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(parameter_groups(self, self.lr, 1e-3), lr=self.lr, weight_decay=0.1)

    def train_dataloader(self) -> Any:
        return loader()  # in order, so that a resumed run sees the same


class Recorder(Callback):
    """The scales at the start of every epoch and at the end."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(scales(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(scales(pl_module))


def moved(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name.rpartition(".")[2].rstrip("0123456789") for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (LEARNED, {"input", "weight", "output"}),
        ({"activation_scales": "learned"}, {"input", "weight", "output"}),
        ({"activation_scales": "learned", "weight_scales": "fixed"}, {"input", "output"}),
        ({"weight_scales": "learned"}, {"weight"}),
        ({"weight_scales": "fixed"}, set()),
    ],
)
def test_the_options_say_which_scales_move(tmp_path: Path, options: dict[str, Any], expected: set[str]) -> None:
    """LSQ: from the calibrated values on."""
    recorder, module = Recorder(), Learner()
    qat_trainer(tmp_path, recorder, qat=options).fit(module)
    assert moved(recorder.epochs[0], recorder.epochs[1]) == expected
    learned = set(only_region(module).learned_scales)
    is_learned = {"weight": options.get("weight_scales") == "learned"}
    for point in only_region(module).plan.points:
        role_is_learned = is_learned.get(point.role, options.get("activation_scales") == "learned")
        assert (point.name in learned) == role_is_learned
    assert all(bool((scale > 0).all()) for scale in recorder.epochs[1].values())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
def test_resumed_tested_and_loaded_it_is_the_same_model(tmp_path: Path) -> None:
    """Scales, their optimizer state and their kind come back; the run goes on bit by bit."""
    whole = Learner()
    torch.manual_seed(0)
    half = Learner()
    whole.load_state_dict(half.state_dict())
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    qat_trainer(tmp_path, qat=LEARNED, max_epochs=2).fit(whole)
    qat_trainer(tmp_path, saving, qat=LEARNED, max_epochs=1).fit(half)
    resumed = Learner()
    qat_trainer(tmp_path, qat=LEARNED, max_epochs=2).fit(resumed, ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert_same(state_of(resumed), state_of(whole))
    tested = Learner()
    trainer(tmp_path, QuantizationAwareTraining()).test(tested, ckpt_path=str(tmp_path / "epoch=0.ckpt"), verbose=False)
    assert_same(state_of(tested), state_of(half))
    loaded = load_quantized(Learner, tmp_path / "epoch=0.ckpt")
    assert set(only_region(loaded).learned_scales) == set(only_region(half).learned_scales)
    images = torch.randn(4, 1, 6, 6)
    assert torch.equal(loaded(images), half.eval()(images))


def test_a_resumed_run_learns_what_it_learned_before_and_a_new_fit_what_it_is_told(tmp_path: Path) -> None:
    """Resuming with another option would not fit the optimizer state: a warning says how to change it."""
    module = Learner()
    run = qat_trainer(tmp_path, qat={"weight_scales": "learned"})
    run.fit(module)
    run.save_checkpoint(tmp_path / "learned.ckpt")
    resumed = Learner()
    with pytest.warns(UserWarning, match=r"learned scales for \['weight'\], this run asks for nothing.*load_quantized"):
        qat_trainer(tmp_path, max_epochs=2).fit(resumed, ckpt_path=str(tmp_path / "learned.ckpt"))
    assert set(only_region(resumed).learned_scales) == {p for p in only_region(module).points if p.endswith("weight")}
    before = scales(module)
    qat_trainer(tmp_path, qat={"weight_scales": "fixed", "activation_scales": "learned"}).fit(module)
    assert moved(before, scales(module)) == {"input", "output"}


def test_an_optimizer_without_the_scales_is_an_error_that_says_what_to_write(tmp_path: Path) -> None:
    class Early(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.early = list(self.parameters())  # as LightningCLI's optimizer collects them

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.early, lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"no optimizer has .*conv1.*lightning_qat.parameter_groups"):
        qat_trainer(tmp_path, qat=LEARNED).fit(Early())


class Adversarial(Classifier):
    """Two parts, an optimizer for each, built from what the parts had before they were quantized."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.critic = nn.Linear(4, 4)
        self.automatic_optimization = False
        self.shared = shared
        self.early = [list(self.net.parameters()), list(self.critic.parameters())]

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.critic(self.net(batch[0])), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        first, second = self.early
        middle = len(first) // 2
        if self.shared:
            first, second = first[:middle], [*first[middle:], *second]
        return [torch.optim.AdamW(first, 0.01), torch.optim.SGD(second, 0.01)]


@pytest.mark.parametrize(
    ("target", "shared", "message"),
    [
        (
            "net",
            False,
            r"The parameters of 'net' are in optimizer 0 \(AdamW\): there, write lightning_qat.parameter_groups\("
            r"self.net, lr=...\) in place of self.net.parameters\(\)",
        ),
        (
            "auto",
            False,
            r"'net' are in optimizer 0 .*'critic' are in optimizer 1 \(SGD\): there, .*parameter_groups\(self.critic.*"
            r"If one of the targets is not deployed, leave it out: target: names the others",
        ),
        ("net", True, r"The parameters of 'net' are in optimizers \[0, 1\]: name the parts .*target:"),
    ],
)
def test_with_several_optimizers_the_one_of_the_target_is_named(
    tmp_path: Path, target: str, shared: bool, message: str
) -> None:
    """`parameter_groups(self)` would put all parts into one of them: a discriminator into that of the generator."""
    with pytest.raises(MisconfigurationException, match=message) as caught:
        qat_trainer(tmp_path, qat={**LEARNED, "target": target}).fit(Adversarial(shared))
    assert "parameter_groups(self," not in str(caught.value)


def test_weight_decay_on_scales_and_large_steps_are_one_warning_each(tmp_path: Path) -> None:
    """The plain optimizer of a module: AdamW(self.parameters()) decays by 0.01."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qat_trainer(tmp_path, qat=LEARNED).fit(Classifier(lr=0.05))
    texts = [str(w.message) for w in caught]
    assert sum("weight decay pulls 7 learned scales to zero" in text for text in texts) == 1
    assert sum("less than 2 steps of the optimizer from zero: " in text for text in texts) == 1


class Momentum(Learner):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)


@pytest.mark.filterwarnings("ignore:weight decay pulls")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_frozen_scales_stand_still_with_momentum_and_weight_decay(tmp_path: Path, accumulate: int) -> None:
    """freeze_observers_after: the weights go on."""
    recorder, module = Recorder(), Momentum()
    options = {**LEARNED, "freeze_observers_after": 1}
    run = qat_trainer(tmp_path, recorder, qat=options, max_epochs=3, accumulate_grad_batches=accumulate)
    weights = []
    run.callbacks.append(_OnEpochStart(lambda m: weights.append(m.net.conv1.weight.detach().clone())))
    run.fit(module)
    assert moved(recorder.epochs[0], recorder.epochs[1]) == {"input", "weight", "output"}
    assert_same(recorder.epochs[1], recorder.epochs[3])
    assert not torch.equal(weights[1], weights[2])


class _OnEpochStart(Callback):
    def __init__(self, call: Any) -> None:
        self.call = call

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.call(pl_module)


@pytest.mark.filterwarnings("ignore:.*cannot tell. the float model is no better than a constant guess")  # untrained
def test_pipeline_checks_hold_with_learned_scales(tmp_path: Path) -> None:
    """C4: at learning rate 0 no scale moves, and the run's own scales are not touched."""
    checked, plain = Learner(), Learner()
    plain.load_state_dict(checked.state_dict())
    rung = ZeroLRFinetune(batches=3)
    qat_trainer(tmp_path, rung, qat=LEARNED).fit(checked)
    qat_trainer(tmp_path, qat=LEARNED).fit(plain)
    assert rung.result is not None
    assert "misaligned" not in rung.result.verdict
    assert_same(state_of(checked), state_of(plain))


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_averaged_copies_learn_too(tmp_path: Path) -> None:
    """WeightAveraging copies the module with its scales, which are averaged like weights."""
    module = Learner()
    callbacks = [QuantizationAwareTraining(**LEARNED), Calibration(batches=4), WeightAveraging()]
    trainer(tmp_path, *callbacks, max_epochs=2).fit(module)
    assert only_region(module).learned_scales


@pytest.mark.parametrize("option", ["activation_scales", "weight_scales"])
def test_unknown_ways_to_find_scales_are_an_error(option: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"unknown {option} 'learnt'.*did you mean 'learned'"):
        QuantizationAwareTraining(**{option: "learnt"})


class Detached(Net):
    """Scales without a gradient: behind a detach, and in a branch that only some ranks take."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if images.sum().item() > 0:
            logits = torch.tanh(logits)
        return logits + F.relu(logits.detach())


class DetachedLearner(Learner):
    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = Detached()


class Dump(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        content = {"scales": scales(pl_module), "learned": list(only_region(pl_module).learned_scales)}
        torch.save(content, self.path / f"{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks")
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.filterwarnings("ignore:this strategy trains in child processes")
@pytest.mark.filterwarnings("ignore:.*was not seen while tracing")
@pytest.mark.filterwarnings("ignore:Calibration. ")
@pytest.mark.parametrize("options", [{}, {"start_epoch": 1}, {"freeze_observers_after": 1}], ids=str)
def test_two_ranks_learn_the_same_scales_whatever_gets_a_gradient(tmp_path: Path, options: dict[str, Any]) -> None:
    """DDP would fail on parameters that a step does not use; scales often are not."""
    torch.manual_seed(0)
    callbacks = [QuantizationAwareTraining(**LEARNED, **options), Calibration(batches=4), Dump(tmp_path)]
    trainer(tmp_path, *callbacks, strategy="ddp_fork", devices=2, max_epochs=2).fit(DetachedLearner())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_same(first["scales"], second["scales"])
    assert first["learned"]
