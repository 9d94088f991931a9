"""Ranks give up together: on all of them there is the message of the one that could not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_qat.analysis.rank_agreement import failing_together
from lightning_qat.quantization.errors import ConfigurationError


def work(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    for failing in ((), (1,), (0, 1)):
        try:
            with failing_together():
                if rank in failing:
                    raise ConfigurationError(f"NaN at {rank}")
            outcome = "done"
        except ConfigurationError as error:
            outcome = str(error)
        Path(directory, f"{failing} {rank}").write_text(outcome)
    dist.destroy_process_group()


def test_all_ranks_raise_what_one_of_them_met(tmp_path: Path) -> None:
    mp.start_processes(work, (str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
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
    with pytest.raises(ConfigurationError, match=r"^here$"), failing_together():
        raise ConfigurationError("here")


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), failing_together():
        raise ZeroDivisionError
