"""One csv for all epochs: what is in it after interruptions, resumes and changes of layout."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lightning_qat.analysis.results import Result
from lightning_qat.reporting import growing_table
from lightning_qat.reporting.growing_table import GrowingTable


@dataclass(frozen=True)
class Row:
    point: str
    score: float | None


@dataclass(frozen=True)
class Other:
    point: str
    loss: float


def result(*scores: float | None, name: str = "p") -> Result[Row]:
    return Result(tuple(Row(f"{name}{i}", score) for i, score in enumerate(scores)))


def read(path: Path) -> list[tuple[int, str, str]]:
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["epoch", "point", "score"]
    return [(int(epoch), point, score) for epoch, point, score in rows]


def test_every_epoch_is_appended_without_reading_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write costs the same, however long the file is."""
    table = GrowingTable(tmp_path / "new" / "t.csv")
    table.write(result(1.0, None), 0)
    inode = table.path.stat().st_ino

    def refuse(*args: Any) -> Any:
        raise AssertionError("the whole file was read or written")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        patched.setattr(growing_table, "write_atomically", refuse)
        for epoch in (1, 2, 5):
            table.write(result(epoch / 2), epoch)
    assert read(table.path) == [(0, "p0", "1.0"), (0, "p1", ""), (1, "p0", "0.5"), (2, "p0", "1.0"), (5, "p0", "2.5")]
    assert table.path.stat().st_ino == inode


def test_rows_of_an_epoch_that_is_written_again_are_replaced_and_later_ones_removed(tmp_path: Path) -> None:
    for epoch in range(4):
        GrowingTable(tmp_path / "t.csv").write(result(float(epoch)), epoch)  # each time by another run
    table = GrowingTable(tmp_path / "t.csv")
    table.write(result(20.0, 21.0), 2)
    assert read(table.path) == [(0, "p0", "0.0"), (1, "p0", "1.0"), (2, "p0", "20.0"), (2, "p1", "21.0")]
    table.write(result(22.0), 2)  # the end of training, in the same run
    table.write(result(30.0), 3)
    assert [epoch for epoch, *_ in read(table.path)] == [0, 1, 2, 3]
    GrowingTable(tmp_path / "t.csv").write(result(7.0), 0)  # a run that starts anew
    assert read(table.path) == [(0, "p0", "7.0")]


def test_line_that_was_not_finished_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("epoch,point,score\n0,p0,1.0\n1,p0,2.0\n1,p")
    GrowingTable(path).write(result(3.0), 2)
    assert read(path) == [(0, "p0", "1.0"), (1, "p0", "2.0"), (2, "p0", "3.0")]


def test_full_disk_leaves_the_epochs_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = GrowingTable(tmp_path / "t.csv")
    table.write(result(1.0), 0)

    class FullDisk:
        def __init__(self, path: Path, mode: str, buffering: int) -> None:
            self.file = open(path, mode, buffering=buffering)  # noqa: SIM115

        def __enter__(self) -> FullDisk:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> int:
            return self.file.write(content[:3]) or 0

        def truncate(self, size: int) -> int:
            return self.file.truncate(size)

    monkeypatch.setattr(growing_table, "open", FullDisk, raising=False)
    with pytest.raises(OSError, match="disk is full"):
        table.write(result(2.0), 1)
    monkeypatch.undo()
    assert read(table.path) == [(0, "p0", "1.0")]
    table.write(result(2.0), 1)
    assert read(table.path) == [(0, "p0", "1.0"), (1, "p0", "2.0")]


@pytest.mark.parametrize(
    "content",
    ["point,score\np0,1.0\n", "epoch,point,loss\n0,p0,1.0\n", "", "epoch", "epoch,point,score\nx,p0,1.0\n", "\x00\xff"],
)
def test_file_of_another_layout_is_moved_aside_untouched(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content.encode("latin-1"))
    moved = GrowingTable(path).write(result(1.0), 3)
    assert moved.startswith(f"{path} has other columns")
    assert moved.endswith("It is now called t.1.csv, and a new file was begun.")
    assert (tmp_path / "t.1.csv").read_bytes() == content.encode("latin-1")
    assert read(path) == [(3, "p0", "1.0")]
    assert GrowingTable(path).write(Result((Other("p0", 1.0),)), 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.1.csv", "t.2.csv", "t.csv"]


def test_two_analyses_that_write_the_same_file_are_kept_apart(tmp_path: Path) -> None:
    """The number of files does not grow with the epochs."""
    first, second = GrowingTable(tmp_path / "t.csv"), GrowingTable(tmp_path / "t.csv")
    said = []
    for epoch in range(4):
        said.append(first.write(result(1.0), epoch))
        said.append(second.write(Result((Other("p0", 2.0),)), epoch))
    assert [bool(text) for text in said] == [False, True, True, False, False, False, False, False]
    shared = tmp_path / "t.csv"
    assert said[2] == f"{shared} is written by another analysis too. The rows of this one follow in t.2.csv."
    assert [path.name for path in (first.path, second.path)] == ["t.2.csv", "t.csv"]
    assert [epoch for epoch, *_ in read(tmp_path / "t.2.csv")] == [1, 2, 3]
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.1.csv", "t.2.csv", "t.csv"]


def test_names_with_commas_quotes_and_foreign_letters_are_counted_rightly(tmp_path: Path) -> None:
    """Where a row begins is counted in bytes."""
    table = GrowingTable(tmp_path / "t.csv")
    for epoch in range(3):
        table.write(result(1.0, 2.0, name='a,"ü\u2028漢'), epoch)
    GrowingTable(tmp_path / "t.csv").write(result(3.0), 1)
    assert [(epoch, score) for epoch, _, score in read(table.path)] == [(0, "1.0"), (0, "2.0"), (1, "3.0")]


def test_file_that_somebody_has_removed_or_changed_is_looked_at_again(tmp_path: Path) -> None:
    table = GrowingTable(tmp_path / "t.csv")
    table.write(result(1.0), 0)
    table.path.unlink()
    table.write(result(2.0), 1)
    assert read(table.path) == [(1, "p0", "2.0")]
    table.path.write_text("epoch,point,score\n4,p0,1.0\n")
    table.write(result(3.0), 2)
    assert read(table.path) == [(2, "p0", "3.0")]
