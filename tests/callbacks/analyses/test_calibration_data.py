"""Calibration on other data than the model is for: that is the verdict, and not a scale for each of the points."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.analysis.comparison.foreign_data import Moments, moments_of
from lightning_qat.callbacks.analyses import calibration_data
from lightning_qat.callbacks.early_analysis import EarlyAnalysis
from lightning_qat.callbacks.layer_comparison import LayerComparison
from lightning_qat.callbacks.pipeline_check import PipelineCheck
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.quantized_run import is_calibrated
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.qconfig import QConfig
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from tests.harness.small_digits import MEAN, STD, Digits, digits, float_weights
from tests.harness.trainers import qat_trainer

Change = Callable[[Tensor], Tensor]


class Prepared(Digits):
    """The datasets prepare the images, as most projects do; the steps take them as they are."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(lambda x: (x - MEAN) / STD, 0, 1200, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(lambda x: (x - MEAN) / STD, 1200, 1500)


def loader(change: Change, start: int, end: int, **kwargs: Any) -> DataLoader[Any]:
    images, labels = digits()
    return DataLoader(TensorDataset(change(images[start:end]), labels[start:end]), batch_size=50, **kwargs)


def model(change: Change | None = None, kind: type[Prepared] = Prepared) -> Prepared:
    """A trained model; with ``change``, it has calibration data of its own."""

    class WithCalibration(kind):  # type: ignore[misc, valid-type]
        def calibration_dataloader(self) -> DataLoader[Any]:
            assert change is not None
            return loader(change, 0, 400)

    module: Prepared = kind(lr=1e-5) if change is None else WithCalibration(lr=1e-5)
    module.load_state_dict(float_weights())
    return module


def run(directory: Path, module: Prepared, *callbacks: Any, bits: str = "int8", fit: Any = None) -> None:
    seed_everything(0, verbose=False)
    quantization = QuantizationAwareTraining(qconfig=QConfig.of({"activation": {"dtype": bits, "scheme": "symmetric"}}))
    settings: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1.0}
    qat_trainer(directory, *callbacks, quantization=quantization, **settings).fit(module, **(fit or {}))


FOREIGN: dict[str, Change] = {
    "zeros": torch.zeros_like,
    "not normalized": lambda x: x * 255 / 16,
    "shifted": lambda x: (x - MEAN) / STD + 400.0,
    "other unit": lambda x: (x - MEAN) / STD / 255,
    "a constant": lambda x: torch.full_like(x, 200.0),
}
ZERO = "ignore:.*was zero in every batch"


@pytest.mark.parametrize("change", FOREIGN)
@pytest.mark.filterwarnings(ZERO, "ignore:PipelineCheck")
def test_calibration_on_other_data_is_the_verdict_and_names_its_loader(change: str, tmp_path: Path) -> None:
    """Zeros, data that are not normalized (siblings: shifted, in another unit, one value)."""
    check, comparison = PipelineCheck(batches=2), LayerComparison()
    run(tmp_path, model(FOREIGN[change]), check, SensitivityAnalysis(), comparison)
    early = json.loads((tmp_path / "lightning_qat" / "calibrated_diagnosis.json").read_text())
    first = early["rows"][0]
    assert first["verdict"] == "calibration data"
    assert first["yaml"] == ""
    assert "calibration_dataloader() of WithCalibration" in first["action"]
    assert early["calibration"].startswith("Calibration data are not the training data: what calibration_dataloader()")
    rows = [row for row in early["rows"] if row["verdict"] == "calibration data"]
    assert len(rows) >= 3
    assert not [row for row in early["rows"] if row["yaml"] and ".weight" not in row["point"]]  # single scales
    assert check.result is not None
    assert "Calibration data are not the training data" in check.result.note
    assert "Worst points" not in check.result.note
    late = json.loads((tmp_path / "lightning_qat" / "diagnosis.json").read_text())
    assert [row["point"] for row in late["rows"] if row["verdict"] == "calibration data"]  # the scales are still those
    assert not [row for row in late["rows"] if row["yaml"] and ".weight" not in row["point"]]
    table = json.loads((tmp_path / "lightning_qat" / "calibrated_sensitivity.json").read_text())
    assert "Calibration data are not the training data" in table["remark"]


