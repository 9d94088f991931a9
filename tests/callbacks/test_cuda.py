"""A Trainer on a GPU. Not run where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_qat
from tests.callbacks.test_unwritable import all_callbacks
from tests.harness.classifier import Classifier
from tests.harness.state import only_region, scales
from tests.harness.trainers import qat_trainer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]
IMAGES = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


class Calm(Classifier):
    def __init__(self) -> None:
        super().__init__(lr=0.005)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("qat", [{}, {"activation_scales": "ema"}, {"activation_scales": "learned"}], ids=str)
def test_cuda_trains_in_every_precision(tmp_path: Path, precision: Any, qat: dict[str, Any]) -> None:
    """With all callbacks; the checkpoint gives the same model on the CPU."""
    seed_everything(0, verbose=False)
    module = Calm()
    callbacks = [*all_callbacks(), ModelCheckpoint(tmp_path, filename="cuda")]
    run = qat_trainer(tmp_path, *callbacks, qat=qat, accelerator="gpu", precision=precision, max_epochs=2)
    run.fit(module)
    assert only_region(module).is_calibrated
    assert {scale.dtype for scale in scales(module).values()} == {torch.float32}
    assert float(run.callback_metrics["val_loss"]) < 2
    assert {"sensitivity.csv", "layer_statistics.csv", "layer_comparison.csv", "report.html"} <= {
        path.name for path in (tmp_path / "lightning_qat").iterdir()
    }
    loaded = lightning_qat.load_quantized(Classifier, tmp_path / "cuda.ckpt")
    assert loaded(IMAGES.to(next(loaded.parameters()))).isfinite().all()


def test_cuda_and_cpu_calibrate_alike(tmp_path: Path) -> None:
    found = []
    for accelerator in ("cpu", "gpu"):
        seed_everything(0, verbose=False)
        module = Calm()
        qat_trainer(tmp_path / accelerator, accelerator=accelerator).validate(module, verbose=False)
        found.append({name: scale.cpu() for name, scale in scales(module).items()})
    for name, scale in found[0].items():
        assert torch.allclose(found[1][name], scale, rtol=1e-2), name


def test_cuda_compiled_by_the_callback(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    run = qat_trainer(tmp_path, qat={"compile": True}, accelerator="gpu", max_epochs=2)
    run.fit(Calm())
    assert float(run.callback_metrics["val_loss"]) < 2
