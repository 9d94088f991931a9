"""Branches that start at zero: they stay float until training moves a parameter, and then take their scale from it.

Issue 12, number seven. Siblings: the second matrix of LoRA, the last layer or the last batch norm of a residual branch,
ReZero, LayerScale, a gate by tanh or sigmoid, a zero position embedding, a weight alone (a zero head).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_qat import check
from lightning_qat.export.plan_files import plan_document
from lightning_qat.quantization.region.calibration import CalibrationResult, calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    """A trunk and what a function makes of a branch beside it."""

    def __init__(self, function: Callable[..., Tensor], zero: str, **parts: Any) -> None:
        super().__init__()
        self.trunk = nn.Linear(8, 8)
        for name, part in parts.items():
            setattr(self, name, part)
        nn.init.zeros_(self.get_parameter(zero))
        self.head = nn.Linear(8, 4)
        self.function = function
        self.zero = zero

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x).relu()
        return self.head(self.function(self, x))


def linear(**kwargs: Any) -> nn.Linear:
    return nn.Linear(8, 8, **kwargs)


def vector(size: int = 8) -> nn.Parameter:
    return nn.Parameter(torch.ones(size))


def zero_norm() -> nn.Module:
    return nn.Sequential(linear(), nn.BatchNorm1d(8))


KINDS: dict[str, Callable[[], Branch]] = {
    "lora": lambda: Branch(lambda m, x: x + 2.0 * m.b(m.a(x)), "b.weight", a=linear(), b=linear(bias=False)),
    "lora by products": lambda: Branch(lambda m, x: x + (x @ m.a.T) @ m.b.T, "b", a=linear().weight, b=linear().weight),
    "residual layer": lambda: Branch(lambda m, x: x + m.b(m.a(x)).relu() * 1.5, "b.weight", a=linear(), b=_no_bias()),
    "residual norm": lambda: Branch(lambda m, x: x + m.b(x).tanh(), "b.1.weight", b=zero_norm()),
    "rezero": lambda: Branch(lambda m, x: x + m.alpha * m.a(x).tanh(), "alpha", a=linear(), alpha=vector(1)),
    "layer scale": lambda: Branch(lambda m, x: x + m.gamma * F.gelu(m.a(x)), "gamma", a=linear(), gamma=vector()),
    "tanh gate": lambda: Branch(lambda m, x: x + m.gate.tanh() * m.a(x), "gate", a=linear(), gate=vector(1)),
    "position embedding": lambda: Branch(lambda m, x: m.a(x).tanh() + m.pos, "pos", a=linear(), pos=vector()),
    "through data movement": lambda: Branch(
        lambda m, x: x + m.b(x).view(-1, 2, 4).transpose(1, 2).reshape(-1, 8).tanh(), "b.weight", b=_no_bias()
    ),
    "sigmoid": lambda: Branch(lambda m, x: x * (y := m.b(x).sigmoid()) + (y - 0.5), "b.weight", b=_no_bias()),
}


def _no_bias() -> nn.Linear:
    return linear(bias=False)


def calibrated(module: nn.Module, **settings: Any) -> tuple[Region, CalibrationResult]:
    region = insert(module, (X,), **settings)
    return region, calibrate(region, [X])


def grow(module: nn.Module, name: str, size: float = 1.0) -> None:
    """What training makes of the parameter."""
    with torch.no_grad():
        parameter = module.get_parameter(name)
        parameter.copy_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def train(module: nn.Module, steps: int, name: str, lr: float = 0.02) -> None:
    """The parameter grows from zero, as under an optimizer."""
    module.train()
    target = torch.randn(module.get_parameter(name).shape, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        module(X)
        with torch.no_grad():
            module.get_parameter(name).add_(lr * target)


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_at_zero_is_float_and_says_so_once(kind: str) -> None:
    torch.manual_seed(0)
    net = KINDS[kind]().eval()
    plain = copy.deepcopy(net)
    region, result = calibrated(net)
    assert "zero in every batch" not in "".join(result.messages)
    (message,) = [m for m in result.messages if "does not vary as long as the parameter" in m]
    assert net.zero in message
    waiting = [name for name, point in region.points.items() if point.starts_at_zero]
    assert waiting
    assert all(region.points[name].scale_source is None for name in waiting)
    rest = insert(plain, (X,))
    calibrate(rest, [X])
    assert torch.equal(net(X), plain(X))  # calibrated at the same zeros
    found = {f.kind: f for f in check(region).findings}
    assert found["starts at zero"].severity == "info"
    assert not found.keys() & {"degenerate scale", "not calibrated", "dead channels"}


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_covers_what_training_makes_of_it(kind: str, scheme: str) -> None:
    torch.manual_seed(0)
    net = KINDS[kind]()
    region, _ = calibrated(net, qconfig={"activation": {"scheme": scheme}})
    waiting = [name for name, point in region.points.items() if point.starts_at_zero]
    train(net, 150, net.zero)
    net(X)
    net.eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with region.tap(lambda name, value, quantized: seen.update({name: (value, quantized)})):
        net(X)
    for name in waiting:
        value, quantized = seen[name]
        assert region.points[name].scale_source is not None, name
        error = (quantized - value).norm() / value.norm()
        assert error < 0.02, (name, float(error))
    assert not [f for f in check(region).findings if f.kind in ("starts at zero", "degenerate scale")]


def test_the_range_widens_at_once_and_shrinks_slowly() -> None:
    net = KINDS["rezero"]()
    region, _ = calibrated(net)
    point = region.points["mul_0.output"]
    net.train()
    ranges = []
    for size in (0.5, 2.0, 1.0, 0.0):
        with torch.no_grad():
            net.get_parameter("alpha").fill_(size)
            net(X)
        ranges.append(float(point.scale))
    assert [r / ranges[0] for r in ranges] == pytest.approx([1.0, 4.0, 3.98, 3.98], rel=0.01)


def test_evaluation_and_frozen_scales_take_none() -> None:
    net = KINDS["lora"]()
    region, _ = calibrated(net)
    grow(net, net.zero)
    expected = region.points["b.output"]
    net.eval()
    net(X)
    assert expected.scale_source is None  # float rather than clipped
    net.train()
    region.switches.first_scales = False
    net(X)
    assert expected.scale_source is None
    region.switches.first_scales = True
    region.freeze("b")
    net(X)
    assert expected.scale_source is None
    region.unfreeze()
    net.train()
    net(X)
    assert expected.scale_source is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        net = KINDS["lora"]()
        inner = net.function
        net.function = lambda m, x: function(lambda y: inner(m, y), x)
        calibrated(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        net.train()
        for _ in range(5):
            optimizer.zero_grad()
            net(X).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    plain = run(lambda f, x: f(x))
    again = run(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, again))


def test_a_new_calibration_forgets_the_start() -> None:
    net = KINDS["lora"]()
    region, _ = calibrated(net)
    grow(net, net.zero)
    calibrate(region, [X])
    assert not any(point.starts_at_zero for point in region.points.values())
    assert region.points["b.output"].scale_source == "mse"


def test_another_dtype_takes_the_range_that_training_has_shown() -> None:
    net = KINDS["lora"]()
    region, _ = calibrated(net)
    region.compute_scales(dtype="int16")
    assert region.points["b.output"].scale_source is None
    train(net, 3, net.zero)
    before = float(region.points["b.output"].scale)
    region.points["b.output"].change_dtype("int8")
    assert float(region.points["b.output"].scale) == pytest.approx(before * 32767 / 127)


def test_checkpoint_in_the_middle(tmp_path: Path) -> None:
    """Before the first value and after it, the start goes on as if nothing had happened."""
    torch.manual_seed(0)
    net = KINDS["lora"]()
    calibrated(net)
    for steps in (0, 1, 7):
        train(net, steps, net.zero)
        torch.save(net.state_dict(), tmp_path / "net.pt")
        other = KINDS["lora"]()
        region = insert(other, (X,))
        other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
        region.set_state("quantize")
        for both in (net, other):
            train(both, 3, net.zero)
        assert torch.equal(net.eval()(X), other.eval()(X))


def test_checkpoints_of_earlier_releases_have_no_such_points() -> None:
    region, _ = calibrated(KINDS["lora"]())
    point = region.points["trunk.input0"]
    state = point.get_statistics_state()
    point.load_statistics_state({k: v for k, v in state.items() if k not in ("starts_at_zero", "batches_from_zero")})
    assert not point.starts_at_zero


def test_the_exported_plan_has_no_scale_until_there_is_one() -> None:
    net = KINDS["lora"]()
    region, _ = calibrated(net)

    def exported() -> Any:
        points = plan_document({"": region})["regions"][""]["points"]
        return {p["name"]: (p["scale"], p["scale_source"]) for p in points}

    assert exported()["b.output"] == (None, None)
    train(net, 3, net.zero)
    scale, source = exported()["b.output"]
    assert (scale, source) == (pytest.approx(float(region.points["b.output"].scale)), "minmax")


# -- scales that move on their own


@pytest.mark.parametrize("kind", ["lora", "layer scale"])
def test_learned_scales_start_where_the_values_are(kind: str) -> None:
    torch.manual_seed(0)
    net = KINDS[kind]()
    region = insert(net, (X,))
    region.learn_scales()
    calibrate(region, [X])
    waiting = [name for name, point in region.points.items() if point.starts_at_zero]
    parameters = [region.points[name].scale for name in waiting]
    train(net, 2, net.zero)
    net(X).sum().backward()
    for name, parameter in zip(waiting, parameters, strict=True):
        assert region.points[name].scale is parameter
        assert parameter.grad is not None
    train(net, 100, net.zero)
    before = [parameter.detach().clone() for parameter in parameters]
    train(net, 3, net.zero, lr=-0.5)
    assert all(map(torch.equal, before, parameters))  # from now on by gradient alone


def test_moving_averages_go_on_from_the_range_of_the_start() -> None:
    net = KINDS["lora"]()
    region, _ = calibrated(net)
    region.set_state("quantize", updates=("weight", "activation"))
    train(net, 103, net.zero)
    point = region.points["b.output"]
    before = float(point.scale)
    grow(net, net.zero, size=100.0)
    net(X)
    assert 1.0 < float(point.scale) / before < 3.0  # a hundredth of the way


@pytest.mark.parametrize("learned", [False, True])
def test_zero_weights_whose_scales_are_fixed_or_learned(learned: bool) -> None:
    net = KINDS["lora"]()
    region = insert(net, (X,))
    if learned:
        region.learn_scales({"weight"})
    calibrate(region, [X])
    region.set_state("quantize", updates=())
    train(net, 5, net.zero)
    net(X)
    largest = net.get_parameter(net.zero).detach().abs().amax(1)
    torch.testing.assert_close(region.points["b.weight"].scale.detach() * 127, largest)


def test_a_zero_head_is_a_weight_alone() -> None:
    """Its result leaves in float32, so that there is nothing to warn of."""
    net = nn.Sequential(linear(), nn.ReLU(), nn.Linear(8, 4))
    nn.init.zeros_(net[2].weight)
    region, result = calibrated(net)
    assert result.findings == ()
    train(net, 2, "2.weight")
    net(X)
    assert region.points["2.weight"].scale_source is not None


# -- what is no start


def _dead_relu() -> nn.Module:
    net = nn.Sequential(linear(), nn.ReLU(), nn.Linear(8, 4))
    nn.init.constant_(net[0].bias, -100.0)
    nn.init.zeros_(net[2].bias)
    return net


class Masked(nn.Module):
    """The data do not reach the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), nn.Linear(8, 4)
        nn.init.zeros_(self.a.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a((x - x).tanh() * 3.0))


def _frozen() -> nn.Module:
    net = KINDS["lora"]()
    net.get_parameter(net.zero).requires_grad_(False)
    return net


@pytest.mark.parametrize("make", [_dead_relu, Masked, _frozen])
def test_zeros_that_training_does_not_explain_are_reported_as_before(make: Callable[[], nn.Module]) -> None:
    region, result = calibrated(make())
    assert "constant" in {f.kind for f in result.findings}
    assert not any(point.starts_at_zero for point in region.points.values())


def test_a_scale_that_the_user_has_fixed_stays() -> None:
    rule = {"match": "b.output", "activation": {"fixed_scale": 0.5}}
    region, _ = calibrated(KINDS["lora"](), overrides=[rule])
    assert float(region.points["b.output"].scale) == 0.5
