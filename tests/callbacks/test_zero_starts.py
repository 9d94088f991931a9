"""Adapters that start at zero, trained by the Trainer: they learn under quantization as they do in float.

Issue 12, number seven: with fixed, moving and learned scales, frozen observers, a checkpoint in the middle, two ranks,
an evaluation before training, and in the plan that is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat import parameter_groups
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.model_check import ModelCheck
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.region.region import find_regions
from tests.callbacks.test_ddp import Dump
from tests.callbacks.test_ddp import pytestmark as ddp_warnings
from tests.harness.classifier import Classifier, ResumableLoader
from tests.harness.state import assert_same, state_of
from tests.harness.trainers import qat_trainer, trainer

pytestmark = [
    *ddp_warnings,
    pytest.mark.filterwarnings("ignore:Calibration. .* does not vary as long as"),
    pytest.mark.filterwarnings("ignore:learned scales that are less than 2 steps"),
    pytest.mark.filterwarnings("ignore:CSVLogger shows no text"),
]
MODES = ["fixed", "ema", "learned"]


class AdaptedNet(nn.Module):
    """A frozen trunk with an adapter whose second matrix is zero; all that is learned goes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(36, 8)
        self.a, self.b = nn.Linear(36, 4, bias=False), nn.Linear(4, 8, bias=False)
        self.head = nn.Linear(8, 4)
        nn.init.zeros_(self.b.weight)
        for frozen in (self.base, self.head):
            frozen.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        logits: Tensor = self.head((self.base(x) + 2.0 * self.b(self.a(x))).tanh() * 3.0)
        return logits


class Adapted(Classifier):
    def __init__(self, lr: float = 0.02) -> None:
        super().__init__(lr)
        self.net = AdaptedNet()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self, lr=self.lr)
        return torch.optim.Adam([{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups], self.lr)

    def train_dataloader(self) -> Any:
        return ResumableLoader()


def trained(path: Path, *callbacks: Callback, epochs: int = 20, **qat: Any) -> tuple[LightningModule, Trainer]:
    seed_everything(3, verbose=False)
    module = Adapted()
    run = qat_trainer(path, *callbacks, qat=qat, max_epochs=epochs)
    run.fit(module)
    return module, run


def final_loss(module: LightningModule) -> float:
    module.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(module(images), labels) for images, labels in ResumableLoader().batches]
    return float(torch.stack(losses).mean())


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    """The loss before training, and after training in float."""
    seed_everything(3, verbose=False)
    module = Adapted()
    before = final_loss(module)
    trainer(tmp_path_factory.mktemp("float"), max_epochs=20).fit(module.train())
    return before, final_loss(module)


@pytest.mark.parametrize("activation_scales", MODES)
@pytest.mark.parametrize("weight_scales", ["updated", "fixed", "learned"])
def test_the_adapter_learns_as_in_float(
    tmp_path: Path, losses: tuple[float, float], activation_scales: str, weight_scales: str
) -> None:
    module, _ = trained(tmp_path, activation_scales=activation_scales, weight_scales=weight_scales)
    before, after_float = losses
    lost = 0.2 if weight_scales == "fixed" else 0.02  # scales of the adapter's other matrix clip what it grows to
    assert after_float < 0.1 * before
    assert final_loss(module) < after_float + lost * (before - after_float)


@pytest.mark.parametrize("activation_scales", MODES)
def test_evaluation_before_training_is_that_of_the_trunk(tmp_path: Path, activation_scales: str) -> None:
    module = Adapted()
    run = trainer(tmp_path, QuantizationAwareTraining(activation_scales=activation_scales), Calibration(batches=4))
    run.validate(module, verbose=False)
    seen: list[float] = []
    (region,) = find_regions(module).values()
    images, _ = ResumableLoader().batches[0]
    with (
        torch.no_grad(),
        region.tap(lambda name, _, q: seen.append(float(q.detach().abs().max())) if "b." in name else None),
    ):
        module.eval()(images)
    assert seen == [0.0] * len(seen) != []


