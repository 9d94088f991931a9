"""Reductions over two real processes, and ranks that give up together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_qat.quantization import ranks
from lightning_qat.quantization.errors import ConfigurationError


def fail(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    for failing in ((), (1,), (0, 1)):
        try:
            with ranks.failing_together():
                if rank in failing:
                    raise ConfigurationError(f"NaN at {rank}")
            outcome = "done"
        except ConfigurationError as error:
            outcome = str(error)
        Path(directory, f"{failing} {rank}").write_text(outcome)
    dist.destroy_process_group()


def test_all_ranks_raise_what_one_of_them_met(tmp_path: Path) -> None:
    mp.start_processes(fail, (str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    outcomes = {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != "store"}
    assert outcomes == {
        "() 0": "done",
        "() 1": "done",
        "(1,) 0": "on rank 1: NaN at 1",
        "(1,) 1": "NaN at 1",
        "(0, 1) 0": "NaN at 0",
        "(0, 1) 1": "NaN at 1",
    }


def test_one_process_raises_its_own() -> None:
    with pytest.raises(ConfigurationError, match=r"^here$"), ranks.failing_together():
        raise ConfigurationError("here")


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), ranks.failing_together():
        raise ZeroDivisionError


VALUES = ([1.0, 5.0, -2.0], [3.0, -7.0, 0.5])
"""What the two ranks have."""


def reduce(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    own = torch.tensor(VALUES[rank])
    found = {
        "rank": ranks.rank(),
        "count": ranks.count(),
        "device": str(ranks.reduce_device()),
        "summed": ranks.summed(own),
        "largest": ranks.largest(own),
        "averaged": ranks.averaged(own),
        "gathered": ranks.gathered(own),
        "of_first_rank": ranks.of_first_rank(own),
        "of a transposed matrix": ranks.summed(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T),
        "own": own,
    }
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def test_reductions_are_those_of_the_stacked_tensors(tmp_path: Path) -> None:
    mp.start_processes(reduce, (str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    stacked = torch.tensor(VALUES)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert (found["rank"], found["count"], found["device"]) == (rank, 2, "cpu")
        assert torch.equal(found["summed"], stacked.sum(0))
        assert torch.equal(found["largest"], stacked.amax(0))
        assert torch.equal(found["averaged"], stacked.mean(0))
        assert torch.equal(torch.stack(found["gathered"]), stacked)
        assert torch.equal(found["of_first_rank"], stacked[0])
        assert torch.equal(found["of a transposed matrix"], torch.tensor([[2.0, 6.0], [4.0, 8.0]]))
        assert torch.equal(found["own"], stacked[rank])  # no argument is changed


def test_one_process_gets_back_what_it_gave() -> None:
    x = torch.tensor([1.0, 2.0])
    for reduction in (ranks.summed, ranks.largest, ranks.averaged, ranks.of_first_rank):
        assert reduction(x) is x
    assert [t.tolist() for t in ranks.gathered(x)] == [[1.0, 2.0]]
    assert (ranks.rank(), ranks.count(), ranks.reduce_device()) == (0, 1, torch.device("cpu"))


def test_only_this_file_uses_torch_distributed() -> None:
    package = Path(ranks.__file__).parents[1]
    users = [p for p in package.rglob("*.py") if "import torch.distributed" in p.read_text(encoding="utf-8")]
    assert users == [Path(ranks.__file__)]
