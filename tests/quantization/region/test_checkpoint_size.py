"""What fake-quants add to a checkpoint, and that nothing which training depends on is left out to save room.

The kind is statistics that grow a checkpoint: histograms of activations of any observer, of split points, and those of
weights (per channel, per tensor, depthwise, folded, computed in the forward), which the weight itself can tell.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.quantization.planning.plan_compatibility import read_extra_state
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import attach, insert
from lightning_qat.quantization.region.region import Region
from tests.harness.state import assert_same
from tests.quantization.models import ResNet

KEY = "_quantization._extra_state"
PER_POINT = 1200
"""Bytes of a point without statistics and channels: its place in plan and graph, and two tensors in the file."""
PER_FILE = 4096


class Chain(nn.Module):
    """A hundred layers, three hundred activation points."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(100))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return x


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 768, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(768, 768, 3, groups=768, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        for block in self.blocks:
            x = torch.relu(block(x))
        return x


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "chain": (Chain, (256, 8)),
    "depthwise": (Depthwise, (2, 3, 16, 16)),
    "resnet": (ResNet, (4, 1, 8, 8)),
}


def file_size(state: Any) -> int:
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()


def made(name: str, qconfig: dict[str, Any], seed: int = 0) -> tuple[nn.Module, Region, Tensor]:
    torch.manual_seed(seed)
    build, shape = MODELS[name]
    module, x = build(), torch.randn(shape)
    region = insert(module, (x,), qconfig=qconfig)
    calibrate(region, [x, 3 * x, x.roll(1, 0)])
    return module, region, x


