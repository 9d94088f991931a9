"""The result table while several processes write it, some of which are killed."""

from __future__ import annotations

import csv
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_qat import atomic_files
from lightning_qat.reporting import accuracy_table_files
from lightning_qat.reporting.accuracy_table_files import (
    RunEntry,
    read_result_table,
    write_accuracy,
    write_result_table,
)

PROCESSES, RUNS = 4, 20
FORK = multiprocessing.get_context("fork")
STAGES = {"float": {"acc": 0.9}, "calibrated": {"acc": 0.8}, "QAT": {"acc": 0.85}}


def noted(path: Path, name: str, **values: float) -> RunEntry:
    entry = RunEntry(path, name)
    for stage, metrics in STAGES.items():
        entry.note(stage, {**metrics, **values})
        entry.save()
    entry.publish(lambda table: write_accuracy(table.result(entry.run, table.metrics(), "1%"), path, "note"))
    return entry


def together(work: Callable[[int], Any], processes: int = PROCESSES) -> list[int | None]:
    """Run a function in several processes that begin at once; their exit codes."""
    barrier = FORK.Barrier(processes)

    def run(number: int) -> None:
        barrier.wait()
        work(number)

    started = [FORK.Process(target=run, args=(number,)) for number in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=120)
    return [process.exitcode for process in started]


def shown_runs(path: Path) -> list[set[str]]:
    """The runs in every public file."""
    data = set(json.loads(path.read_text())["runs"])
    with open(path.with_suffix(".csv"), newline="") as file:
        columns = {c.removesuffix(" QAT") for c in next(csv.reader(file)) if c.endswith(" QAT")}
    heading = path.with_suffix(".md").read_text().splitlines()[0]
    return [data, columns, {cell.strip().removesuffix(" QAT") for cell in heading.split("|") if " QAT" in cell}]


def test_entries_of_runs_that_write_at_once_are_all_kept(tmp_path: Path) -> None:
    """4 processes with 20 runs each; in the json, the csv and the Markdown file, and with every value."""
    path = tmp_path / "result_table.json"

    def work(number: int) -> None:
        for run in range(RUNS):
            noted(path, f"p{number}r{run}", acc=number + run / 100)

    assert together(work) == [0] * PROCESSES
    names = {f"p{number}r{run}" for number in range(PROCESSES) for run in range(RUNS)}
    table = read_result_table(path)
    assert set(table.runs) == names
    for number, run in itertools.product(range(PROCESSES), range(RUNS)):
        stages = table.runs[f"p{number}r{run}"]
        assert stages == {stage: {"acc": number + run / 100} for stage in STAGES}
    assert shown_runs(path) == [names] * 3


def test_runs_of_the_same_name_that_begin_at_once_are_told_apart(tmp_path: Path) -> None:
    """Without a logger every run is called "run"."""
    path = tmp_path / "result_table.json"

    def work(number: int) -> None:
        for run in range(5):
            noted(path, "run", acc=number + run / 100)

    assert together(work) == [0] * PROCESSES
    runs = read_result_table(path).runs
    assert sorted(runs) == sorted(["run", *(f"run ({n})" for n in range(2, 5 * PROCESSES + 1))])
    found = sorted(stages["QAT"]["acc"] for stages in runs.values())
    assert found == [number + run / 100 for number in range(PROCESSES) for run in range(5)]
    assert all(len({values["acc"] for values in stages.values()}) == 1 for stages in runs.values())


