"""Calibration: which data it sees, when it runs, what it finds and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import find_regions
from tests.harness.classifier import Classifier, dataset, loader
from tests.harness.state import assert_same, only_region, scales
from tests.harness.trainers import trainer


def calibrated(path: Path, module: LightningModule, batches: int | None = 4, **kwargs: Any) -> Calibration:
    """Calibrate by `trainer.validate`, with the training data."""
    calibration = Calibration(batches=batches) if batches else Calibration(epochs=1)
    trainer(path, QuantizationAwareTraining(), calibration, **kwargs).validate(module, verbose=False)
    return calibration


class InOrder(Classifier):
    def train_dataloader(self) -> Any:
        return loader()


def test_scales_are_those_of_the_engine_on_the_same_batches(tmp_path: Path) -> None:
    module = InOrder()
    twin = InOrder()
    twin.load_state_dict(module.state_dict())
    calibrated(tmp_path, module)
    region = insert(twin.net, batches=[images for images, _ in loader()])
    calibrate(region, [images for images, _ in loader()])
    assert_same(scales(module), scales(twin))


def test_batches_limits_the_number(tmp_path: Path) -> None:
    result = calibrated(tmp_path, Classifier(), batches=3).result
    assert result is not None
    assert result.batches == 3


def test_epochs_are_full_passes_of_the_loader(tmp_path: Path) -> None:
    calibration = Calibration(epochs=2)
    trainer(tmp_path, QuantizationAwareTraining(), calibration).fit(Classifier())
    assert calibration.result is not None
    assert calibration.result.batches == 8


class WithCalibrationData(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(16, seed=1)

    def calibration_dataloader(self) -> Any:
        return DataLoader([(torch.full((1, 6, 6), 100.0), torch.tensor(0))] * 16, 4)


def test_calibration_dataloader_comes_first(tmp_path: Path) -> None:
    module = Classifier()
    calibration = Calibration(batches=2)
    run = trainer(tmp_path, QuantizationAwareTraining(), calibration)
    run.fit(module, datamodule=WithCalibrationData())
    scale = float(only_region(module).points["conv1.input0"].scale)
    assert scale * 127 == pytest.approx(100.0, rel=0.01)


def test_test_alone_calibrates_on_the_training_data(tmp_path: Path) -> None:
    """Post-training quantization is a Trainer call."""
    by_test, by_fit = InOrder(), InOrder()
    by_fit.load_state_dict(by_test.state_dict())
    trainer(tmp_path, QuantizationAwareTraining(), Calibration(batches=4)).test(by_test, verbose=False)
    at_start: dict[str, Tensor] = {}

    class AtStart(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            at_start.update(scales(pl_module))

    trainer(tmp_path, QuantizationAwareTraining(), Calibration(batches=4), AtStart()).fit(by_fit)
    assert_same(scales(by_test), at_start)


class WithoutTraining(LightningDataModule):
    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.train_set = dataset()

    def train_dataloader(self) -> Any:
        return DataLoader(self.train_set)

    def test_dataloader(self) -> Any:
        return loader(16, seed=2)


def test_without_training_data_the_data_of_the_stage_are_used_and_it_says_so(tmp_path: Path) -> None:
    class OnlyTest(Classifier):
        train_dataloader = LightningModule.train_dataloader
        val_dataloader = LightningModule.val_dataloader

    run = trainer(tmp_path, QuantizationAwareTraining(), Calibration(batches=2))
    with pytest.warns(UserWarning, match="uses the test data.*calibration_dataloader"):
        run.test(OnlyTest(), datamodule=WithoutTraining(), verbose=False)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_calibrates_by_itself(tmp_path: Path, stage: str) -> None:
    module = Classifier()
    run = trainer(tmp_path, QuantizationAwareTraining(), Calibration(batches=2))
    getattr(run, stage)(module)
    assert only_region(module).is_calibrated


def test_predict_calibrates_with_prediction_batches_if_there_is_nothing_else(tmp_path: Path) -> None:
    """They need not fit the validation step."""

    class Predicts(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise AssertionError("given a batch of another stage")

    module = Predicts()
    run = trainer(tmp_path, QuantizationAwareTraining(), Calibration(batches=2))
    with pytest.warns(UserWarning, match="uses the predict data"):
        predictions = run.predict(module, DataLoader(torch.randn(8, 4), batch_size=4))
    assert only_region(module).is_calibrated
    assert predictions is not None
    assert len(predictions) == 2


class Spy(Calibration):
    """Counts calibrations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count = 0

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        self.count += 1
        return super()._calibrate(trainer, pl_module)


