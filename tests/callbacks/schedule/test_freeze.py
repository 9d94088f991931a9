"""QuantizationAwareTraining(freeze=...) and several targets in one module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.insertion.quantized_checkpoint import load_quantized
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.schedule.frozen_parts import FrozenParts
from lightning_qat.quantization.planning.make_plan import make_plans
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import find_regions
from lightning_qat.quantization.tracing.tracer import trace
from tests.harness.classifier import Classifier
from tests.harness.state import assert_same, only_region, scales, state_of
from tests.harness.trainers import qat_trainer, trainer


class Snapshots(Callback):
    """The state of the module at the start of every epoch and at the end of the last."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.modes: list[bool] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.states.append(state_of(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.modes.append(pl_module.net.bn1.training)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.states.append(state_of(pl_module))

    def moved(self, epoch: int) -> set[str]:
        before, after = self.states[epoch : epoch + 2]
        return {name for name in before if not torch.equal(before[name], after[name])}


FROZEN = ("net.conv1", "net.bn1", "net._quantization.fake_quants.conv1", "net._quantization.fake_quants.relu_0")
PARTS = ["conv1", "bn1", "relu_0"]


def frozen_names(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(FROZEN)}


def fit(path: Path, module: LightningModule, snapshots: Snapshots, epochs: int = 2, **qat: Any) -> Trainer:
    run = qat_trainer(path, snapshots, qat={"activation_scales": "ema", **qat}, max_epochs=epochs)
    run.fit(module)
    return run


def test_frozen_parts_do_not_move_and_the_rest_does(tmp_path: Path) -> None:
    """AdamW decays every weight it sees, Lightning calls train() after every validation."""
    snapshots = Snapshots()
    module = Classifier()
    fit(tmp_path, module, snapshots, freeze=PARTS)
    for epoch in (0, 1):
        assert frozen_names(snapshots.moved(epoch)) == set()
        assert {"net.conv2.weight", "net.head.bias"} <= snapshots.moved(epoch)
        assert "net._quantization.fake_quants.relu_1/output.scale" in snapshots.moved(epoch)
    assert not any(snapshots.modes)
    assert all(p.requires_grad for p in module.parameters())  # the next run says what is frozen then
    assert not only_region(module).freezing


def test_backbone_first_then_the_rest_in_two_runs(tmp_path: Path) -> None:
    module, first, second = Classifier(), Snapshots(), Snapshots()
    fit(tmp_path, module, first, epochs=1)
    assert "net.conv1.weight" in first.moved(0)
    fit(tmp_path, module, second, epochs=1, freeze=["net.conv1", "net.bn1", "relu_0"])
    assert frozen_names(second.moved(0)) == set()
    assert "net.head.weight" in second.moved(0)


def test_parts_are_frozen_from_their_epoch_on(tmp_path: Path) -> None:
    snapshots = Snapshots()
    fit(tmp_path, Classifier(), snapshots, freeze=dict.fromkeys(PARTS, 1))
    assert "net.conv1.weight" in snapshots.moved(0)
    assert frozen_names(snapshots.moved(1)) == set()
    assert "net.head.weight" in snapshots.moved(1)
    assert snapshots.modes == [True] * 4 + [False] * 4


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resumed_run_is_frozen_again(tmp_path: Path) -> None:
    module, snapshots = Classifier(), Snapshots()
    fit(tmp_path, module, Snapshots(), freeze=PARTS).save_checkpoint(tmp_path / "two.ckpt")
    resumed = Classifier()
    run = qat_trainer(tmp_path, snapshots, qat={"activation_scales": "ema", "freeze": PARTS}, max_epochs=3)
    run.fit(resumed, ckpt_path=str(tmp_path / "two.ckpt"), weights_only=True)
    assert len(snapshots.states) == 2
    assert frozen_names(snapshots.moved(0)) == set()
    assert "net.head.weight" in snapshots.moved(0)
    loaded = load_quantized(Classifier, tmp_path / "two.ckpt")
    assert all(p.requires_grad for p in loaded.parameters())  # not part of the checkpoint


