"""The main job on real data reaches its accuracy (foundation 6). Seeds are fixed."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

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


LEARNED: dict[str, Any] = {"activation_scales": "learned", "weight_scales": "learned"}


def test_int4_weights_with_learned_scales_are_within_1_5_points(
    float_accuracy: float, digits_float_checkpoint: Path, tmp_path: Path
) -> None:
    """LSQ: int4 weights, int8 activations."""
    pl.seed_everything(0)
    qat = QuantizationAwareTraining(
        {"weight": {"dtype": "int4"}, "activation": {"dtype": "int8"}},
        init_from=str(digits_float_checkpoint),
        **LEARNED,
    )
    run = trainer(tmp_path, [qat, Calibration(epochs=1)], max_epochs=3)
    module = DigitsClassifier(lr=4e-4)
    run.fit(module, datamodule=DigitsDataModule())
    assert accuracy(run, module) >= float_accuracy - 1.5


def test_learned_scales_beat_fixed_ones_at_4_bits(tmp_path: Path) -> None:
    """LSQ: int4 weights and activations, the same seeds, epochs and calibration; a narrow model, which has less to
    spare; mean over three seeds on the 720 images that are not trained on."""
    pl.seed_everything(0)
    settings = {"num_sanity_val_steps": 0, "limit_val_batches": 0}
    run = trainer(tmp_path, [], max_epochs=15, **settings)
    run.fit(DigitsClassifier(width=4), datamodule=DigitsDataModule())
    run.save_checkpoint(tmp_path / "narrow.ckpt")
    data = DigitsDataModule()
    data.setup()
    parts = [data.val_set.tensors, data.test_set.tensors]
    images, labels = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    results: dict[str, list[tuple[float, float]]] = {"fixed": [], "learned": []}
    for kind, found in results.items():
        for seed in range(3):
            pl.seed_everything(seed)
            qat = QuantizationAwareTraining(
                {
                    "weight": {"dtype": "int4"},
                    "activation": {"dtype": "int4", "observer": "minmax", "scheme": "symmetric"},
                },
                init_from=str(tmp_path / "narrow.ckpt"),
                activation_scales=kind,
                weight_scales=kind,
            )
            module = DigitsClassifier(width=4, lr=2e-3, scale_lr_factor=3.0)
            callbacks: list[pl.Callback] = [qat, Calibration(epochs=1)]
            trainer(tmp_path, callbacks, max_epochs=8, **settings).fit(module, datamodule=DigitsDataModule())
            with torch.no_grad():
                logits = module.eval()(images)
            correct = (logits.argmax(1) == labels).float().mean()
            found.append((100 * float(correct), float(F.cross_entropy(logits, labels))))
    for learned, fixed in zip(results["learned"], results["fixed"], strict=True):
        assert learned[1] < fixed[1], results
    accuracies = {kind: statistics.fmean(found[0] for found in runs) for kind, runs in results.items()}
    assert accuracies["learned"] > accuracies["fixed"], results