def test_it_runs_once_before_the_sanity_check(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Sanity(Callback):
        def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(only_region(pl_module).is_calibrated)

    spy = Spy(batches=2)
    trainer(tmp_path, QuantizationAwareTraining(), spy, Sanity(), max_epochs=2).fit(Classifier())
    assert seen == [True]
    assert spy.count == 1


def test_a_second_fit_does_not_calibrate_again(tmp_path: Path) -> None:
    module = Classifier()
    spy = Spy(batches=2)
    trainer(tmp_path, QuantizationAwareTraining(), spy).fit(module)
    trainer(tmp_path, QuantizationAwareTraining(), spy).fit(module)
    assert spy.count == 1


def test_it_observes_in_float_and_in_eval_mode(tmp_path: Path) -> None:
    modes: list[tuple[bool, str]] = []

    class Notes(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if (regions := find_regions(self)) and not self.trainer.sanity_checking:
                modes.append((self.net.training, next(iter(regions.values())).current_state))
            super().validation_step(batch, batch_idx)

    trainer(tmp_path, QuantizationAwareTraining(), Calibration(batches=2), limit_val_batches=0).fit(Notes())
    assert modes == [(False, "observe")] * 2


class Augmented(Classifier):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        return (images * 1000 if self.trainer.training else images), labels


def test_training_augmentation_is_left_out(tmp_path: Path) -> None:
    module = Augmented()
    trainer(tmp_path, QuantizationAwareTraining(), Calibration(batches=4)).fit(module)
    assert float(only_region(module).points["conv1.input0"].scale) * 127 < 10


class Stream(IterableDataset[Any]):
    """Tells the items that are taken from it."""

    def __init__(self, tell: Callable[[Any], None]) -> None:
        self.tell = tell  # a list of its own would be put back

    def __iter__(self) -> Iterator[Any]:
        for item in dataset():
            self.tell(item)
            yield item


def test_a_stream_gives_no_batch_more_than_needed(tmp_path: Path) -> None:
    items: list[Any] = []
    calibration = Calibration(batches=2)
    run = trainer(tmp_path, QuantizationAwareTraining(trace_batches=1), calibration, limit_train_batches=2)
    taken: list[int] = []

    class Taken(Callback):
        def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            taken.append(len(items))

    run.callbacks.append(Taken())
    run.fit(Classifier(), DataLoader(Stream(items.append), 8))
    assert taken == [8 + 16]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"limit_train_batches": 3}, 3),
        ({"limit_train_batches": 0.5}, 2),
        ({"fast_dev_run": True}, 1),
        ({"overfit_batches": 2}, 2),
    ],
)
def test_limits_of_the_trainer_hold(tmp_path: Path, limits: dict[str, Any], expected: int) -> None:
    calibration = Calibration()
    trainer(tmp_path, QuantizationAwareTraining(), calibration, **limits).fit(InOrder())
    assert calibration.result is not None
    assert calibration.result.batches == expected


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfit_batches_calibrates_on_the_batches_to_overfit(tmp_path: Path) -> None:
    """Shuffling is off then, as in training."""
    shuffled, in_order = Classifier(), InOrder()
    in_order.load_state_dict(shuffled.state_dict())
    found = []
    for module in (shuffled, in_order):

        class AtStart(Callback):
            def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
                found.append(scales(pl_module))

        run = trainer(tmp_path, QuantizationAwareTraining(), Calibration(), AtStart(), overfit_batches=1)
        run.fit(module)
    assert_same(*found)