def test_learned_scales_of_frozen_parts_stand_still(tmp_path: Path) -> None:
    snapshots = Snapshots()
    learned = {"activation_scales": "learned", "weight_scales": "learned"}
    module = Classifier(lr=1e-4)
    run = qat_trainer(tmp_path, snapshots, qat={**learned, "freeze": PARTS})
    with pytest.warns(UserWarning, match=r"weight decay pulls \d+ learned scales"):
        run.fit(module)
    assert frozen_names(snapshots.moved(0)) == set()
    assert "net._quantization.fake_quants.relu_1/output.scale" in snapshots.moved(0)


class Fails(Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise RuntimeError("in between")


def test_exceptions_unfreeze(tmp_path: Path) -> None:
    module = Classifier()
    with pytest.raises(RuntimeError, match="in between"):
        qat_trainer(tmp_path, Fails(), qat={"freeze": ["conv*"]}).fit(module)
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("freeze", [["*"], {"*": 1}])
def test_freezing_everything_is_an_error(tmp_path: Path, freeze: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"freeze: \* leaves no parameter to train"):
        qat_trainer(tmp_path, qat={"freeze": freeze}, max_epochs=2).fit(Classifier())


@pytest.mark.filterwarnings("ignore:Found 2 module.s. in eval mode at the start of training")
def test_what_the_user_froze_is_left_alone(tmp_path: Path) -> None:
    """Without the option."""
    module, snapshots = Classifier(), Snapshots()
    region = insert(module.net, (torch.randn(2, 1, 6, 6),))
    calibrate(region, [torch.randn(8, 1, 6, 6)])
    region.freeze(PARTS)
    qat_trainer(tmp_path, snapshots).fit(module)
    assert frozen_names(snapshots.moved(0)) == set()
    assert region.freezing


@pytest.mark.parametrize("freeze", [["conv11"], {"net.conv11": 5}])
def test_part_that_does_not_exist_is_an_error_before_training(tmp_path: Path, freeze: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"freeze: .*conv11' matches no .*Near names: .*conv1"):
        qat_trainer(tmp_path, qat={"freeze": freeze}).fit(Classifier())


def test_epochs_count_from_0() -> None:
    with pytest.raises(MisconfigurationException, match="epochs count from 0"):
        QuantizationAwareTraining(freeze={"backbone": -1})


@pytest.mark.parametrize("value", ['["backbone.*", "neck"]', '{"backbone.*": 3}'])
def test_command_line_takes_a_list_or_a_mapping(value: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(QuantizationAwareTraining, "qat")
    parsed = parser.instantiate_classes(parser.parse_args([f"--qat.freeze={value}"])).qat
    assert parsed.frozen_parts.first_epochs == ({"backbone.*": 3} if "3" in value else {"backbone.*": 0, "neck": 0})


class DdpTrainer:
    """What FrozenParts looks at."""

    world_size = 2

    def __init__(self, **kwargs: Any) -> None:
        self.strategy = DDPStrategy(**kwargs)


def test_freezing_later_needs_a_ddp_that_knows_unused_parameters() -> None:
    later = FrozenParts({"backbone": 3})
    with pytest.raises(MisconfigurationException, match="ddp_find_unused_parameters_true"):
        later.check(DdpTrainer())  # type: ignore[arg-type]
    later.check(DdpTrainer(find_unused_parameters=True))  # type: ignore[arg-type]
    FrozenParts(["backbone"]).check(DdpTrainer())  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks")
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.filterwarnings("ignore:this strategy trains in child processes")
def test_frozen_from_the_start_works_under_ddp(tmp_path: Path) -> None:
    """DDP is built after parameters were frozen, and waits for no gradient of theirs."""
    module = Classifier()
    callbacks = [QuantizationAwareTraining(activation_scales="ema", freeze=PARTS), Calibration(batches=2)]
    before = state_of(module)
    trainer(tmp_path, *callbacks, strategy="ddp_fork", devices=2, limit_val_batches=0).fit(module)
    after = {name: value for name, value in state_of(module).items() if name in before}
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert frozen_names(moved) == set()
    assert "net.head.weight" in moved


# -- several targets


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Head(nn.Module):
    """Has names in common with the backbone, one of them the backbone's own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.backbone(F.relu(self.conv(x)).mean((2, 3)))
        return y


class TwoTargets(Classifier):
    """Float code between the targets."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.backbone, self.head = Backbone(), Head()
        del self.net

    def forward(self, images: Tensor) -> Tensor:
        y: Tensor = self.head(self.backbone(images) * 2)
        return y

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.head(self.backbone(images) * 2), labels)


INT16 = {"dtype": "int16"}


@pytest.mark.parametrize(
    ("match", "points"),
    [
        ("conv.input0", {"backbone:conv.input0", "head:conv.input0"}),
        ("backbone.conv.input0", {"backbone:conv.input0"}),
        ("head.conv.*", {"head:conv.input0"}),
        ("backbone", {"backbone:conv.input0", "backbone:relu_0.output"}),
        ("head.backbone.output", {"head:backbone.output"}),
        ("backbone.output", {"head:backbone.output"}),  # nothing of that name in the backbone: relative after all
    ],
)
def test_overrides_can_say_which_target(match: str, points: set[str]) -> None:
    module = TwoTargets()
    x = torch.randn(2, 1, 8, 8)
    graphs = {"backbone": trace(module.backbone, [x]), "head": trace(module.head, [module.backbone(x)])}
    rules = [{"match": match, "activation": INT16}]
    plans = make_plans(graphs, None, rules)
    found = {f"{path}:{p.name}" for path, plan in plans.items() for p in plan.points if p.dtype == "int16"}
    assert found == points
    assert plans["head"].overrides == plans["backbone"].overrides
    assert plans["head"].overrides[0]["match"] == match
    reasons = {p.reason for plan in plans.values() for p in plan.points if p.dtype == "int16"}
    assert all(reason.startswith(f"override 1 (match {match!r})") for reason in reasons)


def test_override_with_a_wrong_name_below_a_target_lists_near_names(tmp_path: Path) -> None:
    qat = {"target": ["backbone", "head"], "overrides": [{"match": "backbone.cnv.input0", "activation": INT16}]}
    with pytest.raises(MisconfigurationException, match=r"match 'backbone\.cnv\.input0'.*Near names: conv"):
        qat_trainer(tmp_path, qat=qat).fit(TwoTargets())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_two_targets_train_save_load_and_freeze_one(tmp_path: Path) -> None:
    rules = [{"match": "head.conv.input0", "activation": INT16}]
    qat = {"target": ["backbone", "head"], "overrides": rules, "freeze": ["backbone.*"], "activation_scales": "ema"}
    module, snapshots = TwoTargets(), Snapshots()
    snapshots.on_train_batch_end = lambda *args: None  # type: ignore[method-assign]
    run = qat_trainer(tmp_path, snapshots, qat=qat)
    run.fit(module)
    assert list(find_regions(module)) == ["backbone", "head"]
    assert {r.current_state for r in find_regions(module).values()} == {"quantize"}
    moved = snapshots.moved(0)
    assert not [name for name in moved if name.startswith("backbone.")]
    assert {"head.conv.weight", "head._quantization.fake_quants.relu_0/output.scale"} <= moved
    assert find_regions(module)["head"].points["conv.input0"].dtype == "int16"
    assert find_regions(module)["backbone"].points["conv.input0"].dtype == "int8"
    run.save_checkpoint(tmp_path / "two.ckpt")
    loaded = load_quantized(TwoTargets, tmp_path / "two.ckpt")
    images = torch.randn(4, 1, 6, 6)
    assert torch.equal(loaded(images), module.eval()(images))
    assert_same(scales(loaded), scales(module))
    tested = TwoTargets()
    tester = trainer(tmp_path, QuantizationAwareTraining(target=["backbone", "head"]))
    tester.test(tested, ckpt_path=str(tmp_path / "two.ckpt"), verbose=False)
    assert_same(scales(tested), scales(module))


def test_two_targets_without_a_trainer() -> None:
    torch.manual_seed(0)
    module, images = TwoTargets().eval(), torch.randn(8, 1, 6, 6)
    expected = module(images)
    between = module.backbone(images) * 2
    regions = [insert(module.backbone, (images,)), insert(module.head, (between,))]
    assert torch.equal(module(images), expected)
    calibrate(regions[0], [images])
    calibrate(regions[1], [between])
    assert list(find_regions(module)) == ["backbone", "head"]
    both = module(images)
    with regions[0].state("off"):
        head_only = module(images)
    assert not torch.equal(both, head_only)
    for region in regions:
        region.remove()
    assert torch.equal(module(images), expected)
