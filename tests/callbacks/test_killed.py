"""Runs that a signal ends anywhere: resumed, they end as a run that was left alone, bit for bit, with the same reports.

SIGKILL ends the process at once: in the middle of calibration, of an analysis, of writing a report and of writing a
checkpoint. SIGTERM reaches it at the same places; Lightning ends the run after the next batch. What ends a run at the
end of training is in test_final_reports.py.
"""

from __future__ import annotations

import copy
import csv
import json
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec.implementations.local as local_files
import pytest
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightning_qat
from lightning_qat import atomic_files
from lightning_qat.analysis.sensitivity.sensitivity_sketch import Sketch
from lightning_qat.quantization.region.calibration import CalibrationPass
from lightning_qat.reporting.growing_table import GrowingTable
from tests.harness.classifier import Classifier, ResumableLoader
from tests.harness.state import assert_same, state_of
from tests.harness.trainers import qat_trainer

FORK = multiprocessing.get_context("fork")
EPOCHS = 3
TABLES = ("sensitivity", "layer_statistics")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.timeout(120),
]


class Resumable(Classifier):
    """With batches in order, and a learning rate at which training stays healthy."""

    def __init__(self) -> None:
        super().__init__(lr=0.005)

    def train_dataloader(self) -> Any:
        return ResumableLoader()


def train(path: Path, checkpoint: Path | None = None, by_validation: bool = False) -> dict[str, Tensor]:
    """Train, or go on; a checkpoint ``last.ckpt`` after every epoch."""
    seed_everything(7, verbose=False)
    module = Resumable()
    callbacks = [
        lightning_qat.ModelCheck(show=False),
        lightning_qat.LayerStatistics(),
        lightning_qat.SensitivityAnalysis(),
        lightning_qat.ConvergenceMonitor(),
        ModelCheckpoint(path, save_last=True, save_on_train_epoch_end=not by_validation),
    ]
    run = qat_trainer(path, *callbacks, qat={"activation_scales": "ema"}, max_epochs=EPOCHS)
    run.fit(module, ckpt_path=checkpoint)
    return state_of(module)


# -- the places


class At:
    """Sends a signal to this process at the n-th call of a function, before or in the middle of its work."""

    def __init__(self, number: signal.Signals, count: int) -> None:
        self.number, self.count = number, count

    def hit(self) -> bool:
        self.count -= 1
        return self.count == 0

    def strike(self) -> None:
        os.kill(os.getpid(), self.number)


def in_calibration(at: At) -> None:
    """Behind its second batch."""
    done = CalibrationPass.batch_done

    def batch_done(self: CalibrationPass) -> None:
        done(self)
        if at.hit():
            at.strike()

    CalibrationPass.batch_done = batch_done  # type: ignore[method-assign]


def in_analysis(at: At) -> None:
    """In front of a batch of the sensitivity analysis of an epoch."""
    run = Sketch.run

    def struck(self: Sketch, call: Any) -> None:
        if at.hit():
            at.strike()
        run(self, call)

    Sketch.run = struck  # type: ignore[method-assign]


def in_report(at: At) -> None:
    """When a report is on the disk and not yet in its place."""
    replace = os.replace

    def struck(source: Any, target: Any) -> None:
        if Path(target).name == "sensitivity.json" and at.hit():
            at.strike()
        replace(source, target)

    atomic_files.os.replace = struck  # type: ignore[attr-defined]


def in_table(at: At) -> None:
    """When half of the rows of an epoch are in a table that grows."""
    append = GrowingTable._append

    def struck(self: GrowingTable, lines: bytes) -> None:
        if at.hit():
            with open(self.path, "ab", buffering=0) as file:
                file.write(lines[: len(lines) // 2])
            at.strike()
            os.truncate(self.path, self._size)
        append(self, lines)

    GrowingTable._append = struck  # type: ignore[method-assign]


def in_checkpoint(at: At) -> None:
    """When half of a checkpoint is on the disk."""
    write = local_files.LocalFileOpener.write

    def struck(self: Any, content: bytes) -> int:
        if at.hit():
            write(self, content[: len(content) // 2])
            self.flush()
            at.strike()
            self.seek(0)
        return write(self, content)

    local_files.LocalFileOpener.write = struck


PLACES: dict[str, tuple[Callable[[At], None], int]] = {
    "calibration": (in_calibration, 2),
    "analysis": (in_analysis, 2),
    "report": (in_report, 2),
    "table": (in_table, 1),
    "checkpoint": (in_checkpoint, 4),
}
"""By name: what installs it, and at which call it strikes."""


def ended(path: Path, place: str, number: signal.Signals, by_validation: bool) -> int | None:
    """Train in another process until the signal comes; its exit code."""

    def work() -> None:
        install, count = PLACES[place]
        install(At(number, count))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(path, by_validation=by_validation)

    process = FORK.Process(target=work)
    process.start()
    process.join(timeout=100)
    return process.exitcode


def tables(path: Path) -> dict[str, Any]:
    """The rows of every table, and the verdict."""
    folder = path / "lightning_qat"
    found: dict[str, Any] = {}
    for name in TABLES:
        with open(folder / f"{name}.csv", newline="") as file:
            found[name] = list(csv.DictReader(file))
    found["verdict"] = json.loads((folder / "convergence.json").read_text())["verdict"]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A run that was left alone: its state and its tables."""
    path = tmp_path_factory.mktemp("whole")
    return train(path), tables(path)


CASES = [
    (place, number, by_validation)
    for number in (signal.SIGKILL, signal.SIGTERM)
    for place, by_validation in [*((place, False) for place in PLACES), ("analysis", True), ("table", True)]
]
QUICK = [*((place, signal.SIGKILL, False) for place in PLACES), ("analysis", signal.SIGTERM, True)]


@pytest.mark.parametrize(
    ("place", "number", "by_validation"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.full) for case in CASES],
)
def test_resumed_run_has_lost_nothing(
    tmp_path: Path,
    whole: tuple[dict[str, Tensor], dict[str, Any]],
    place: str,
    number: signal.Signals,
    by_validation: bool,
) -> None:
    code = ended(tmp_path, place, number, by_validation)
    # Lightning ends quietly at a SIGTERM, but looks for it only once training has begun
    assert code == (0 if number == signal.SIGTERM and place != "calibration" else -number)
    checkpoint = tmp_path / "last.ckpt"
    assert checkpoint.exists() == (place != "calibration")
    state = train(tmp_path, checkpoint if checkpoint.exists() else None, by_validation)
    assert_same(state, whole[0])
    found, expected = tables(tmp_path), copy.deepcopy(whole[1])
    if by_validation:  # how many codes flipped, only the run that trained the epoch knows
        for row in [*found["layer_statistics"], *expected["layer_statistics"]]:
            del row["flip_rate"]
    assert found == expected
    left = [p.name for p in tmp_path.rglob("*") if p.is_file() and "unfinished" in p.name]
    assert left == []
