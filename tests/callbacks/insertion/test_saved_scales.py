"""What is saved has the scales of the weights it is saved with, and saving changes nothing of the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor

from lightning_qat.callbacks.insertion.quantized_checkpoint import load_quantized
from tests.harness.classifier import Classifier, dataset
from tests.harness.state import assert_same, only_region
from tests.harness.trainers import qat_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
AVERAGES: dict[str, Any] = {
    "none": list,
    "EMA": lambda: [EMAWeightAveraging(decay=0.9)],
    "EMA with buffers": lambda: [EMAWeightAveraging(decay=0.9, use_buffers=True)],
    "SWA": lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)],
}
EVERY_STEP: dict[str, Any] = {"every_n_train_steps": 1, "save_top_k": -1}


def trained(path: Path, *callbacks: Callback, qat: dict[str, Any] | None = None, **kwargs: Any) -> Classifier:
    torch.manual_seed(0)
    module = Classifier()
    settings = {"max_epochs": 3, "limit_train_batches": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0, **kwargs}
    qat_trainer(path, *callbacks, qat=qat or {}, **settings).fit(module)
    return module


def planned_scales(path: Path) -> dict[str, Any]:
    document = json.loads((path / "lightning_qat" / "quant_plan.json").read_text())
    return {point["name"]: point["scale"] for point in document["regions"]["net"]["points"]}


@pytest.mark.parametrize("averages", AVERAGES)
@pytest.mark.parametrize("validates", [False, True])
def test_plan_of_a_finished_training_has_the_scales_of_its_weights(
    tmp_path: Path, averages: str, validates: bool
) -> None:
    """quant_plan.json is what a converter reads: per channel the largest magnitude by 127."""
    module = trained(tmp_path, *AVERAGES[averages](), limit_val_batches=int(validates))
    planned = planned_scales(tmp_path)
    for name in ("conv1", "conv2", "head"):
        weight: Tensor = module.net.get_parameter(f"{name}.weight").detach()
        expected = weight.abs().flatten(1).amax(dim=1) / 127
        torch.testing.assert_close(torch.tensor(planned[f"{name}.weight"]), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("averages", ["none", "EMA", "EMA with buffers"])
@pytest.mark.parametrize("validates", [False, True])
def test_checkpoint_gives_what_the_model_in_memory_gives(tmp_path: Path, averages: str, validates: bool) -> None:
    images = dataset().tensors[0]
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    module = trained(tmp_path, *AVERAGES[averages](), checkpoint, limit_val_batches=int(validates))
    with torch.no_grad():
        expected = module.eval().net(images)
        assert torch.equal(load_quantized(Classifier, tmp_path / "last.ckpt").net(images), expected)


@pytest.mark.filterwarnings("ignore:weight decay pulls", "ignore:learned scales that are less than 2 steps")
@pytest.mark.parametrize(
    "qat",
    [
        {},
        {"freeze_observers_after": 1},
        {"freeze": {"conv1": 1}},
        {"weight_scales": "fixed"},
        {"activation_scales": "ema"},
        {"activation_scales": "learned", "weight_scales": "learned"},
    ],
    ids=str,
)
def test_saving_after_every_step_changes_no_bit_of_the_training(tmp_path: Path, qat: dict[str, Any]) -> None:
    """Neither does a plan that is written in between."""
    alone = trained(tmp_path / "a", qat=qat)
    saved = trained(tmp_path / "b", ModelCheckpoint(tmp_path / "b", **EVERY_STEP), qat=qat)
    assert len(list((tmp_path / "b").glob("*.ckpt"))) == 6
    for module in (alone, saved):
        only_region(module).scales.refresh_weights()
    states = [{k: v for k, v in m.state_dict().items() if isinstance(v, Tensor)} for m in (alone, saved)]
    assert_same(*states)
