"""The page of a run in processes of its own: killed with ``kill -9`` at any moment, and on two ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lightning_qat import atomic_files
from lightning_qat.callbacks import html_report
from lightning_qat.callbacks.accuracy_table import AccuracyTable
from lightning_qat.callbacks.convergence_monitor import ConvergenceMonitor
from lightning_qat.callbacks.html_report import HTMLReport
from lightning_qat.callbacks.layer_statistics import LayerStatistics
from lightning_qat.cli.command_line import main
from lightning_qat.reporting.html.page import write_report
from lightning_qat.reporting.html.run_folder import read_run
from tests.harness.classifier import Classifier
from tests.harness.parsed_page import ParsedPage
from tests.harness.trainers import qat_trainer
from tests.reporting.test_result_table_processes import FORK

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
    pytest.mark.filterwarnings("ignore:this strategy trains in child processes"),
]
PIECE, MOVE, OPEN = "piece", "os.rename", "open"
SIZE = 4096
"""Bytes of a piece."""


class SlowFile:
    """A file that takes what is written in pieces, with something to do behind each."""

    def __init__(self, file: BinaryIO, behind: Callable[[], None]) -> None:
        self.file, self.behind = file, behind

    def __enter__(self) -> SlowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> None:
        for start in range(0, len(content), SIZE):
            self.file.write(content[start : start + SIZE])
            self.behind()


class Killer:
    """Ends this process, as ``kill -9`` does, at the n-th piece, move or opening of a file in a folder; or counts."""

    def __init__(self, folder: Path, kind: str = "", number: int = 0) -> None:
        self.folder, self.last = str(folder), (kind, number)
        self.counts: Counter[str] = Counter()
        sys.addaudithook(self._on_event)  # of this process, for good
        atomic_files.open = self._open  # type: ignore[attr-defined]

    def _note(self, kind: str) -> None:
        self.counts[kind] += 1
        if self.last == (kind, self.counts[kind]):
            os.kill(os.getpid(), signal.SIGKILL)

    def _on_event(self, name: str, arguments: tuple[Any, ...]) -> None:
        is_change = name == MOVE or (name == OPEN and set(str(arguments[1])) & set("wxa+"))
        if is_change and str(arguments[0]).startswith(self.folder):
            self._note(name)

    def _open(self, path: Path, mode: str) -> SlowFile:
        return SlowFile(open(path, mode, buffering=0), lambda: self._note(PIECE))


def train(folder: Path, epochs: int = 2) -> None:
    callbacks = (HTMLReport(every_n_epochs=1), LayerStatistics(), AccuracyTable(), ConvergenceMonitor())
    qat_trainer(folder, *callbacks, max_epochs=epochs).fit(Classifier())


def killed(work: Callable[[], Any], when: Callable[[], None] | None = None) -> bool:
    """Run something in a process of its own, perhaps kill it at some moment, and say whether it was killed."""
    process = FORK.Process(target=work)
    process.start()
    if when is not None:
        when()
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def check_what_is_left(folder: Path) -> int:
    """Check that every file of a killed run is whole, or named as unfinished; return how many of these there are."""
    unfinished = 0
    for path in folder.rglob("*"):
        if path.suffix == ".unfinished":
            unfinished += 1
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".html":
            text = path.read_text()
            assert text.endswith("</html>\n")
            series = ParsedPage(text).data["series"]
            epochs = series["sqnr"]["epochs"] if "sqnr" in series else []
            assert epochs == list(range(len(epochs)))
    assert not read_run(folder).gaps
    return unfinished


def check_next_page(folder: Path) -> None:
    """The page of a killed run can be made from its files, and what was unfinished is gone."""
    if (folder / "lightning_qat" / "quant_plan.json").exists():
        assert main(["report", str(folder)]) == 0
        check_what_is_left(folder)
        assert not list((folder / "lightning_qat").glob(".*"))


def counted(folder: Path) -> dict[str, int]:
    """How many events of each kind a whole run has."""
    path = folder.with_suffix(".json")

    def work() -> None:
        killer = Killer(folder)
        train(folder)
        path.write_text(json.dumps(killer.counts))

    assert not killed(work)
    found: dict[str, int] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.full)])
def test_a_run_that_is_killed_while_it_writes_leaves_whole_pages(tmp_path: Path, kills: int) -> None:
    """A real SIGKILL at random places: in the middle of any file, before it is moved, before it is opened.

    Every other run begins in the folder of a killed one, as a user does who starts again. What was half written never
    counts as the page, and is removed by the next write.
    """
    counts = counted(tmp_path / "whole")
    draw = random.Random(0)
    for number in range(kills):
        folder, kind = tmp_path / str(number // 2), (PIECE, MOVE, OPEN)[number % 3]
        moment = draw.randint(1, counts[kind])

        def work(folder: Path = folder, kind: str = kind, moment: int = moment) -> None:
            Killer(folder, kind, moment)
            train(folder)

        assert killed(work)
        left = check_what_is_left(folder)
        assert left or kind == OPEN
        if number % 2:
            check_next_page(folder)


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.full)])
def test_a_run_that_is_killed_from_outside_leaves_a_whole_page(tmp_path: Path, kills: int) -> None:
    """At any instruction, some time after the first page; it writes a page per epoch for as long as it lives."""
    draw = random.Random(1)
    for number in range(kills):
        page = tmp_path / str(number) / "lightning_qat" / "report.html"

        def when(page: Path = page, seconds: float = draw.uniform(0, 0.5)) -> None:
            end = time.monotonic() + 60
            while not page.exists() and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(seconds)

        assert killed(lambda page=page: train(page.parent.parent, 10_000), when)  # type: ignore[misc]
        assert page.exists()
        check_what_is_left(page.parent.parent)
        check_next_page(page.parent.parent)


def test_on_two_ranks_rank_zero_alone_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once when training begins, behind every epoch, and at the end."""
    writes = tmp_path / "writes"

    def noted(runs: Any, path: Path) -> Path:
        with open(writes, "a") as file:
            file.write(f"{rank_zero_only.rank}\n")
        return write_report(runs, path)

    monkeypatch.setattr(html_report, "write_report", noted)
    report = HTMLReport(every_n_epochs=1)
    run = qat_trainer(tmp_path, report, LayerStatistics(), max_epochs=2, strategy="ddp_fork", devices=2)
    run.fit(Classifier())
    assert writes.read_text().split() == ["0"] * 3
    check_what_is_left(tmp_path)
    page = ParsedPage((tmp_path / "lightning_qat" / "report.html").read_text())
    assert page.data["series"]["sqnr"]["epochs"] == [0, 1]
    assert not list(tmp_path.rglob(".*"))
