"""Extra forwards put back what they touch, whatever kind of buffer it is."""

from __future__ import annotations

import random
from collections.abc import Callable

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


class Codebook(nn.Module):
    """Its codes follow the vectors in training, as in VQ-VAE."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.codes = nn.Linear(4, 4), nn.Parameter(torch.eye(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        nearest = torch.cdist(x, self.codes).argmin(1)
        if self.training:
            self.codes.data.index_copy_(0, nearest, x.detach())
        return self.codes[nearest]


class Momentum(nn.Module):
    """Its second encoder follows the first, as in MoCo."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.slow = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            for slow, online in zip(self.slow.parameters(), self.online.parameters(), strict=True):
                slow.data = 0.9 * slow.data + 0.1 * online.data
        return self.online(x) * self.slow(x)


@pytest.mark.parametrize("make", [Codebook, Momentum, lambda: nn.Embedding(4, 4, max_norm=0.1)])
def test_inserting_leaves_parameters_that_a_forward_in_train_mode_writes(make: Callable[[], nn.Module]) -> None:
    """The traced forwards moved the codes of a VQ-VAE: after ``insert``, and after removal, it was another model."""
    torch.manual_seed(0)
    model = make()
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    x = torch.arange(3) if isinstance(model, nn.Embedding) else torch.randn(3, 4)
    insert(model, (x,)).remove()
    for name, parameter in model.named_parameters():
        address, content = before[name]
        assert parameter.data_ptr() == address, name
        assert torch.equal(parameter, content), name


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
