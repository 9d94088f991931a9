"""Files written at once: what killed writers leave, what living ones keep, and what the error says."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lightning_qat import atomic_files
from lightning_qat.atomic_files import NotWrittenError, json_text, json_value, write_atomically
from tests.reporting.test_result_table_processes import FORK


def left_over(place: str | None = None) -> str:
    """The name of a file of a process that has ended; of this machine if no place is given."""
    process = FORK.Process(target=lambda: None)
    process.start()
    process.join(60)
    return f".lightning_qat-{place or atomic_files._place()}-{process.pid}-0123abcd.unfinished"


@pytest.fixture
def living_writer(tmp_path: Path) -> Iterator[Path]:
    """Another process that has written its file and does not come to move it."""
    ready, go_on = FORK.Event(), FORK.Event()

    def write() -> None:
        replace = os.replace

        def waiting(*names: Any) -> None:
            ready.set()
            go_on.wait(60)
            replace(*names)

        os.replace = waiting  # type: ignore[assignment]
        write_atomically(tmp_path / "slow.txt", "slow")

    process = FORK.Process(target=write)
    process.start()
    assert ready.wait(60)
    (unfinished,) = tmp_path.glob(".*.unfinished")
    yield unfinished
    go_on.set()
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "slow.txt").read_text() == "slow"


def test_file_of_a_killed_writer_is_removed_by_the_next_write_in_its_folder(tmp_path: Path) -> None:
    """Whatever it was to become, also a folder of several files."""
    (tmp_path / left_over()).write_bytes(b"half")
    folder = tmp_path / left_over()
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"half")
    mine = [".lightning_qat-0123456789ab", ".sensitivity.csv.0123456789ab", "x.unfinished"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    write_atomically(tmp_path / "a.txt", "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*mine, "a.txt"])


def test_file_of_a_living_writer_is_left_to_it(tmp_path: Path, living_writer: Path) -> None:
    left = tmp_path / left_over()
    left.write_bytes(b"half")
    write_atomically(tmp_path / "a.txt", "a")
    assert living_writer.exists()
    assert not left.exists()


@pytest.mark.parametrize(("age", "stays"), [(60.0, True), (2 * 3600.0, False)])
def test_of_another_machine_an_hour_tells(tmp_path: Path, age: float, stays: bool) -> None:
    """Also of another container, and of this machine before it was started again: the number says nothing there."""
    left = tmp_path / left_over("00000000")
    left.write_bytes(b"half")
    os.utime(left, (time.time() - age,) * 2)
    write_atomically(tmp_path / "a.txt", "a")
    assert left.exists() == stays


def test_writer_whose_file_was_taken_for_left_over_writes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process on another machine may have done so."""
    replace, removed = os.replace, []

    def once(source: Path, target: Path) -> None:
        if not removed:
            removed.append(source)
            os.unlink(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    write_atomically(tmp_path / "a.txt", "a")
    assert (tmp_path / "a.txt").read_text() == "a"
    assert len(removed) == 1


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_error_names_the_file_and_the_reason_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """The file asked for, not the temporary one. It is an ``OSError`` with its number for whoever catches these."""
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(error, os.strerror(error), "temporary")

    for owner, name in ((atomic_files, "open"), (os, "replace")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail, raising=False)
            with pytest.raises(NotWrittenError) as caught:
                write_atomically(path, "new")
        assert str(caught.value) == f"{path} cannot be written: {os.strerror(error)}."
        assert caught.value.errno == error
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_disk_that_is_full_only_when_the_file_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real full device: what is written stays in a buffer until then."""
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def full(name: Path, mode: str) -> Any:
        open(name, mode).close()
        return open("/dev/full", "wb")

    monkeypatch.setattr(atomic_files, "open", full, raising=False)
    with pytest.raises(NotWrittenError, match="No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_names_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    """The temporary file's name does not grow with them."""
    path = tmp_path / ("x" * 255)
    write_atomically(path, "a")
    assert path.read_text() == "a"
    with pytest.raises(NotWrittenError, match="File name too long"):
        write_atomically(tmp_path / ("x" * 256), "a")


@dataclass(frozen=True)
class Cell:
    name: str
    numbers: tuple[float, ...] = ()
    inner: Any = None


@pytest.mark.parametrize(
    "value",
    [
        {"a": Cell("\u00fc", (1.5, 2), Cell("x"))},
        Cell("x", (float("nan"), 1.0, float("-inf"))),
        [{3}, {1: None, "b": True}],
        {"rows": [Cell("x", inner={1.0}), (float("inf"),)]},
        None,
    ],
)
def test_quick_json_is_that_of_the_plain_value(value: Any) -> None:
    assert json_text(value) == json.dumps(json_value(value))


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError):
        json_text({"a": object()})
