"""Fingerprints of real runs: the same pipeline has no difference, a sabotaged one has its name (C5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.fingerprint.fingerprint_differences import compare_fingerprints
from lightning_qat.callbacks.pipeline_fingerprint import FILE_NAME, PipelineFingerprint, take_fingerprint
from tests.harness.small_digits import Digits, digits, float_weights, pretrained
from tests.harness.trainers import qat_trainer, quiet


class AtStart(Callback):
    """Takes the fingerprint before the first step."""

    def __init__(self) -> None:
        self.fingerprint = Fingerprint()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fingerprint = take_fingerprint(trainer, pl_module, batches=6)


def at_start(directory: Path, model: Digits, seed: int = 0, load: bool = True, **kwargs: Any) -> Fingerprint:
    if load:
        model.load_state_dict(float_weights())
    seed_everything(seed, verbose=False)
    callback = AtStart()
    settings = quiet() | {"max_epochs": 1, "limit_train_batches": 6, "limit_val_batches": 1.0} | kwargs
    Trainer(callbacks=[callback], default_root_dir=directory, **settings).fit(model)
    return callback.fingerprint


class Rolled(Digits):
    """Labels that belong to other images."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return super().training_step((batch[0], batch[1].roll(1)), batch_idx)


class OtherLabels(Digits):
    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = digits()
        return DataLoader(TensorDataset(images[:1200], (labels[:1200] + 3) % 7), batch_size=64, drop_last=True)


class Tripled(Digits):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return 3 * super().training_step(batch, batch_idx)


class Destroyed(Digits):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return super().training_step((batch[0] * 0 + 5, batch[1]), batch_idx)


class FrozenNorm(Digits):
    def on_fit_start(self) -> None:
        self.bn1.eval()


@pytest.mark.parametrize("seed", range(3))
def test_same_pipeline_differs_in_nothing(seed: int, tmp_path: Path) -> None:
    """C5: other shuffling is no difference."""
    differences = compare_fingerprints(at_start(tmp_path, Digits()), at_start(tmp_path, Digits(), seed))
    assert differences.rows == ()


@pytest.mark.filterwarnings("ignore:Found 1 module")  # Lightning sees the batch norm in eval mode as well
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Digits(normalized_in_training=False), "model input (train), model.0: mean"),
        (lambda: Digits(lr=0.1), "lr: 0.001 -> 0.1: higher than in float training"),
        (Rolled, "loss train_loss (batch norm in eval) of the untouched float model"),
        (OtherLabels, "of the labels are distributed differently"),
        (Tripled, ": scaled by 3?"),
        (Destroyed, "constant here: the input is destroyed?"),
        (FrozenNorm, "in eval mode while training, only here: bn1"),
    ],
    ids=["normalization", "learning rate", "rolled", "labels", "loss", "input", "mode"],
)
def test_sabotage_has_its_name(model: Any, words: str, tmp_path: Path) -> None:
    """C5."""
    reference = at_start(tmp_path, Digits())
    differences = compare_fingerprints(reference, at_start(tmp_path, model()))
    assert any(words in row.what for row in differences.strong), differences.note


def test_wrong_checkpoint_explains_the_rest(tmp_path: Path) -> None:
    """C5."""
    seed_everything(1, verbose=False)
    differences = compare_fingerprints(at_start(tmp_path, Digits()), at_start(tmp_path, Digits(), load=False))
    assert [row.part for row in differences.strong] == ["weights"]
    assert any("so this follows" in row.what for row in differences.rows)


def test_float_run_writes_a_file_that_qat_compares_with(tmp_path: Path) -> None:
    """C5: made at the end of the float run, with its final weights and its initial learning rate."""
    seed_everything(0, verbose=False)
    callback = PipelineFingerprint(batches=6)
    model = Digits(lr=0.01)
    trainer = Trainer(callbacks=[callback], default_root_dir=tmp_path, **(quiet() | {"max_epochs": 2}))
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    stored = Fingerprint.from_json(tmp_path / "lightning_qat" / FILE_NAME)
    assert stored == callback.fingerprint
    assert stored.optimizers[0]["groups"][0]["lr"] == 0.01
    qat = AtStart()
    fresh = Digits(lr=0.001)
    fresh.load_state_dict(torch.load(tmp_path / "float.ckpt", weights_only=True)["state_dict"])
    qat_trainer(tmp_path / "qat", qat, limit_train_batches=6, limit_val_batches=1.0).fit(fresh)
    differences = compare_fingerprints(stored, qat.fingerprint)
    assert differences.strong == ()
    assert any("as is usual in QAT" in row.what for row in differences.rows)


def test_training_is_bit_identical_with_and_without(tmp_path: Path) -> None:
    """Analysis leaves no trace, neither at the start nor at the end."""

    def trained(*callbacks: Callback) -> dict[str, Tensor]:
        model = pretrained()
        seed_everything(0, verbose=False)
        Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **(quiet() | {"max_epochs": 1})).fit(model)
        return model.state_dict()

    with_both = trained(AtStart(), PipelineFingerprint(batches=2))
    for one, other in zip(trained().values(), with_both.values(), strict=True):
        assert torch.equal(one, other)