@pytest.mark.parametrize("observer", ["minmax", "ema", "percentile", "mse", "kl"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_an_activation_point_adds_two_kilobytes_at_most(name: str, observer: str) -> None:
    """All that the file grows by is counted: statistics, scales, plan and graph, and the names of the keys."""
    module, region, _ = made(name, {"activation": {"observer": observer}})
    floats = {k: v for k, v in module.state_dict().items() if not k.startswith("_quantization")}
    weights = [p for p in region.plan.points if p.is_weight]
    channels = sum(p.channels or 1 for p in weights)
    grown = file_size(module.state_dict()) - file_size(floats)
    activations = len(region.plan.points) - len(weights)
    scales = 8 * channels  # four bytes, and the zero point
    assert grown <= 2000 * activations + PER_POINT * len(weights) + scales + PER_FILE


@pytest.mark.parametrize(("observer", "numbers"), [("minmax", 0), ("mse", 1)])
def test_a_weight_adds_only_what_it_cannot_tell(observer: str, numbers: int) -> None:
    """That is how much of its range the observer took at calibration: no number, or one per channel."""
    module, region, _ = made("depthwise", {"weight": {"observer": observer, "dtype": "int4"}})
    for point in (p for p in region.plan.points if p.is_weight):
        state = module.state_dict()[KEY]["statistics"][point.name]
        assert "statistics" not in state
        rows = state.get("ratio", [])
        assert len(rows) == numbers
        assert all(len(row) == point.channels for row in rows)
        assert "ema_ratio" not in state


def test_split_points_share_the_room_of_one() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Tanh(), nn.Sigmoid()), torch.randn(4000, 16)
    rule = {"match": "0.input0", "activation": {"split": {"axis": 1, "sizes": [4, 4, 4, 4]}}}
    region = insert(module, (x,), overrides=[rule])
    calibrate(region, [x])
    groups = module.state_dict()[KEY]["statistics"]["0.input0"]["statistics"]["groups"]
    assert len(groups) == 4
    assert sum(len(group["histogram"]["packed"]) for group in groups) <= 384


# -- nothing is lost


def step(module: nn.Module, x: Tensor) -> None:
    module.train()
    module(x).square().mean().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
                parameter.grad = None


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("kind", ["fixed", "ema", "learned"])
def test_training_goes_on_bit_for_bit_from_a_checkpoint(kind: str, observer: str) -> None:
    """Whatever the scales follow: weights alone, moving averages, or a gradient; with folded batch norms."""
    options = {"activation": {"observer": observer}, "weight": {"observer": observer}}
    module, region, x = made("resnet", options)
    fresh, other, _ = made("resnet", options, seed=1)
    if kind == "learned":
        region.learn_scales()
    region.set_state("quantize", updates={"weight", "activation"} if kind == "ema" else {"weight"})
    step(module, x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    other.set_state("quantize", updates=region.updates)
    for number in range(3):
        for each in (module, fresh):
            step(each, x * (1 + number))
    both = module.state_dict(), fresh.state_dict()
    assert_same(*({k: v for k, v in state.items() if isinstance(v, Tensor)} for state in both))
    assert torch.equal(module.eval()(x), fresh.eval()(x))
    for name, point in region.points.items():
        if not region.plan.by_name[name].is_weight:
            assert torch.equal(point.statistics.averages, other.points[name].statistics.averages)


def test_the_statistics_of_weights_are_taken_again_when_asked() -> None:
    """Of plain, folded, shared and per-tensor weights. Nothing is done before, and once is enough."""
    for granularity in ("per_channel", "per_tensor"):
        options = {"weight": {"granularity": granularity}}
        module, region, _ = made("resnet", options)
        fresh, other, _ = made("resnet", options, seed=1)
        fresh.load_state_dict(module.state_dict())
        weights = [p.name for p in region.plan.points if p.is_weight]
        assert all(other.points[name].forgotten and not other.points[name].statistics.count for name in weights)
        assert other.compute_scales("minmax") == ()
        for name in weights:
            assert not other.points[name].forgotten
            for own, again in zip(
                region.points[name].statistics.range, other.points[name].statistics.range, strict=True
            ):
                assert torch.equal(own, again)


@pytest.mark.parametrize("kind", ["spectral norm", "transposed", "part"])
def test_a_weight_that_is_computed_keeps_its_statistics(kind: str) -> None:
    """No parameter tells them: the plan knows the op that made it, not its values."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            if kind == "spectral norm":
                nn.utils.parametrizations.spectral_norm(self.layer)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.layer.weight
            weight = {"transposed": weight.t(), "part": weight[:3]}.get(kind, weight)
            return nn.functional.linear(x, weight)

    torch.manual_seed(0)
    module, x = Net(), torch.randn(8, 6)
    region = insert(module, (x,))
    calibrate(region, [x])
    fresh = copy.deepcopy(module)
    fresh.load_state_dict(module.state_dict())
    other = next(m for m in fresh.modules() if isinstance(m, Region))
    for r in (region, other):
        assert r.compute_scales("minmax", "int4") == ()
    for name, point in region.points.items():
        assert torch.equal(point.scale, other.points[name].scale)


def test_checkpoints_of_version_1_load() -> None:
    """Their graph is a dictionary, and every point has all its statistics, in tensors."""
    module, region, x = made("resnet", {})
    state = module.state_dict()
    points = [p.name for p in region.plan.points if p.same_as is None]
    state[KEY] = {
        **state[KEY],
        "version": 1,
        "graph": region.graph.to_dict(),
        "statistics": {name: region.points[name].get_statistics_state() for name in points},
    }
    fresh = ResNet()
    other = attach(fresh, *read_extra_state(state[KEY]), traced=False)
    fresh.load_state_dict(state)
    other.set_state("quantize")
    assert torch.equal(fresh.eval()(x), module.eval()(x))
    for r in (region, other):
        r.compute_scales("kl", "int4")
    for name, point in region.points.items():
        assert torch.equal(point.scale, other.points[name].scale)


def test_what_a_checkpoint_holds_is_packed_once() -> None:
    """Every further checkpoint asks for the same texts, until the statistics change."""
    module, region, x = made("resnet", {})
    texts = [
        [
            s["statistics"]["histogram"]["packed"]
            for s in module.state_dict()[KEY]["statistics"].values()
            if "statistics" in s
        ]
        for _ in range(2)
    ]
    assert all(one is other for one, other in zip(*texts, strict=True))
    with region.state("observe"):
        module(9 * x)
    name = region.plan.points[0].name
    assert module.state_dict()[KEY]["statistics"][name]["statistics"]["histogram"]["high"] == [float((9 * x).max())]