@pytest.mark.parametrize("place", ["before", "half", "before it is moved", "before the table"])
def test_killed_writer_takes_nothing_with_it(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with nothing, half or all of its file written, and before it could join it to the table."""
    path = tmp_path / "result_table.json"
    noted(path, "first")

    def killed(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def work(number: int) -> None:
        entry = RunEntry(path, "second")
        entry.note("float", {"acc": 0.5})
        if place == "half":
            write = atomic_files.encoded
            monkeypatch.setattr(atomic_files, "encoded", lambda content: write(content)[:20])
        if place == "before":
            monkeypatch.setattr(accuracy_table_files, "write_result_table", killed)
        elif place == "before the table":
            monkeypatch.setattr(RunEntry, "publish", killed)
        else:
            monkeypatch.setattr(os, "replace", killed)
        entry.save()

    assert together(work, processes=1) == [-signal.SIGKILL]
    left = [p for p in tmp_path.rglob("*") if p.name.endswith(".unfinished")]
    assert len(left) == (place in ("half", "before it is moved"))
    survived = {"second"} if place == "before the table" else set()
    assert set(read_result_table(path).runs) == {"first"} | survived
    third = noted(path, "third")
    assert third.run == "third"
    again = noted(path, "second")  # the name was taken
    assert again.run == "second (2)"
    assert shown_runs(path)[0] == {"first", "third", "second (2)"} | survived


def test_table_of_an_earlier_version_is_read_and_continued(tmp_path: Path) -> None:
    """One file for all runs, without a folder beside it."""
    path = tmp_path / "result_table.json"
    old = {"old": {"float": {"acc": 0.9}, "QAT": {"acc": 0.7}}, "older (2)": {"QAT": {"acc": 0.1}}}
    path.write_text(json.dumps({"version": 1, "runs": old}))
    noted(path, "new")
    resumed = RunEntry(path, "old", run="old")
    resumed.note("QAT", {"acc": 0.75})
    resumed.save()
    tested = RunEntry(path, "old")
    tested.note("QAT", {"test_acc": 0.6})
    tested.save()
    taken = RunEntry(path, "old")
    taken.note("float", {"acc": 0.2})
    taken.save()
    assert read_result_table(path).runs == {
        "old": {"float": {"acc": 0.9}, "QAT": {"acc": 0.75, "test_acc": 0.6}},
        "older (2)": {"QAT": {"acc": 0.1}},
        "new": STAGES,
        "old (2)": {"float": {"acc": 0.2}},
    }
    assert json.loads(path.read_text())["runs"] == read_result_table(path).runs


def test_a_name_that_was_taken_while_the_disk_was_full_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values that could not be written come to stand under the next name."""
    path = tmp_path / "result_table.json"
    entry = RunEntry(path, "run")
    entry.note("float", {"acc": 0.1})
    with monkeypatch.context() as full:
        full.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="cannot be written: No space left on device"):
            entry.save()
    assert entry.table().runs == {"run": {"float": {"acc": 0.1}}}
    noted(path, "run")
    entry.note("QAT", {"acc": 0.2})
    entry.save()
    assert read_result_table(path).runs == {"run": STAGES, "run (2)": {"float": {"acc": 0.1}, "QAT": {"acc": 0.2}}}


def test_damaged_file_of_one_run_is_named(tmp_path: Path) -> None:
    path = tmp_path / "result_table.json"
    noted(path, "a")
    (part,) = path.with_suffix("").glob("*/*.json")
    part.write_text("{")
    with pytest.raises(ValueError, match=part.name):
        read_result_table(path)


@pytest.mark.parametrize(
    "name", ["a/b", "..", "", "x" * 300, "漢" * 300, "a\x1b[2J\n", "\ud800", "CON", "a" * 119 + "/"]
)
def test_any_name_makes_a_folder_of_its_own(tmp_path: Path, name: str) -> None:
    """Siblings: separators, parent folders, lengths, controls, halves of characters."""
    path = tmp_path / "here" / "result_table.json"
    noted(path, name)
    assert set(read_result_table(path).runs) == {name}
    assert {p.name for p in tmp_path.iterdir()} == {"here"}
    assert noted(path, name).run == f"{name} (2)"


def test_same_table_written_twice_is_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "result_table.json"
    noted(path, "a")
    before = path.read_bytes()
    write_result_table(read_result_table(path), path)
    assert path.read_bytes() == before
