"""Gradient checkpointing as `transformers` does it: in training only, by a decorator of the layers (foundation 4)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_qat.quantization.region.calibration import calibrate
from tests.zoo.models import ZOO, ZooModel, inputs

pytest.importorskip("transformers", reason="transformers needs Python 3.11 or newer")

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def without_dropout(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return model


def quantized_step(zoo_model: ZooModel, model: nn.Module, when: str, reentrant: bool) -> list[torch.Tensor]:
    """Gradients of one int8 training step, with checkpointing from before or after the insertion, or never."""
    if when == "before":
        model.activation_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    region = zoo_model.insert(model)
    batch = zoo_model.batches(1, 3)[0]
    calibrate(region, [inputs(batch)])
    if when == "after":
        model.activation_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    model.train()
    zoo_model.loss(model, batch).backward()
    assert region.unplanned == {}
    return [p.grad for p in model.parameters() if p.grad is not None]


@REENTRANT
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["BERT", "Llama", pytest.param("ViT", marks=pytest.mark.full)])
def test_gradients_are_those_without_checkpointing(name: str, when: str, reentrant: bool) -> None:
    """foundation 4: bit for bit, whenever it is switched on."""
    model = without_dropout(ZOO[name].make())
    expected = quantized_step(ZOO[name], copy.deepcopy(model), "never", reentrant)
    found = quantized_step(ZOO[name], model, when, reentrant)
    assert len(found) == len(expected) > 10
    for gradient, other in zip(found, expected, strict=True):
        assert torch.equal(gradient, other)
