"""The main job on real data reaches its accuracy (foundation 6). Seeds are fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from examples.digits import DigitsClassifier, DigitsDataModule
from lightning_qat import Calibration, QuantizationAwareTraining


def trainer(root: Path, callbacks: list[pl.Callback], **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=callbacks,
        **kwargs,
    )


def accuracy(run: pl.Trainer, module: pl.LightningModule) -> float:
    return 100 * float(run.test(module, datamodule=DigitsDataModule(), verbose=False)[0]["test_acc"])


@pytest.fixture(scope="module")
def float_accuracy(digits_float_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    module = DigitsClassifier.load_from_checkpoint(digits_float_checkpoint, weights_only=True)
    return accuracy(trainer(tmp_path_factory.mktemp("float"), []), module)


def test_float_digits_reaches_97_percent(float_accuracy: float) -> None:
    """Foundation 6."""
    assert float_accuracy >= 97.0


def test_int16_calibration_alone_is_within_0_2_points(
    float_accuracy: float, digits_float_checkpoint: Path, tmp_path: Path
) -> None:
    """Foundation 6, D1: post-training quantization is one Trainer call."""
    pl.seed_everything(0)
    qat = QuantizationAwareTraining(
        {"activation": {"dtype": "int16"}, "weight": {"dtype": "int16"}}, init_from=str(digits_float_checkpoint)
    )
    assert accuracy(trainer(tmp_path, [qat, Calibration(epochs=1)]), DigitsClassifier()) >= float_accuracy - 0.2


def test_int8_qat_is_within_half_a_point(float_accuracy: float, digits_float_checkpoint: Path, tmp_path: Path) -> None:
    """Foundation 6: int8 weights and activations after a short QAT."""
    pl.seed_everything(0)
    qat = QuantizationAwareTraining(init_from=str(digits_float_checkpoint))
    run = trainer(tmp_path, [qat, Calibration(epochs=1)], max_epochs=5)
    module = DigitsClassifier(lr=4e-4)
    run.fit(module, datamodule=DigitsDataModule())
    assert accuracy(run, module) >= float_accuracy - 0.5
