"""The engine on a GPU: codes, gradients and scales are those of the CPU. Not run where there is no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lightning_qat
from lightning_qat.quantization.region.region import Region
from tests.harness.classifier import Net, dataset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
IMAGES, LABELS = dataset(32).tensors
KINDS: dict[str, dict[str, Any]] = {
    "int8": {},
    "affine": {"qconfig": {"activation": {"dtype": "uint8", "scheme": "affine"}}},
    "int16": {"qconfig": {"activation": {"dtype": "int16"}}},
    "int4": {"qconfig": {"activation": {"dtype": "int4"}, "weight": {"dtype": "int4"}}},
    "folded batch norm": {"qconfig": {"weight": {"granularity": "per_tensor"}}},
    "split": {"overrides": [{"match": "conv1.input0", "activation": {"split": {"axis": 2, "sizes": [2, 4]}}}]},
}


def quantized(kind: str, device: str) -> tuple[Net, Region]:
    torch.manual_seed(0)
    net = Net().to(device)
    region = lightning_qat.insert(net, (IMAGES[:4].to(device),), **KINDS[kind])
    lightning_qat.calibrate(region, [IMAGES.to(device)])
    return net, region


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_gives_the_codes_and_gradients_of_the_cpu(kind: str, dtype: torch.dtype) -> None:
    """On the same input and with the same scales, bit for bit."""
    (here, region), (_, other) = quantized(kind, "cpu"), quantized(kind, "cuda")
    other.load_state_dict(region.state_dict())
    for name, point in region.points.items():
        weight = name.endswith("weight")
        shape = (4, 1, 6, 6) if name == "conv1.input0" else (4, 4, 6, 6)
        value = here.get_parameter(name).detach() if weight else torch.randn(shape) * float(point.scale.max()) * 150
        results = []
        for fake_quant, device in ((point, "cpu"), (other.points[name], "cuda")):
            x = value.to(device, dtype).requires_grad_()
            out = fake_quant(x)
            out.float().square().sum().backward()
            assert out.device.type == device
            assert x.grad is not None
            results.append((out.detach().cpu(), x.grad.cpu()))
        assert torch.equal(results[0][0], results[1][0]), name
        assert torch.equal(results[0][1], results[1][1]), name


def test_cuda_gives_the_codes_of_numpy() -> None:
    """An independent source: numpy divides float32 by float32."""
    _, region = quantized("int8", "cuda")
    point = region.points["conv1.input0"]
    x = torch.randn(1_000_000, device="cuda").reshape(-1, 1, 10, 10) * 3
    codes = np.clip(np.rint(x.cpu().numpy() / point.scale.cpu().numpy()), -128, 127)
    assert np.array_equal((point(x) / point.scale).round().cpu().numpy(), codes)


@pytest.mark.parametrize("kind", ["int8", "affine", "int4"])
def test_cuda_calibrates_the_scales_of_the_cpu(kind: str) -> None:
    """Of the input and the weights bit for bit; sums of a convolution differ in their last bits."""
    (_, region), (_, other) = quantized(kind, "cpu"), quantized(kind, "cuda")
    for name, point in region.points.items():
        found = other.points[name].scale.cpu()
        if name.endswith("weight") or name == "conv1.input0":
            assert torch.equal(found, point.scale), name
        else:
            assert torch.allclose(found, point.scale, rtol=1e-2), name


def steps(device: str, compiled: bool = False, learned: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of eight steps."""
    net, region = quantized("int8", device)
    net.train()
    if learned:
        region.learn_scales(("activation", "weight"))
    region.set_state("quantize")
    if compiled:
        region.set_compile()
    optimizer = torch.optim.SGD(lightning_qat.parameter_groups(net, lr=0.01), lr=0.01)
    losses = []
    for first in [*range(0, 32, 8)] * 2:
        batch = slice(first, first + 8)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(IMAGES[batch].to(device)), LABELS[batch].to(device))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach().cpu() for name, p in net.named_parameters()}


@pytest.mark.parametrize("learned", [False, True])
def test_cuda_trains_as_the_cpu_does(learned: bool) -> None:
    """Up to codes that flip where sums differ in their last bits."""
    (here, _), (there, _) = steps("cpu", learned=learned), steps("cuda", learned=learned)
    assert there == pytest.approx(here, rel=2e-2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("learned", [False, True])
def test_cuda_compiled_trains_as_eager(learned: bool) -> None:
    (eager, _), (compiled, _) = steps("cuda", learned=learned), steps("cuda", compiled=True, learned=learned)
    assert compiled == pytest.approx(eager, rel=2e-2)


def test_cuda_step_waits_for_the_device_nowhere() -> None:
    """A quantized step reads nothing back: not a scale, not a range."""
    net, region = quantized("int8", "cuda")
    net.train()
    region.set_state("quantize")
    images, labels = IMAGES.cuda(), LABELS.cuda()
    F.cross_entropy(net(images), labels).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        F.cross_entropy(net(images), labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_analyses_say_what_they_say_on_the_cpu() -> None:
    """The most sensitive point, and the errors of every tensor."""
    tables = []
    for device in ("cpu", "cuda"):
        _, region = quantized("int8", device)
        batches = [IMAGES.to(device)]
        order = [r.point for r in lightning_qat.sensitivity(region, batches, method="isolation").rows]
        errors = [row.own_MSE or 0.0 for row in lightning_qat.compare(region, batches).rows]  # some rows have none
        tables.append((order, errors))
    assert tables[0][0][0] == tables[1][0][0]
    assert any(tables[0][1])
    assert tables[1][1] == pytest.approx(tables[0][1], rel=0.05, abs=1e-9)


def test_cuda_region_moves_between_devices() -> None:
    net, region = quantized("int8", "cuda")
    on_gpu = net.eval()(IMAGES.cuda()).cpu()
    net.cpu()
    assert {b.device.type for b in region.fake_quants.buffers()} == {"cpu"}
    assert torch.allclose(net(IMAGES), on_gpu, atol=0.05)
