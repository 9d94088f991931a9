"""Frozen parts stay at their quantized state, bit for bit, while the rest trains."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region, find_regions
from lightning_qat.quantization.region.regions import freeze


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.act(self.act(self.bn(self.conv(x))) + self.token))
        return y


class TwoStages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.backbone(x))
        return y


X = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def calibrated_stages() -> tuple[TwoStages, Region]:
    torch.manual_seed(0)
    module = TwoStages()
    region = insert(module, (X,))
    calibrate(region, [X])
    region.set_state("quantize", updates=("weight", "activation"))
    return module, region


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        module.train()  # as every epoch of a training loop says it
        optimizer.zero_grad()
        module(X * (1 + step)).square().sum().backward()
        optimizer.step()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def in_backbone(name: str) -> bool:
    return name.startswith(("backbone", "_quantization.fake_quants.backbone"))


@pytest.mark.parametrize(
    "optimizer",
    [adamw, lambda module: torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)],
    ids=["adamw", "sgd with momentum"],
)
def test_backbone_first_then_heads(optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    """Weights, batch norm and scales of the frozen part stay bit for bit, with decay and momentum of earlier steps."""
    module, region = calibrated_stages()
    running = optimizer(module)
    before = state(module)
    train(module, running)
    between = state(module)
    assert {"backbone.conv.weight", "backbone.bn.running_mean"} <= changed(before, between)
    region.freeze("backbone.*")
    output = module.eval().backbone(X)
    train(module, running)
    after = state(module)
    moved = changed(between, after)
    assert not [name for name in moved if in_backbone(name)]
    assert {"head.0.weight", "head.1.running_var", "head.4.bias"} <= moved
    scales = {name for name in moved if name.startswith("_quantization.fake_quants.head") and name.endswith(".scale")}
    assert {"_quantization.fake_quants.head/2/output.scale", "_quantization.fake_quants.head/0/weight.scale"} <= scales
    assert torch.equal(module.backbone(X), output)  # no dropout either, without saying eval() again
    region.unfreeze()
    train(module, running)
    assert {"backbone.conv.weight", "backbone.token", "backbone.bn.running_mean"} <= changed(after, state(module))


def test_learned_scales_stand_still() -> None:
    module, region = calibrated_stages()
    region.freeze(["backbone.*"])
    region.learn_scales()  # also scales that become parameters after freezing
    before = state(module)
    optimizer = adamw(module)
    train(module, optimizer)
    moved = changed(before, state(module))
    assert not [name for name in moved if in_backbone(name)]
    assert "_quantization.fake_quants.head/2/output.scale" in moved
    region.unfreeze()
    assert all(scale.requires_grad for scale in region.learned_scales.values())
    train(module, optimizer)
    assert "_quantization.fake_quants.backbone/conv/weight.scale" in changed(before, state(module))


def test_unfreeze_restores_exactly() -> None:
    module, region = calibrated_stages()
    module.backbone.conv.bias.requires_grad_(False)
    module.head[1].eval()
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    modes = {name: m.training for name, m in module.named_modules()}
    region.freeze(["backbone.conv", "head.1"])
    region.freeze("*")
    assert not any(p.requires_grad for p in module.parameters())
    assert not any(m.training for name, m in module.named_modules() if not name.startswith("_quantization"))
    region.unfreeze()
    assert {name: p.requires_grad for name, p in module.named_parameters()} == flags
    assert {name: m.training for name, m in module.named_modules()} == modes
    assert not any(point.frozen for point in region.points.values())


def test_unfreeze_follows_the_mode_of_the_target() -> None:
    module, region = calibrated_stages()
    region.freeze("backbone")
    module.eval()
    region.unfreeze()
    assert not module.backbone.bn.training


def test_new_calibration_leaves_frozen_scales() -> None:
    _, region = calibrated_stages()
    before = {name: point.scale.clone() for name, point in region.points.items()}
    region.freeze("backbone.*")
    calibrate(region, [5 * X])
    moved = {name for name, scale in before.items() if not torch.equal(region.points[name].scale, scale)}
    assert moved
    assert not [name for name in moved if name.startswith("backbone")]
    assert region.points["backbone.conv.weight"].statistics.count


def test_freezing_before_calibration_gives_a_scale_once() -> None:
    region = insert(TwoStages(), (X,))
    region.freeze("backbone.*")
    assert not calibrate(region, [X]).findings
    assert all(point.scale_source is not None for point in region.points.values())


def test_what_a_pattern_covers() -> None:
    """Names of modules, parameters and points; every call of a module; a weight's scale goes with the weight."""
    module, region = calibrated_stages()

    def frozen(pattern: str) -> tuple[set[str], set[str]]:
        region.freeze(pattern)
        points = {name for name, point in region.points.items() if point.frozen}
        parameters = {name for name, p in module.named_parameters() if not p.requires_grad}
        region.unfreeze()
        return points, parameters

    assert frozen("backbone.act") == ({"backbone.act.output", "backbone.act@1.output"}, set())
    assert frozen("head.0.weight") == ({"head.0.weight"}, {"head.0.weight"})
    assert frozen("*.bias") == (set(), {n for n, _ in module.named_parameters() if n.endswith("bias")})
    assert frozen("head.2.output") == ({"head.2.output"}, set())
    assert frozen("backbone.token") == ({"backbone.add_0.input1"}, {"backbone.token"})
    everything = {n for n in region.points if n.startswith("backbone")}
    assert frozen("backbone.*") == (everything, {n for n, _ in module.named_parameters() if n.startswith("backbone")})
    assert frozen("backbone") == frozen("backbone.*")


