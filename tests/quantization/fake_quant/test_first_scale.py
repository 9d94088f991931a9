"""Points that began at zero on two ranks: their scales agree, and the exchange ends when no rank follows the values.

The kind: activations that move, learned scales, weights, and fixed ones, whose scale follows the values for good; a
rank that meets the branch less often than the other; a checkpoint in between.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.fake_quant.first_scale import YOUTH, agree_over_ranks, await_values, follow, follows

BATCHES = 2 * YOUTH + 30


def waiting(learned: bool = False) -> FakeQuantize:
    point = FakeQuantize("int8", scheme="symmetric")
    point.observe(torch.zeros(4))
    await_values(point)
    point.learn_scale(learned)
    return point


def train(rank: int, directory: str, kind: str, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/{store}", rank=rank, world_size=2)
    point, moves = waiting(learned=kind == "learned"), kind == "moving"
    exchanges: list[int] = []
    reduce = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        exchanges.append(batch)
        return reduce(*args, **kwargs)

    dist.all_reduce = counted
    for batch in range(BATCHES):
        if batch == YOUTH // 2:  # as after a resume
            state, again = point.get_statistics_state(), waiting(learned=kind == "learned")
            again.scale.detach().copy_(point.scale.detach())
            again.load_statistics_state(state)
            point = again
        takes_branch = rank == 0 or batch % 3 == 0
        if takes_branch and follows(point, moves):
            follow(point, torch.tensor([-1.0, 1.0 + rank + 1 / (1 + batch)]), is_weight=False)
        agree_over_ranks([(point, moves)])
    torch.save({"scale": point.scale.detach().clone(), "exchanges": exchanges}, f"{directory}/{kind}{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks")
@pytest.mark.parametrize("kind", ["moving", "learned", "fixed"])
def test_ranks_exchange_as_long_as_a_scale_follows_the_values(kind: str, tmp_path: Path) -> None:
    mp.start_processes(train, (str(tmp_path), kind, "store"), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    one, other = (torch.load(tmp_path / f"{kind}{rank}.pt") for rank in (0, 1))
    assert torch.equal(one["scale"], other["scale"])
    assert float(one["scale"]) > 2 / 127  # the wider range of rank 1 reached both
    assert one["exchanges"] == other["exchanges"]
    expected = BATCHES if kind == "fixed" else YOUTH  # rank 0 takes the branch in every batch
    assert one["exchanges"] == list(range(expected))
