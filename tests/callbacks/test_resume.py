"""fit -> resume from any checkpoint -> test(ckpt_path) (done-when 7)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.insertion.quantized_checkpoint import load_quantized
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.region.region import find_regions
from tests.harness.classifier import Classifier, Net, ResumableLoader
from tests.harness.state import assert_same, only_region, scales, state_of
from tests.harness.trainers import qat_trainer, quantized_checkpoint, trainer


class Spy(Calibration):
    """Counts calibrations."""

    def __init__(self) -> None:
        super().__init__(batches=4)
        self.count = 0

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        self.count += 1
        return super()._calibrate(trainer, pl_module)


class Resumable(Classifier):
    def train_dataloader(self) -> Any:
        return ResumableLoader()


OPTIONS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "ema": {"activation_scales": "ema"},
    "affine": {"qconfig": {"activation": {"scheme": "affine"}}, "activation_scales": "ema"},
    "frozen": {"freeze_observers_after": 1, "freeze_batch_norm_after": 1},
    "late": {"start_epoch": 1},
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """Uninterrupted runs of 3 epochs with a checkpoint every 3 of 12 steps, and how they ended."""
    results = {}
    for name, options in OPTIONS.items():
        path = tmp_path_factory.mktemp(name)
        seed_everything(7, verbose=False)
        module = Resumable()
        checkpoints = ModelCheckpoint(path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        qat_trainer(path, checkpoints, max_epochs=3, qat=options).fit(module)
        results[name] = (path, state_of(module))
    return results


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("step", [3, 6, 9])
def test_interrupted_and_resumed_training_equals_straight_training_bit_for_bit(
    tmp_path: Path, straight: dict[str, tuple[Path, dict[str, Tensor]]], options: str, step: int
) -> None:
    """Weights, scales and batch norm; from the middle of an epoch too."""
    path, expected = straight[options]
    module = Resumable()
    spy = Spy()
    run = trainer(tmp_path, QuantizationAwareTraining(**OPTIONS[options]), spy, max_epochs=3)
    run.fit(module, ckpt_path=str(path / f"step={step}.ckpt"), weights_only=True)
    assert_same(state_of(module), expected)
    assert spy.count == (1 if options == "late" and step == 3 else 0)


@pytest.mark.parametrize("save_weights_only", [False, True])
def test_fit_test_and_load_quantized_agree_bit_for_bit(tmp_path: Path, save_weights_only: bool) -> None:
    """#12896, and save_weights_only: the plan is with the module, not with the callback."""
    module = Classifier()
    images = torch.randn(8, 1, 6, 6)
    run = qat_trainer(tmp_path, max_epochs=2)
    run.fit(module)
    run.save_checkpoint(tmp_path / "last.ckpt", weights_only=save_weights_only)
    by_fit = module.eval()(images)
    loss = run.test(module, verbose=False)[0]["test_loss"]

    tested = Classifier()
    spy = Spy()
    again = trainer(tmp_path, QuantizationAwareTraining(), spy)
    assert again.test(tested, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)[0]["test_loss"] == loss
    assert spy.count == 0
    assert torch.equal(tested.eval()(images), by_fit)
    assert torch.equal(load_quantized(Classifier, tmp_path / "last.ckpt")(images), by_fit)
    assert_same(state_of(tested), state_of(module))


def test_every_stage_takes_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path)
    expected = load_quantized(Classifier, checkpoint)
    run = trainer(tmp_path, QuantizationAwareTraining())
    run.validate(Classifier(), ckpt_path=str(checkpoint), verbose=False)
    predictions = run.predict(Classifier(), ckpt_path=str(checkpoint))
    assert predictions is not None
    batches = [images for images, _ in Classifier().predict_dataloader()]
    assert all(torch.equal(p, expected(x)) for p, x in zip(predictions, batches, strict=True))


def test_best_checkpoint_of_model_checkpoint(tmp_path: Path) -> None:
    """#12896: `test(ckpt_path="best")` after fit."""
    module = Classifier()
    run = qat_trainer(tmp_path, ModelCheckpoint(tmp_path, monitor="val_loss"), max_epochs=2)
    run.fit(module)
    run.test(module, ckpt_path="best", verbose=False)
    assert only_region(module).is_calibrated


@pytest.mark.parametrize("overwritten", [False, True])
def test_resuming_wins_over_init_from(tmp_path: Path, overwritten: bool) -> None:
    """The same configuration file starts and resumes a run; the float checkpoint may be gone or another one by then."""
    checkpoint = quantized_checkpoint(tmp_path)
    module = Classifier()
    if overwritten:
        torch.save({"other.weight": torch.zeros(1)}, tmp_path / "gone.ckpt")
    gone = QuantizationAwareTraining(init_from=str(tmp_path / "gone.ckpt"))
    trainer(tmp_path, gone).test(module, ckpt_path=str(checkpoint), verbose=False)
    expected = {k: v for k, v in torch.load(checkpoint)["state_dict"].items() if isinstance(v, Tensor)}
    assert_same(state_of(module), expected)


INT16: dict[str, Any] = {"activation": {"dtype": "int16"}}


