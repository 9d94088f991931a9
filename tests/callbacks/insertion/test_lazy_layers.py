"""Layers that take their shape from the first input work as they do without us.

Siblings: linear, convolution, batch norm (parameters and buffers), a layer that only training reaches, init_from,
resuming, loading without a Trainer, a pass over a float model, insertion without a Trainer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat import Calibration, PipelineFingerprint, QuantizationAwareTraining, insert
from lightning_qat.callbacks.insertion.quantized_checkpoint import load_quantized
from lightning_qat.quantization.errors import TracingError
from tests.harness.classifier import Classifier
from tests.harness.state import only_region
from tests.harness.trainers import float_checkpoint, qat_trainer, trainer

IMAGES = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def lazy_net() -> nn.Sequential:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))


class Lazy(Classifier):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.net = lazy_net()  # type: ignore[assignment]
        self.auxiliary = nn.LazyLinear(4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        return F.cross_entropy(logits, batch[1]) + F.cross_entropy(self.auxiliary(logits), batch[1])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:.*uninitialized parameters")
class TestLazyLayers:
    def test_they_are_quantized_and_train(self, tmp_path: Path) -> None:
        module = Lazy()
        statistics: list[Tensor] = []
        module.on_fit_start = lambda: statistics.append(module.net[1].running_mean.clone())  # type: ignore
        qat_trainer(tmp_path).fit(module)
        region = only_region(module)
        assert set(region.points) == {"0.input0", "0.weight", "2.output", "4.weight"}
        assert {op.kind for op in region.graph.ops if op.role != "pass"} <= {
            "conv2d",
            "batch_norm",
            "relu",
            "linear",
            "add",
        }
        assert type(module.auxiliary) is nn.Linear
        assert torch.equal(statistics[0], torch.zeros(4))  # tracing has left the statistics alone

    def test_checkpoints_are_read_in_every_way(self, tmp_path: Path) -> None:
        module = Lazy()
        run = qat_trainer(tmp_path, qat={"init_from": str(float_checkpoint(tmp_path, Lazy()))})
        run.fit(module)
        run.save_checkpoint(tmp_path / "q.ckpt")
        expected = module.eval()(IMAGES)
        assert torch.equal(load_quantized(Lazy, tmp_path / "q.ckpt")(IMAGES), expected)
        validated = Lazy()
        trainer(tmp_path, QuantizationAwareTraining(), Calibration()).validate(
            validated, ckpt_path=str(tmp_path / "q.ckpt"), verbose=False
        )
        assert torch.equal(validated.eval()(IMAGES), expected)
        resumed = Lazy()
        qat_trainer(tmp_path, max_epochs=2).fit(resumed, ckpt_path=str(tmp_path / "q.ckpt"))
        assert resumed.global_step > module.global_step - 1

    def test_a_pass_over_a_float_model_takes_them(self, tmp_path: Path) -> None:
        trainer(tmp_path, PipelineFingerprint(), num_sanity_val_steps=0).fit(Lazy())

    def test_without_a_trainer(self) -> None:
        region = insert(lazy_net(), (IMAGES,))
        assert [op.kind for op in region.graph.ops if not op.train_only] == [
            "conv2d",
            "batch_norm",
            "relu",
            "flatten",
            "linear",
        ]
        with pytest.raises(TracingError, match="on the example batch in eval mode failed"):
            insert(lazy_net(), (torch.ones(3),))
