"""FSDP2 without a Trainer: fake-quant that is inserted before ``fully_shard`` sees whole weights in every forward.

Two processes, of which each has half of every batch, against one process; weights differ by 1e-6 at most.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from tests.harness.classifier import dataset
from tests.harness.ranks import ConvNet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks"),
    pytest.mark.filterwarnings("ignore:.*fully_shard"),
    pytest.mark.timeout(120),
]
IMAGES, LABELS = dataset(32).tensors


def shard(net: nn.Module, layers: bool) -> None:
    """As a whole, or layer by layer."""
    from torch.distributed.fsdp import fully_shard

    for child in [*net.children()] if layers else []:
        if child is not getattr(net, "_quantization", None):
            fully_shard(child)
    fully_shard(net)


def trained(rank: int, ranks: int, layers: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and scales after two epochs."""
    torch.manual_seed(0)
    net = ConvNet()
    region = insert(net, (IMAGES[:2],))
    if ranks > 1:
        shard(net, layers)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    calibrate(region, [IMAGES[:16], IMAGES[16:]])
    net.train()
    for first in [*range(0, 32, 8)] * 2:
        own = slice(first + rank, first + 8, ranks)
        optimizer.zero_grad()
        F.cross_entropy(net(IMAGES[own]), LABELS[own]).backward()
        optimizer.step()
    assert region.unplanned == {}
    whole = {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in net.named_parameters()}
    return whole, {name: point.scale.clone() for name, point in region.points.items()}


def work(rank: int, directory: str, layers: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    torch.save(trained(rank, 2, layers), f"{directory}/{rank}.pt")
    net = ConvNet()
    shard(net, layers)
    try:
        insert(net, (IMAGES[:2],))
    except ConfigurationError as error:
        Path(directory, f"refused{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.parametrize("layers", [False, True], ids=["whole", "by layers"])
def test_two_processes_with_sharded_weights_train_what_one_trains(tmp_path: Path, layers: bool) -> None:
    """And a module that is sharded already is refused, with what to do."""
    mp.start_processes(work, (str(tmp_path), layers), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    weights, scales = trained(0, 1, layers)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name in weights:
            torch.testing.assert_close(found[0][name], weights[name], rtol=0, atol=1e-6, msg=name)
        for name in scales:
            torch.testing.assert_close(found[1][name], scales[name], rtol=0, atol=1e-8, msg=name)
        refusal = (tmp_path / f"refused{rank}").read_text()
        assert "are sharded" in refusal
        assert "Insert fake-quant first, and call fully_shard afterwards" in refusal
