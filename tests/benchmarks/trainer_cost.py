"""What insertion, calibration and loading cost in a Trainer, against the same work without one; processor time.

Run it by hand: ``python -m tests.benchmarks.trainer_cost 1000 3000``. Each row is a ratio within one process; the
seconds only say how large the work is.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_qat
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.insertion.insertion_hooks import InsertionHooks
from lightning_qat.quantization.planning.plan_compatibility import read_extra_state
from lightning_qat.quantization.region.insertion import attach, insert
from tests.benchmarks.models import Chain
from tests.benchmarks.timing import one_thread
from tests.harness.trainers import quiet

BATCHES = 4
T = TypeVar("T")


class Module(LightningModule):
    """A chain of cheap ops as ``net``."""

    def __init__(self, ops: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Chain(ops)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def measure(ops: int) -> dict[str, tuple[float, float]]:
    """Return seconds in a Trainer and without one, by what is done."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], T]) -> T:
        start = time.process_time()
        result = work()
        seconds[name] = time.process_time() - start
        return result

    class Timed(Calibration):
        def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> Any:
            return timed("calibrate", lambda: super(Timed, self)._calibrate(trainer, pl_module))

    original = InsertionHooks.insert
    data = torch.randn(2 * BATCHES, Chain.WIDTH)
    module, plain = Module(ops), Chain(ops)
    qat = lightning_qat.QuantizationAwareTraining(target="net", trace_batches=2)
    with tempfile.TemporaryDirectory() as path, one_thread():
        run = Trainer(**quiet(), max_steps=1, default_root_dir=path, callbacks=[qat, Timed(batches=BATCHES)])
        InsertionHooks.insert = lambda self: timed("insert", lambda: original(self))  # type: ignore[method-assign]
        try:
            run.fit(module, DataLoader(data, 2), DataLoader(data, 2))
        finally:
            InsertionHooks.insert = original  # type: ignore[method-assign]
        calls = data.split(2)[:3]  # run in both modes: as many forwards as two batches each of three stages
        region = timed("plain insert", lambda: insert(plain, batches=calls))
        timed("plain calibrate", lambda: lightning_qat.calibrate(region, data.split(2)))
        file = Path(path) / "a.ckpt"
        run.save_checkpoint(file)
        timed("load", lambda: lightning_qat.load_quantized(Module, file))
        timed("plain load", lambda: _plain_load(file, ops))
    return {name: (seconds[name], seconds[f"plain {name}"]) for name in ("insert", "calibrate", "load")}


def _plain_load(file: Path, ops: int) -> None:
    """Read the file, attach the stored plan, load the state."""
    state = torch.load(file, weights_only=True)["state_dict"]
    net = Chain(ops)
    attach(net, *read_extra_state(state["net._quantization._extra_state"]), traced=False)
    net.load_state_dict({name.removeprefix("net."): value for name, value in state.items()})


def main() -> None:
    """Print a table for each number of ops."""
    warnings.simplefilter("ignore")
    print("| ops | work | in a Trainer [s] | without [s] | ratio |\n|---|---|---|---|---|")
    for ops in [int(word) for word in sys.argv[1:]] or [1000]:
        for name, (ours, plain) in measure(ops).items():
            print(f"| {ops} | {name} | {ours:.2f} | {plain:.2f} | {ours / plain:.2f} |")


if __name__ == "__main__":
    main()
