"""Modules that keep their data as attributes: a pass in between needs no room for a copy, and says what it costs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, Metric, SumMetric

from lightning_qat.callbacks.preservation.module_copy import copied_module
from lightning_qat.callbacks.preservation.module_state import preserved_attributes, preserved_loader_state

LARGE = 2**28 + 8
"""Bytes; memory that is never written to takes no room."""


class Images:
    """A data set as people write it."""

    def __init__(self, images: Any) -> None:
        self.images = images
        self.labels = [0] * 100


def of(value: Any) -> Any:
    module: Any = nn.Linear(2, 2)
    module.kept = value
    return module


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda data: data,
    "in an object": Images,
    "in a list": lambda data: [data],
    "in parts": lambda data: list(np.split(data, 8)),
    "as a TensorDataset": lambda data: TensorDataset(torch.from_numpy(data)),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_data_are_neither_saved_nor_copied(holder: str) -> None:
    module = of(HOLDERS[holder](np.zeros(LARGE, dtype=np.uint8)))
    tracemalloc.start()
    try:
        with preserved_attributes(module):
            copied_module(module)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_file_that_is_mapped_for_reading_is_never_read(tmp_path: Path) -> None:
    """It may be larger than the memory: this one is a hole of 1 TiB."""
    path = tmp_path / "images.bin"
    with path.open("wb") as file:
        file.truncate(2**40)
    module = of(Images(np.memmap(path, dtype=np.uint8, mode="r")))
    small = module.small = np.zeros(2)
    with preserved_attributes(module):
        copy = copied_module(module)
        small += 1
    assert copy.kept.images is module.kept.images
    assert small.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("trains", [True, False])
def test_weights_that_stand_in_an_attribute_too_are_copied(monkeypatch: pytest.MonkeyPatch, trains: bool) -> None:
    """A copy that shared them would be trained in the place of the module."""
    monkeypatch.setattr("lightning_qat.callbacks.preservation.module_state._LARGE", 0)
    module: Any = nn.Sequential(nn.Linear(2, 2).requires_grad_(trains), nn.BatchNorm1d(2))
    module.weights, module.statistics = list(module.parameters()), list(module.buffers())
    copy = copied_module(module)
    own = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    assert not own & {id(tensor) for tensor in copy.state_dict(keep_vars=True).values()}
    assert copy.weights[0] is copy[0].weight


def test_small_state_beside_the_data_is_put_back() -> None:
    """The limit is for each attribute, not for all together, and holds for what is in tensors only."""
    module = of(Images(np.zeros(LARGE, dtype=np.uint8)))
    module.bank, module.seen = torch.zeros(3), []
    with preserved_attributes(module):
        module.bank += 1
        module.seen.append(1)
        module.kept.labels.append(1)
        module.kept.more = 1
    assert module.bank.tolist() == [0.0] * 3
    assert not module.seen
    assert len(module.kept.labels) == 100
    assert not hasattr(module.kept, "more")


@pytest.mark.parametrize("holder", ["itself", "in an object", "as a TensorDataset"])
def test_step_that_writes_to_the_data_is_told_of(holder: str) -> None:
    data = torch.empty(LARGE, dtype=torch.uint8)
    module = of(TensorDataset(data) if "Dataset" in holder else HOLDERS[holder](data))
    told = pytest.warns(UserWarning, match=r"a step writes to Linear.kept, which holds 256 MiB.*register_buffer")
    with told, preserved_attributes(module):
        data[0] = 1


def test_step_that_only_reads_the_data_is_not() -> None:
    data = torch.empty(LARGE, dtype=torch.uint8)
    with preserved_attributes(of(data)):
        data[:2].sum()


def test_long_lists_have_the_same_members_again() -> None:
    """Losses of every step, say; what is inside of so many members is not looked at."""
    members = [torch.zeros(1) for _ in range(20_000)]
    module = of(list(members))
    module.named = Images(None)
    module.named.labels = [0] * 20_000
    with preserved_attributes(module):
        module.kept.append(torch.ones(1))
        module.named.labels.append(1)
    assert len(module.kept) == len(module.named.labels) == 20_000
    assert all(one is other for one, other in zip(module.kept, members, strict=True))


@pytest.mark.parametrize("kind", [CatMetric, SumMetric])
def test_metric_is_put_back_whatever_it_holds(monkeypatch: pytest.MonkeyPatch, kind: type[Metric]) -> None:
    """CatMetric keeps everything in a list, SumMetric adds in place."""
    monkeypatch.setattr("lightning_qat.callbacks.preservation.module_state._LARGE", 0)
    metric = kind()
    metric.update(torch.zeros(4))
    module = nn.Sequential()
    module.add_module("metric", metric)
    with preserved_attributes(module):
        metric.update(torch.ones(2))
    assert metric.compute().sum() == 0
    assert metric.update_count == 1


def test_arrays_of_a_dataset_are_left_alone() -> None:
    """Most data sets are written like this."""
    data: Any = Images(np.zeros(4))
    data.mean = np.float32(0.5)
    with preserved_loader_state([DataLoader(data)]):
        data.images += 1
        data.seen = True
    assert data.images.tolist() == [1.0] * 4
    assert not hasattr(data, "seen")
