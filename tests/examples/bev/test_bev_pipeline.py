"""Training that forgets to divide its images by 255: found, named and mended by what the pipeline check says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from examples.bev.data import BevDataModule
from examples.bev.module import BevModule
from examples.bev.reports import DIVISION, Reports
from lightning_qat import Calibration, PipelineCheck, PipelineFingerprint, QuantizationAwareTraining


def fit(folder: Path, module: BevModule, *callbacks: Callback, epochs: int = 1) -> Reports:
    """Train in two batches of scenes, and validate in the end on two of others; return the reports."""
    trainer = Trainer(
        max_epochs=epochs, callbacks=list(callbacks), default_root_dir=folder, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs,
    )  # fmt: skip
    trainer.fit(module, datamodule=BevDataModule(16, 16, 8, folder=None))
    return Reports(folder / "lightning_qat")


@pytest.mark.filterwarnings("ignore:.*PipelineCheck.")
def test_training_that_forgets_to_divide_is_found_by_its_input_and_mended(tmp_path: Path) -> None:
    """C4, C5: a network that knows a few scenes by heart has a loss that too bright images ruin.

    That its metrics collapse too, needs a network that is trained: the story shows it.
    """
    torch.manual_seed(0)
    module = BevModule(width=8, lr=5e-3, warm_up=0.2)
    fit(tmp_path / "float", module, PipelineFingerprint(batches=2), epochs=30)
    reference = str(tmp_path / "float" / "lightning_qat" / "pipeline_fingerprint.json")

    def checked(**arguments: str) -> Reports:
        tuned = BevModule(width=8, lr=2e-4, warm_up=0.2, **arguments)  # type: ignore[arg-type]
        tuned.load_state_dict(module.state_dict())
        quantization = QuantizationAwareTraining({"activation": {"dtype": "int16"}, "weight": {"dtype": "int16"}})  # type: ignore[arg-type]
        check = PipelineCheck(reference, batches=2, rungs=[2])
        return fit(tmp_path / arguments["training_images"], tuned, quantization, Calibration(batches=1), check)

    found = checked(training_images="bytes")
    assert found.blames_training_images()
    mended = checked(**DIVISION)
    assert mended.content("pipeline_check")["verdict"] == "healthy"
    assert not mended.blames_training_images()