@pytest.mark.parametrize("shape", ["dict", "list", "combined"])
def test_collections_of_training_loaders(tmp_path: Path, shape: str) -> None:
    loaders: Any = {"a": loader(), "b": loader(16, seed=3)}
    given = {"dict": loaders, "list": list(loaders.values()), "combined": CombinedLoader(loaders, "min_size")}[shape]

    class Several(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            parts = batch.values() if isinstance(batch, dict) else batch
            return torch.stack([self.loss(part) for part in parts]).mean()

        validation_step = LightningModule.validation_step
        val_dataloader = LightningModule.val_dataloader

    calibration = Calibration()
    module = Several()
    trainer(tmp_path, QuantizationAwareTraining(), calibration).fit(module, given)
    assert calibration.result is not None
    assert calibration.result.batches == (2 if shape == "combined" else 4)


class TroubledNet(nn.Module):
    """NaN for large images, a branch of zeros, a branch that only training takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(36, 8)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 4)
        self.trained = nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.a(images.flatten(1)))
        zeros = F.relu(self.b(x) - 1000)
        x = torch.sigmoid(x) * torch.where(images.amax() > 50, torch.nan, 1.0)
        if self.training:
            x = self.trained(x)
        return self.c(x + zeros)


class TroubledData(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = TroubledNet()  # type: ignore[assignment]

    def train_dataloader(self) -> Any:
        images, labels = (tensor.clone() for tensor in dataset().tensors)
        images[16] = 100.0
        return DataLoader(TensorDataset(images, labels), 8)


def test_findings_name_point_and_batch(tmp_path: Path) -> None:
    """NaN activations (which op, which batch) and constants; what runs in train mode only needs no data."""
    calibration = Calibration(batches=4)
    run = trainer(tmp_path, QuantizationAwareTraining(trace_batches=1), calibration)
    with pytest.warns(UserWarning, match="Calibration: ") as warned:
        run.validate(TroubledData(), verbose=False)
    messages = [str(w.message) for w in warned]
    assert calibration.result is not None
    kinds = {(finding.kind, finding.batch) for finding in calibration.result.findings}
    assert kinds == {("nan", 2), ("constant", None)}
    assert any("is NaN in calibration batch 2" in m and "mul" in m for m in messages)
    assert any("was zero in every batch" in m and "relu_1" in m for m in messages)
    assert not any("trained" in m for m in messages)


def test_an_empty_loader_is_an_error_that_says_so(tmp_path: Path) -> None:
    class Empty(Classifier):
        def calibration_dataloader(self) -> Any:
            return []

    with pytest.raises(MisconfigurationException, match=r"calibration got no batch: the data loader is empty"):
        trainer(tmp_path, QuantizationAwareTraining(), Calibration()).fit(Empty())


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_is_shown_unless_the_trainer_shows_none(
    tmp_path: Path, bar: type[Callback], capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = Calibration(batches=2)
    trainer(tmp_path, QuantizationAwareTraining(), calibration, bar(), enable_progress_bar=True).fit(Classifier())
    assert calibration.result is not None


def test_barebones(tmp_path: Path) -> None:
    module = Classifier()
    run = Trainer(
        accelerator="cpu",
        barebones=True,
        max_epochs=1,
        default_root_dir=tmp_path,
        callbacks=[QuantizationAwareTraining(), Calibration(batches=2)],
    )
    with pytest.warns(UserWarning, match="barebones"):
        run.fit(module)
    assert only_region(module).is_calibrated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 1, "epochs": 1}, r"batches or epochs, not both: write Calibration\(batches=32\)"),
        ({"batches": 0}, r"Calibration\(batches=0\): must be at least 1"),
        ({"epochs": -1}, r"Calibration\(epochs=-1\): must be at least 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Calibration(**arguments)


def test_bf16_mixed_keeps_scales_in_float32(tmp_path: Path) -> None:
    """lightning-facts.md: activations arrive as bf16, scales stay fp32."""
    module = Classifier()
    trainer(tmp_path, QuantizationAwareTraining(), Calibration(batches=2), precision="bf16-mixed").fit(module)
    assert {scale.dtype for scale in scales(module).values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:.*keeps the weights in bfloat16")
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precisions_keep_scales_in_float32(tmp_path: Path, precision: str) -> None:
    """lightning-facts.md: a scale rounded to bfloat16 would be another scale."""
    module = Classifier()
    trainer(tmp_path, QuantizationAwareTraining(), Calibration(batches=2), precision=precision).fit(module)
    assert module.net.conv1.weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float64)
    assert {scale.dtype for scale in scales(module).values()} == {torch.float32}
    assert only_region(module).is_calibrated


def test_int16_in_bfloat16_warns(tmp_path: Path) -> None:
    """design.md section 4: int16 on bf16 activations is reported (8 bits of mantissa)."""
    qat = QuantizationAwareTraining({"activation": {"dtype": "int16"}})  # type: ignore[arg-type]
    run = trainer(tmp_path, qat, Calibration(batches=2), precision="bf16-mixed")
    with pytest.warns(UserWarning, match="8 binary digits, fewer than the type of"):
        run.fit(Classifier())


def test_a_point_that_saw_only_nan_was_reached() -> None:
    """Its finding is that it is NaN; "never reached by the calibration data" would be wrong."""
    model = nn.Sequential(nn.Linear(4, 2))
    region = insert(model, (torch.randn(3, 4),))
    result = calibrate(region, [torch.full((3, 4), float("nan"))])
    assert {(finding.point, finding.kind) for finding in result.findings} == {("0.input0", "nan")}
