"""Ranges of single calls (A5): finite values only, over batches, the same on all ranks."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_qat.quantization.fake_quant.call_ranges import CallRanges


def test_ranges_grow_over_batches_and_leave_out_what_is_not_finite() -> None:
    ranges = CallRanges()
    for batch in ([1.0, 2.0], [-3.0, math.inf], [math.nan, 0.5]):
        ranges.observe("p", 0, torch.tensor(batch))
    assert ranges.points == {"p": [(-3.0, 2.0)]}


def test_a_call_that_saw_nothing_is_empty() -> None:
    ranges = CallRanges()
    ranges.observe("p", 2, torch.tensor([1.0]))
    assert ranges.points["p"] == [(math.inf, -math.inf), (math.inf, -math.inf), (1.0, 1.0)]


def test_state_round_trip() -> None:
    ranges, other = CallRanges(), CallRanges()
    ranges.observe("p", 1, torch.tensor([1.0, 4.0]))
    other.load_state_dict(ranges.state_dict())
    assert other.points == ranges.points


def on_rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    ranges = CallRanges()
    for call in range(rank + 1):  # the second rank's loop runs once more
        ranges.observe("loop", call, torch.tensor([-1.0 - rank, 2.0 * (call + 1)]))
    ranges.all_reduce(["loop", "never"])
    torch.save(ranges.state_dict(), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_also_where_they_ran_different_numbers_of_calls(tmp_path: Path) -> None:
    mp.spawn(on_rank, args=(str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert states[0] == states[1] == {"loop": [[-2.0, 2.0], [-2.0, 4.0]]}