def test_tied_parameters_are_frozen_everywhere() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
            self.outer.weight = self.inner.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.tanh(self.outer(torch.tanh(self.inner(x))))
            return y

    module = Tied()
    region = insert(module, (torch.randn(4, 4),))
    region.freeze("outer")
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"inner.weight", "outer.bias"}
    assert {name for name, point in region.points.items() if point.frozen} >= {"inner.weight", "outer.weight"}


def test_pattern_that_matches_nothing_is_an_error_with_near_names() -> None:
    module, region = calibrated_stages()
    with pytest.raises(ConfigurationError, match=r"freeze: 'bakbone\.\*' matches no module.*Near names: .*backbone"):
        region.freeze(["head", "bakbone.*"])
    assert all(p.requires_grad for p in module.parameters())  # nothing is frozen then
    assert not region.freezing


def test_patterns_over_several_regions_may_begin_with_the_target() -> None:
    """Spelled with the target's path, a pattern is about that target alone; else it is relative to each."""
    torch.manual_seed(0)
    module = TwoStages()
    insert(module.backbone, (X,))
    insert(module.head, (module.backbone(X),))
    regions = find_regions(module)

    def frozen(*patterns: str) -> set[str]:
        freeze(regions, patterns)
        names = {name for name, p in module.named_parameters() if not p.requires_grad}
        for region in regions.values():
            region.unfreeze()
        return names

    backbone = {n for n, _ in module.named_parameters() if n.startswith("backbone.")}
    assert frozen("backbone.*") == frozen("backbone") == backbone
    assert frozen("head.0", "bn") == {"head.0.weight", "head.0.bias", "backbone.bn.weight", "backbone.bn.bias"}
    with pytest.raises(ConfigurationError, match=r"'head\.00\.weight' matches no .*Near names: head\.0\.weight"):
        freeze(regions, ["head.00.weight"])


def test_copies_pickles_and_new_plans_stay_frozen() -> None:
    module, region = calibrated_stages()
    region.freeze("backbone")
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        before = state(copied)
        train(copied, adamw(copied))
        assert not [name for name in changed(before, state(copied)) if in_backbone(name)]
        (its,) = find_regions(copied).values()
        its.unfreeze()
        assert all(p.requires_grad for p in copied.parameters())
    assert not module.backbone.conv.weight.requires_grad  # the original still is
    region.set_plan(region.graph, region.plan)
    assert region.points["backbone.conv.weight"].frozen
    module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    region.unfreeze()
    assert module.backbone.conv.weight.requires_grad


def test_remove_gives_back_a_module_that_trains() -> None:
    module, region = calibrated_stages()
    region.freeze("backbone")
    region.remove()
    assert all(p.requires_grad for p in module.parameters())
    assert module.backbone.bn.training


def test_gradients_of_a_step_in_progress_are_dropped() -> None:
    """With set_to_none=False an optimizer would decay a frozen weight."""
    module, region = calibrated_stages()
    optimizer: Any = adamw(module)
    module(X).sum().backward()
    region.freeze("backbone")
    optimizer.zero_grad(set_to_none=False)
    before = module.backbone.conv.weight.detach().clone()
    optimizer.step()
    assert torch.equal(module.backbone.conv.weight, before)
