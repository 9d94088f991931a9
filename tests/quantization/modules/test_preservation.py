"""Extra forwards put back what they touch, whatever kind of buffer it is."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_qat.quantization.modules.module_walk import modules_and_regions
from lightning_qat.quantization.modules.preservation import preserved
from lightning_qat.quantization.region.insertion import insert


class Graph(nn.Module):
    """A graph convolution with a sparse adjacency matrix, which its forward changes."""

    adjacency: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(4).to_sparse())
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.adjacency.mul_(2)
        return self.linear(torch.sparse.mm(self.adjacency, x))


def test_sparse_buffer_is_put_back() -> None:
    model = Graph()
    buffer = model.adjacency
    insert(model, (torch.randn(4, 3),))
    assert model.adjacency is buffer
    assert torch.equal(buffer.to_dense(), torch.eye(4))


def test_model_without_memory_is_inserted() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    region = insert(model, (torch.empty(2, 4, device="meta"),))
    assert {"linear", "batch_norm"} <= {op.kind for op in region.graph.ops}


def test_everything_is_put_back_after_an_exception() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())
    model[1].eval()
    mean = model[0].running_mean
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    def forward() -> None:
        with preserved(model):
            model.train()
            model(torch.randn(8, 4))
            random.random()
            np.random.rand()
            model[0].running_mean = torch.ones(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forward()
    assert model[0].running_mean is mean
    assert torch.equal(mean, torch.zeros(4))
    assert [m.training for m in model.modules()] == [True, True, False]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_walk_is_that_of_torch_but_for_the_inside_of_regions() -> None:
    shared = nn.Linear(4, 4)
    inner = nn.Sequential(nn.ModuleDict({"a": shared, "b": nn.ReLU()}).a, nn.Linear(4, 4))
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), inner, shared)
    model.register_module("nothing", None)
    assert list(modules_and_regions(model)) == list(model.named_modules())
    insert(inner, (torch.ones(1, 4),))
    expected = [(n, m) for n, m in model.named_modules() if "._quantization." not in n]
    assert list(modules_and_regions(model)) == expected
    assert "1._quantization" in dict(expected)