def test_the_plan_of_the_checkpoint_wins_over_qconfig_and_it_says_so(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path)
    module = Classifier()
    run = qat_trainer(tmp_path, qat={"qconfig": INT16}, max_epochs=2)
    with pytest.warns(UserWarning, match=r"activation.dtype: int8 there, int16 here.*init_from=.*calibrate anew"):
        run.fit(module, ckpt_path=str(checkpoint))
    assert {point.dtype for point in only_region(module).plan.points} == {"int8"}


def test_the_plan_of_the_checkpoint_wins_over_overrides_and_it_says_so(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path)
    overrides = [{"match": "relu_1", "activation": {"dtype": "int16"}}]
    with pytest.warns(UserWarning, match=r"overrides: \[\] there, .*relu_1.* here"):
        trainer(tmp_path, QuantizationAwareTraining(overrides=overrides)).test(  # type: ignore[arg-type]
            Classifier(), ckpt_path=str(checkpoint), verbose=False
        )


def test_a_run_that_asks_for_nothing_takes_any_plan_quietly(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path, qat={"qconfig": INT16})
    module = Classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer(tmp_path, QuantizationAwareTraining()).test(module, ckpt_path=str(checkpoint), verbose=False)
    assert {p.dtype for p in only_region(module).plan.points if not p.is_weight} == {"int16"}


class WiderNet(Net):
    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = torch.sigmoid(self.conv2(x)) * x
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class Changed(Classifier):
    """The same parameters, other ops."""

    def __init__(self) -> None:
        super().__init__()
        self.net = WiderNet()


def test_a_plan_that_does_not_fit_the_code_is_refused_with_the_ops_that_differ(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path)
    with pytest.raises(MisconfigurationException, match="does not fit the code of WiderNet") as caught:
        qat_trainer(tmp_path).fit(Changed(), ckpt_path=str(checkpoint))
    message = str(caught.value)
    assert "add_0: add is in the checkpoint, not in the code" in message
    assert "sigmoid_0: sigmoid is in the code" in message
    assert Path(__file__).name in message
    assert "init_from" in message


def test_lines_that_moved_do_not_matter(tmp_path: Path) -> None:
    """The same ops under the same names in another function."""
    checkpoint = quantized_checkpoint(tmp_path)

    class MovedNet(Net):
        def forward(self, images: Tensor) -> Tensor:
            x = self.bn1(self.conv1(images))
            x = F.relu(x)
            y = self.conv2(x)
            x = F.relu(y + x)
            logits: Tensor = self.head(x.mean(dim=(2, 3)))
            return logits

    class Moved(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = MovedNet()

    module = Moved()
    trainer(tmp_path, QuantizationAwareTraining()).test(module, ckpt_path=str(checkpoint), verbose=False)
    images = torch.randn(4, 1, 6, 6)
    assert torch.equal(module.eval()(images), load_quantized(Classifier, checkpoint)(images))


class Two(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.other(self.net(images))
        return logits

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.other(self.net(batch[0])), batch[1])


def test_another_target_than_in_the_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path, Two(), qat={"target": ["net", "other"]})
    run = trainer(tmp_path, QuantizationAwareTraining(target="net"))
    with pytest.raises(MisconfigurationException, match=r"on \['net', 'other'\], this run puts them on \['net'\].*set"):
        run.test(Two(), ckpt_path=str(checkpoint), verbose=False)


def test_auto_takes_the_targets_of_the_checkpoint(tmp_path: Path) -> None:
    """A run of another stage may call other modules than training did."""
    checkpoint = quantized_checkpoint(tmp_path, Two(), qat={"target": "other"})
    module = Two()
    trainer(tmp_path, QuantizationAwareTraining()).test(module, ckpt_path=str(checkpoint), verbose=False)
    assert list(find_regions(module)) == ["other"]
    assert only_region(module).is_calibrated


def test_a_checkpoint_brings_a_plan_where_tracing_is_impossible(tmp_path: Path) -> None:
    class NeedsOptimizer(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            if not only_if_inserted(self):
                raise RuntimeError("too early")
            super().test_step(batch, batch_idx)

    def only_if_inserted(module: nn.Module) -> bool:
        return bool(find_regions(module))

    checkpoint = quantized_checkpoint(tmp_path)
    module = NeedsOptimizer()
    run = trainer(tmp_path, QuantizationAwareTraining())
    expected = trainer(tmp_path, QuantizationAwareTraining()).test(
        Classifier(), ckpt_path=str(checkpoint), verbose=False
    )
    assert run.test(module, ckpt_path=str(checkpoint), verbose=False) == expected


def test_the_state_of_callbacks_is_primitive(tmp_path: Path) -> None:
    """lightning-facts.md: dataclasses, enums, numpy scalars break the default `weights_only` resume."""
    checkpoint = quantized_checkpoint(tmp_path)
    loaded = torch.load(checkpoint, weights_only=True)
    assert not any("Quantization" in name or "Calibration" in name for name in loaded["callbacks"])


def test_scales_are_restored_before_the_first_hook_of_the_fit(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path)
    expected = scales(load_quantized(Classifier, checkpoint))
    seen: list[dict[str, Tensor]] = []

    class FitStart(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(scales(pl_module))

    qat_trainer(tmp_path, FitStart(), max_epochs=2).fit(Classifier(), ckpt_path=str(checkpoint))
    assert_same(seen[0], expected)
