"""Garbage is searched for rarely while a model is traced and fake-quants are inserted, and as before afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.quantization.errors import TracingError
from lightning_qat.quantization.modules.garbage_collection import OBJECTS
from lightning_qat.quantization.region.insertion import insert


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


class Noting(nn.Module):
    """Notes the threshold that its forward runs under."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.fails = fails
        self.seen: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(gc.get_threshold()[0])
        if self.fails:
            raise ValueError("an error of the model")
        return self.linear(x)


def test_traced_forwards_run_with_rare_searches_and_nothing_stays() -> None:
    module = Noting()
    insert(module, (torch.ones(1, 2),))
    assert module.seen == {OBJECTS}
    assert gc.get_threshold() == (700, 10, 10)


def test_nothing_stays_after_an_error() -> None:
    with pytest.raises(TracingError):
        insert(Noting(fails=True), (torch.ones(1, 2),))
    assert gc.get_threshold() == (700, 10, 10)


def test_a_collector_that_is_off_stays_off() -> None:
    gc.set_threshold(0)
    module = Noting()
    insert(module, (torch.ones(1, 2),))
    assert gc.get_threshold()[0] == 0
    assert OBJECTS not in module.seen
