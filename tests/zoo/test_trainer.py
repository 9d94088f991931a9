"""The usual way to wrap them: a LightningModule whose step calls ``self.model(**batch)``; the target is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_qat import Calibration, QuantizationAwareTraining
from lightning_qat.quantization.region.region import find_regions
from tests.zoo.models import ZOO, ZooModel

pytest.importorskip("transformers", reason="transformers needs Python 3.11 or newer")


class Wrapped(LightningModule):
    """Any model that returns its loss."""

    def __init__(self, zoo_model: ZooModel) -> None:
        super().__init__()
        self.model = zoo_model.make().train()

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("name", ["BERT", "ViT"])
def test_fit_with_callbacks_only(name: str, tmp_path: Path) -> None:
    """issue 3: nothing about the model has to be said."""
    module = Wrapped(ZOO[name])
    samples: list[dict[str, Any]] = [
        {key: value[i] for key, value in batch.items()} for batch in ZOO[name].batches(2, 4) for i in range(4)
    ]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[QuantizationAwareTraining(), Calibration(batches=2)],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(samples, 4), DataLoader(samples, 4))
    regions = find_regions(module)
    assert list(regions) == ["model"]
    assert regions["model"].unplanned == {}
    assert regions["model"].is_calibrated
    assert all(f.scale_source is not None for f in regions["model"].points.values())
    assert torch.isfinite(trainer.callback_metrics["val_loss"])
    assert (tmp_path / "lightning_qat" / "quant_plan.json").exists()
