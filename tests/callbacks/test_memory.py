"""A long run keeps nothing of the epochs that are over: memory is flat, with every callback."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_qat.callbacks import layer_comparison
from tests.callbacks.test_unwritable import all_callbacks
from tests.harness.noisy_run import run


@pytest.fixture(autouse=True)
def only_new_objects() -> Iterator[None]:
    """Leave out what other tests of this process have left behind: ``gc.get_objects`` does not list what is frozen."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Alive(Callback):
    """Counts what is alive at the beginning of some epochs."""

    def __init__(self, *epochs: int) -> None:
        self.epochs = epochs
        self.tensors: list[tuple[int, int]] = []
        self.objects: list[Counter[str]] = []
        self.resident: list[int] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch in self.epochs:
            gc.collect()
            alive = gc.get_objects()
            tensors = [o for o in alive if type(o) in (Tensor, torch.nn.Parameter)]
            self.tensors.append((len(tensors), sum(t.numel() for t in tensors)))
            self.objects.append(Counter(type(o).__name__ for o in alive))
            self.resident.append(_resident_bytes())


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("first", "last"), [(5, 11), pytest.param(50, 200, marks=pytest.mark.full)])
def test_memory_is_flat_over_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """No tensor more, and fewer than two objects more for each epoch.

    What may grow are the losses that ConvergenceMonitor keeps, thinned out, and the numbers of this test. The results
    of sensitivity that LayerComparison draws are thinned out too: here from the fourth epoch on.
    """
    if last < 200:
        monkeypatch.setattr(layer_comparison, "_DRAWN_EPOCHS", 4)
    alive = Alive(first, last)
    run(tmp_path, *all_callbacks(), alive, max_epochs=last + 1, limit_train_batches=1, limit_val_batches=1)
    assert alive.tensors[1] == alive.tensors[0]
    more = alive.objects[1] - alive.objects[0]
    assert sum(more.values()) < 2 * (last - first), more.most_common(5)
    if last == 200:
        assert alive.resident[1] - alive.resident[0] < 2**24


def test_drawn_epochs_are_evenly_spaced_and_bounded() -> None:
    kept: dict[int, Any] = {}
    for epoch in range(1000):
        kept = layer_comparison._thinned({**kept, epoch: None})
        assert len(kept) <= layer_comparison._DRAWN_EPOCHS + 2
        assert max(kept) == epoch
    assert list(kept) == [*range(0, 1000, 32), 999]
