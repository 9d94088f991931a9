"""The script of the bird's-eye-view example fits a batch, in float and quantized."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from examples.bev.configuration import callback, read, without, write
from examples.bev.data import BevDataModule
from examples.bev.main import main
from examples.bev.module import BevModule
from lightning_qat import Calibration, QuantizationAwareTraining
from lightning_qat.quantization.region.region import find_regions


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int16"])
def test_fits_a_batch(tmp_path: Path, quantized: bool) -> None:
    seed_everything(0)
    qconfig = {"activation": {"dtype": "int16"}, "weight": {"dtype": "int16"}}
    callbacks: list[Callback] = [QuantizationAwareTraining(qconfig), Calibration(batches=1)] if quantized else []  # type: ignore[arg-type]
    losses = _Losses()
    trainer = Trainer(
        max_epochs=4, callbacks=[*callbacks, losses], default_root_dir=tmp_path, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        check_val_every_n_epoch=4,
    )  # fmt: skip
    module = BevModule(warm_up=0.2)
    trainer.fit(module, datamodule=BevDataModule(8, 8, 8, folder=None))
    assert losses.seen[-1] < 0.85 * losses.seen[0]
    assert {"dynamic", "static", "val_loss"} <= set(trainer.callback_metrics)
    assert bool(find_regions(module)) == quantized


class _Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:  # type: ignore[override]
        self.seen.append(float(trainer.callback_metrics["train_loss"]))


def test_the_network_answers_for_a_batch_that_lacks_a_camera() -> None:
    module = BevModule().eval()
    data = BevDataModule(4, 64, 32, folder=None)
    data.setup()
    batches = list(data.val_dataloader())
    assert [batch.images.shape[1] for batch in batches] == [4, 3]  # type: ignore[attr-defined]
    found = module.detect(batches[1].images.float(), batches[1])  # type: ignore[attr-defined,arg-type]
    assert found["map"][-1]["points"].shape == (32, 6, 8, 2)
    assert torch.isfinite(found["obstacles"][-1]["places"]).all()


def test_the_configurations_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a few scenes, and the analyses left out: those of faults.yaml are parts of the story."""
    configs = Path(__file__).parents[3] / "examples" / "bev" / "configs"
    analyses = ("SensitivityAnalysis", "LayerComparison", "AccuracyTable", "ConvergenceMonitor")
    for name in ("float", "faults"):
        settings = without(read(configs / f"{name}.yaml"), *analyses)
        settings["data"] = {"train_scenes": 4, "val_scenes": 4, "batch_size": 4, "folder": str(tmp_path)}
        settings["trainer"] |= {
            "max_epochs": 1,
            "default_root_dir": str(tmp_path / "logs" / name),
            "enable_progress_bar": False,
        }
        settings["trainer"]["logger"] = False
        callback(settings, "ModelCheckpoint")["dirpath"] = str(tmp_path / name)
        if name == "faults":
            callback(settings, "QuantizationAwareTraining")["init_from"] = str(tmp_path / "float" / "float.ckpt")
        config = write(settings, tmp_path / f"{name}.yaml")
        monkeypatch.setattr(sys, "argv", ["main.py", "fit", f"--config={config}"])
        main()
        assert (tmp_path / name / f"{name}.ckpt").exists()