@pytest.mark.parametrize("activation_scales", MODES)
def test_frozen_observers_stay_where_they_are(tmp_path: Path, activation_scales: str) -> None:
    taken: list[dict[str, Tensor]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.current_epoch >= 1:
                (region,) = find_regions(pl_module).values()
                taken.append({name: point.scale.detach().clone() for name, point in region.points.items()})

    module, _ = trained(tmp_path, Watch(), epochs=3, activation_scales=activation_scales, freeze_observers_after=1)
    assert_same(taken[0], taken[-1])
    (region,) = find_regions(module).values()
    assert region.points["b.output"].scale_source == "minmax"


def test_a_start_that_is_frozen_at_once_stays_float_and_learns(tmp_path: Path, losses: tuple[float, float]) -> None:
    module, _ = trained(tmp_path, freeze_observers_after=0)
    (region,) = find_regions(module).values()
    assert region.points["b.output"].scale_source is None
    before, after_float = losses
    assert final_loss(module) < after_float + 0.2 * (before - after_float)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
@pytest.mark.parametrize("activation_scales", MODES)
@pytest.mark.parametrize("step", [1, 6])
def test_resumed_training_equals_straight_training_bit_for_bit(
    tmp_path: Path, activation_scales: str, step: int
) -> None:
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module, _ = trained(tmp_path, checkpoints, epochs=3, activation_scales=activation_scales)
    other = Adapted()
    run = qat_trainer(tmp_path / "again", qat={"activation_scales": activation_scales}, max_epochs=3)
    run.fit(other, ckpt_path=str(tmp_path / f"step={step}.ckpt"), weights_only=True)
    assert_same(state_of(other), state_of(module))


@pytest.mark.parametrize("activation_scales", MODES)
def test_ranks_agree(tmp_path: Path, activation_scales: str) -> None:
    seed_everything(3, verbose=False)
    qat = QuantizationAwareTraining(activation_scales=activation_scales)  # type: ignore[arg-type]
    run = trainer(tmp_path, qat, Calibration(batches=4), Dump(tmp_path), max_epochs=2, strategy="ddp_fork", devices=2)
    run.fit(Shuffled())
    found = [torch.load(tmp_path / f"end{rank}of2.pt") for rank in (0, 1)]
    assert_same(found[0]["scales"], found[1]["scales"])
    assert_same(found[0]["state"], found[1]["state"])
    (scale,) = (scale.detach() for name, scale in found[0]["scales"].items() if name.endswith("b.output"))
    assert 0.0 < float(scale) < 1.0  # a point that waits has 1


class Shuffled(Adapted):
    """Ranks see different batches."""

    def train_dataloader(self) -> Any:
        return Classifier.train_dataloader(self)


def test_one_warning_names_the_points_and_the_parameter(tmp_path: Path) -> None:
    check = ModelCheck()
    with pytest.warns(UserWarning, match="does not vary as long as") as caught:
        trained(tmp_path, check, epochs=1)
    messages = [str(w.message) for w in caught if "does not vary" in str(w.message)]
    assert len(messages) == 1
    assert "net:b.output does not vary as long as the parameter net:b.weight is zero" in messages[0]
    assert "net:mul_0.output" in messages[0]
    assert check.result is not None
    kinds = {f.kind for f in check.result.findings if any("b." in name for name in f.names)}
    assert "dead channels" not in kinds
    assert "degenerate scale" not in kinds


def test_the_written_plan_has_the_scale_that_training_found(tmp_path: Path) -> None:
    module, _ = trained(tmp_path, epochs=2)
    (path,) = tmp_path.rglob("quant_plan.json")
    (region,) = find_regions(module).values()
    points = json.loads(path.read_text())["regions"]["net"]["points"]
    (written,) = [p for p in points if p["name"] == "b.output"]
    assert written["scale"] == float(region.points["b.output"].scale)