def test_calibration_loader_of_a_datamodule_is_named(tmp_path: Path) -> None:
    class Numbers(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return Prepared().train_dataloader()

        def val_dataloader(self) -> DataLoader[Any]:
            return Prepared().val_dataloader()

        def calibration_dataloader(self) -> DataLoader[Any]:
            return loader(lambda x: x / 500, 0, 400)

    comparison = LayerComparison()
    run(tmp_path, model(), comparison, fit={"datamodule": Numbers()})
    assert comparison.foreign is not None
    assert "what calibration_dataloader() of Numbers gives" in comparison.foreign.text


def test_training_data_that_validation_does_not_get_are_named_as_such(tmp_path: Path) -> None:
    """Without a loader of its own, calibration takes the training data."""

    class Raw(Prepared):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader(lambda x: x / 200, 0, 1200, shuffle=True)

    comparison = LayerComparison()
    run(tmp_path, model(kind=Raw), comparison)
    assert comparison.foreign is not None
    assert "Calibration data are not the validation data: what train_dataloader() gives" in comparison.foreign.text


class Augmented(Prepared):
    """Noise, cut-outs, shifts and dropout in training."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))

    def train_dataloader(self) -> DataLoader[Any]:
        def changed(x: Tensor) -> Tensor:
            x = (x - MEAN) / STD
            x[:, :, 2:5, 1:4] = 0.0
            return torch.roll(1.3 * x + 0.3 * torch.randn_like(x), (1, 1), (2, 3))

        return loader(changed, 0, 1200, shuffle=True)


def sorted_by_class(x: Tensor) -> Tensor:
    return (x - MEAN) / STD * torch.linspace(0.7, 1.3, len(x)).reshape(-1, 1, 1, 1)


HEALTHY: dict[str, tuple[Change | None, type[Prepared]]] = {
    "same data": (None, Prepared),
    "augmentation and dropout": (None, Augmented),
    "calibration without augmentation": (lambda x: (x - MEAN) / STD, Augmented),
    "contrast that grows": (sorted_by_class, Prepared),
}


@pytest.mark.parametrize("case", HEALTHY)
def test_data_of_the_same_kind_are_not_blamed(case: str, tmp_path: Path) -> None:
    """Two bits lose the accuracy, so that the data are looked at; they are right."""
    looked: list[Any] = []

    class Looking(LayerComparison):
        def analyse_start(self, *args: Any) -> None:
            looked.append(self.foreign)
            super().analyse_start(*args)

    change, kind = HEALTHY[case]
    run(tmp_path, model(change, kind), Looking(), bits="int2")
    assert looked == [None]
    assert "calibration data" not in (tmp_path / "lightning_qat" / "calibrated_diagnosis.csv").read_text()


def test_batches_that_come_once_are_left_to_the_run(tmp_path: Path) -> None:
    """The training data are a stream; then the validation data say that calibration got others."""

    class Streamed(Prepared):
        def train_dataloader(self) -> Any:
            return stream

    stream = iter(list(Prepared().train_dataloader())[:6])
    comparison = LayerComparison()
    run(tmp_path, model(lambda x: x / 500, Streamed), comparison)
    assert comparison.foreign is not None
    assert comparison.foreign.stage == "validate"
    assert len(list(stream)) >= 3  # two were trained on, and one is fetched ahead


def test_good_calibration_is_not_asked_for_its_data(tmp_path: Path) -> None:
    comparison = LayerComparison()
    run(tmp_path, model(), comparison)
    assert isinstance(comparison, EarlyAnalysis)
    assert comparison.calibration_loss == ""


def test_moments_are_those_of_the_float_model() -> None:
    """Against torch, on the float values; training mode, dropout and scales do not count."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))
    batches = [torch.randn(16, 4), torch.randn(16, 4) + 1]
    inner: list[Tensor] = []
    net.eval()
    with torch.no_grad():
        inner += [net[:4](batch) for batch in batches]
    region = insert(net, (batches[0],))
    calibrate(region, [torch.zeros(16, 4)])
    net.train()
    found = moments_of(region, [Call.of(batch) for batch in batches])
    for name, values in (("0.input0", batches), ("3.output", inner)):
        expected = Moments(
            tuple(float(v.double().mean()) for v in values),
            tuple(float(v.double().std(correction=0)) for v in values),
        )
        assert found[name].means == pytest.approx(expected.means, rel=1e-5)
        assert found[name].deviations == pytest.approx(expected.deviations, rel=1e-5)
    assert not [name for name in found if name.endswith("weight")]
    assert net.training


def two_views(x: Tensor) -> Tensor:
    x = (x - MEAN) / STD
    return torch.stack([x, 0.9 * x], 1)


class TwoViews(Prepared):
    """Each training sample is two views of an image; the validation step fails on that with a RuntimeError."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0].flatten(0, 1)), batch[1].repeat_interleave(2))

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(two_views, 0, 1200, shuffle=True)


class Refusing(TwoViews):
    """Sibling: its validation step checks the shape itself, and its training step needs the run."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        if not self.training:
            raise RuntimeError("training only")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if batch[0].dim() != 4:
            raise ValueError("one view")
        super().validation_step(batch, batch_idx)


class Unreadable(Prepared):
    """Sibling: the step cannot read the calibration data any more, so that no worst points are known either."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if batch[0].abs().max() < 0.1 and is_calibrated(self):
            raise RuntimeError("too small")
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [TwoViews, Refusing])
@pytest.mark.parametrize("foreign", [True, False])
@pytest.mark.filterwarnings("ignore:PipelineCheck")
def test_data_that_the_step_cannot_read_are_left_out(foreign: bool, kind: type[Prepared], tmp_path: Path) -> None:
    """The validation data still tell whether calibration got others, and the check gives its verdict."""

    def change(x: Tensor) -> Tensor:
        return (x - MEAN) / STD / (255 if foreign else 1)

    check, comparison = PipelineCheck(batches=2), LayerComparison()
    run(tmp_path, model(change, kind), check, comparison, bits="int8" if foreign else "int2")
    assert check.result is not None
    assert check.result.verdict != "cannot tell"
    assert comparison.calibration_loss
    early = json.loads((tmp_path / "lightning_qat" / "calibrated_diagnosis.json").read_text())
    assert ("Calibration data are not the validation data" in check.result.note) == foreign
    assert early.get("calibration", "").startswith("Calibration data are not the validation data") == foreign


@pytest.mark.filterwarnings("ignore:PipelineCheck")
def test_calibration_data_that_the_step_cannot_read_any_more_are_not_compared(tmp_path: Path) -> None:
    check = PipelineCheck(batches=2)
    run(tmp_path, model(lambda x: (x - MEAN) / STD / 255, Unreadable), check)
    assert check.result is not None
    assert check.result.verdict != "cannot tell"
    assert "Calibration data" not in check.result.note


@pytest.mark.filterwarnings(ZERO, "ignore:PipelineCheck")
def test_callbacks_share_the_comparison_of_the_same_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[str] = []
    original = calibration_data._moments

    def counted(trainer: Any, pl_module: Any, regions: Any, stage: Any) -> Any:
        made.append(stage)
        return original(trainer, pl_module, regions, stage)

    monkeypatch.setattr(calibration_data, "_moments", counted)
    comparison, sensitivity = LayerComparison(), SensitivityAnalysis()
    run(tmp_path, model(torch.zeros_like), PipelineCheck(batches=2), sensitivity, comparison)
    assert made == ["calibration", "train", "validate"]
    assert comparison.foreign is sensitivity.foreign is not None
