"""A run over any number of processes, by any start method, that writes down how it ended on every rank.

As a script, for strategies that start it again: ``python -m tests.harness.ranks FOLDER STRATEGY DEVICES KIND``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

import lightning_qat
from lightning_qat import atomic_files
from lightning_qat.reporting import growing_table
from tests.harness.classifier import Classifier, dataset
from tests.harness.state import state_of
from tests.harness.trainers import trainer

SIZE, BATCH = 28, 8
"""Of the last batch, every rank has a part that is smaller than that of the others: 4 of 8 images are left."""


class ConvNet(nn.Module):
    """Without batch norm, whose statistics are those of a rank's own part of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv1(images))
        x = F.relu(self.conv2(x) + x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class Shared(Classifier):
    """The ranks share every batch, so that all of them together see what one process sees."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.net: Any = ConvNet()

    def loader(self, seed: int = 0) -> DataLoader[Any]:
        data, ranks = dataset(SIZE, seed), self.trainer.world_size
        # Lightning's own sampler would shuffle the data of training
        sampler = DistributedSampler(data, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=BATCH // ranks, sampler=sampler)

    def train_dataloader(self) -> Any:
        return self.loader()

    def val_dataloader(self) -> Any:
        return self.loader(seed=1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(lightning_qat.parameter_groups(self, lr=0.05), lr=0.05, momentum=0.9)


class OfFirstRank(IterableDataset[Any]):
    """Images for rank 0 alone."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Any:
        return iter(dataset(16) if self.rank == 0 else ())


class WithoutBatch(Shared):
    """Only one rank has data to calibrate and to analyse with."""

    def calibration_dataloader(self) -> Any:
        return DataLoader(OfFirstRank(self.trainer.global_rank), batch_size=8)


class Raises(Shared):
    """The last rank raises in the middle of training, behind a step of all ranks."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 2 and self.trainer.global_rank == self.trainer.world_size - 1:
            raise RuntimeError("only here")
        return super().training_step(batch, batch_idx)


class RaisesInCalibration(Shared):
    """The last rank raises in the pass that calibrates: a step fails that has worked while it was traced."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        regions = lightning_qat.find_regions(self).values()
        if any(region.current_state == "observe" for region in regions) and self.trainer.global_rank:
            raise RuntimeError("only here")
        super().validation_step(batch, batch_idx)


KINDS: dict[str, tuple[type[Shared], dict[str, Any]]] = {
    "fixed": (Shared, {}),
    "learned": (Shared, {"activation_scales": "learned", "weight_scales": "learned"}),
    "without batch": (WithoutBatch, {}),
    "raises": (Raises, {}),
    "raises in calibration": (RaisesInCalibration, {}),
}


class Writers(Callback):
    """Notes which rank opens which file of a report for writing. Use it in child processes only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        note = self.path / f"written{trainer.global_rank}"

        def opened(path: Any, mode: str = "r", **options: Any) -> Any:
            if set(mode) & set("wxa+"):
                with open(note, "a") as file:
                    file.write(f"{path}\n")
            return open(path, mode, **options)

        for module in (atomic_files, growing_table):
            module.open = opened  # type: ignore[attr-defined]


class AtTheEnd(Callback):
    """Every rank writes its state, its scales and its metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save({"state": state_of(pl_module), "metrics": metrics}, self.path / f"rank{trainer.global_rank}.pt")


def main(path: Path, strategy: str, devices: int, kind: str, *more: Callback) -> None:
    """Train for two epochs; what a rank had at the end is in ``path/rankN.pt``."""
    module, qat = KINDS[kind]
    callbacks: list[Callback] = [
        lightning_qat.QuantizationAwareTraining(**qat),
        lightning_qat.Calibration(batches=4 * devices),
        lightning_qat.ModelCheck(show=False),
        lightning_qat.LayerStatistics(),
        lightning_qat.SensitivityAnalysis(),
        lightning_qat.LayerComparison(every_n_epochs=1),
        lightning_qat.ConvergenceMonitor(),
        lightning_qat.AccuracyTable(),
        AtTheEnd(path),
        *more,
    ]
    options = {"strategy": strategy, "devices": devices} if devices > 1 else {}
    trainer(path, *callbacks, max_epochs=2, **options).fit(module())


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(sys.argv[1])
    main(folder, sys.argv[2], int(sys.argv[3]), sys.argv[4], Writers(folder))
