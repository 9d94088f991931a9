"""Steps that call the target in a mode of its own: each call is traced in the mode it was made in.

Siblings: targets only in training, a dictionary of losses in training and a list in evaluation, a validation loader
with batches of one and batch norm on one value, batches of calibration that are larger than those of validation, a
training step that cannot run before training.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_qat.quantization.region.region import find_regions
from tests.harness.classifier import Classifier, dataset
from tests.harness.state import only_region
from tests.harness.trainers import qat_trainer


class Pooled(nn.Module):
    """The head has one value per channel and sample; only training has targets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 4)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        if self.training and targets is None:
            raise ValueError("in training mode, targets should be passed")
        logits = self.head(self.pool(F.relu(self.conv(images))).flatten(1))
        if self.training:
            return {"classes": F.cross_entropy(torch.tanh(logits), targets)}  # type: ignore[arg-type]
        return [{"scores": row.softmax(0)} for row in logits]


class Detection(Classifier):
    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.net = Pooled()  # type: ignore[assignment]
        self.size = size

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = sum(self.net(*batch).values())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scores = torch.stack([found["scores"] for found in self.net(batch[0])])
        self.log("val_loss", F.nll_loss(scores.log(), batch[1]))

    def val_dataloader(self) -> Any:
        return DataLoader(dataset(6), self.size)


@pytest.mark.parametrize("size", [1, 2])
def test_targets_only_in_training_and_batches_of_one_in_validation(tmp_path: Path, size: int) -> None:
    module = Detection(size)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not seen while tracing")
        qat_trainer(tmp_path, max_epochs=2).fit(module)
    region = only_region(module)
    assert list(find_regions(module)) == ["net"]
    assert not region.unplanned  # calibration has batches of eight, one softmax for each of their samples
    assert {op.kind for op in region.graph.ops if op.train_only} == {"tanh", "cross_entropy", "add"}
    assert {f"softmax_{i}.output" for i in range(8)} <= set(region.points)


class LateTraining(Detection):
    """Its training step cannot run before training."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.weight = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return self.weight * super().training_step(batch, batch_idx)


def test_train_mode_false_leaves_training_steps_alone(tmp_path: Path) -> None:
    module = LateTraining()
    with pytest.warns(UserWarning, match="tanh at .* was not seen while tracing"):
        qat_trainer(tmp_path, qat={"train_mode": False}).fit(module)
    assert module.calls == 4
    assert "tanh" not in {op.kind for op in only_region(module).graph.ops}
