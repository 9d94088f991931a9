"""Values that are not finite on one of two ranks: every rank knows of them when a verdict is due.

The kind: what a loader delivers, buffers, the first op that is not finite; on rank 1 alone, and on both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lightning_qat.analysis.convergence.training_series import TrainingSeries
from lightning_qat.callbacks.non_finite import as_all_ranks_found, with_bad_values

NAN = float("nan")


def bad_module(value: float) -> nn.Module:
    module = nn.BatchNorm1d(2)
    module.running_mean.fill_(value)  # type: ignore[union-attr, operator]
    return module


def look(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    sent: list[object] = []
    gather = dist.all_gather_object

    def counted(received: Any, value: object) -> None:
        sent.append(value)
        gather(received, value)

    dist.all_gather_object = counted
    series = TrainingSeries()
    for batch in range(5):
        value = NAN if (rank, batch) == (1, 3) else 1.0
        series = with_bad_values(series, bad_module(value), (), torch.tensor([1.0, value]), f"batch {batch}")
    steps = len(sent)
    series = as_all_ranks_found(TrainingSeries(**{**vars(series), "first_bad": "conv (net.py:3)" if rank else ""}))
    found = [series.first_bad, series.bad_input, series.bad_buffers, series.bad_since]
    series = with_bad_values(series, bad_module(NAN), (), torch.tensor([NAN]), "batch 9")  # the first stays
    torch.save({"found": found, "later": series.bad_input, "sent": [steps, len(sent)]}, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks")
def test_what_one_rank_found_is_known_to_all(tmp_path: Path) -> None:
    """One exchange for a verdict, and none for a step."""
    mp.start_processes(look, (str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one == other
    where = "batch 3 on rank 1"
    assert one["found"] == ["conv (net.py:3)", f"{where}: the tensor holds nan", ("running_mean",), where]
    assert one["later"] == one["found"][1]
    assert one["sent"] == [0, 1]


def test_one_process_names_no_rank() -> None:
    series = with_bad_values(TrainingSeries(), bad_module(NAN), (), torch.tensor([NAN]), "batch 3")
    assert as_all_ranks_found(series) == series
    assert series.bad_since == "batch 3"
