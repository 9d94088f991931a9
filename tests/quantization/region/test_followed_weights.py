"""Scales of weights computed before a training forward, against those computed by the op that uses the weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.region.region_runner import RegionRunner
from tests.quantization.models import calibrated


class Kinds(nn.Module):
    """Weights of many kinds: int8 and int4, one scale, groups, shared, computed, and one with a dead channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 8, 1)
        self.transposed = nn.ConvTranspose2d(8, 8, 2, groups=2)
        self.dead = nn.Conv2d(8, 8, 3)
        self.shared = nn.Linear(6, 6)
        self.computed = nn.Parameter(torch.randn(6, 6))
        self.single = nn.Linear(6, 2)
        nn.init.zeros_(self.dead.weight[3])

    def forward(self, x: Tensor) -> Tensor:
        x = self.dead(self.transposed(self.narrow(F.relu(self.conv(x))))).mean(dim=1)
        x = self.shared(F.gelu(self.shared(x)))
        return self.single(F.linear(x, self.computed * 2).mean(dim=1))


OVERRIDES = [
    {"match": "narrow", "weight": {"dtype": "int4"}},
    {"match": "single", "weight": {"granularity": "per_tensor"}},
]


def kinds() -> tuple[nn.Module, Region, Tensor]:
    torch.manual_seed(0)
    module, x = Kinds(), torch.randn(4, 3, 7, 7)
    return module, calibrated(module, x, overrides=OVERRIDES), x


def trained(module: nn.Module, x: Tensor, steps: int = 4) -> list[Tensor]:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        y = module.train()(x)
        y.square().sum().backward()
        optimizer.step()
        found += [y.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]
    return found


def test_training_has_the_bits_of_scales_computed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of every step, and the scales at the end; the case is a dead channel among the weights."""
    module, _, x = kinds()
    twin = copy.deepcopy(module)
    found = trained(module, x)
    monkeypatch.setattr(RegionRunner, "_follow_weights", lambda _: {})
    for ours, expected in zip(found, trained(twin, x), strict=True):
        assert torch.equal(ours, expected)
    state = twin.state_dict()
    for name, value in module.state_dict().items():
        assert not isinstance(value, Tensor) or torch.equal(value, state[name]), name


def test_after_the_first_training_forward_the_weights_are_followed_together() -> None:
    """All that are usual: the dead channel, one scale for all channels, groups and computed weights are not."""
    module, region, x = kinds()
    assert not region.runner._weights.follow()
    module.train()(x)
    followed = region.runner._weights.follow()
    names = {name for name, point in region.points.items() if point in followed}
    assert names == {"conv.weight", "narrow.weight", "shared.weight", "shared@1.weight"}


def _doubled_in_place(module: nn.Linear) -> None:
    with torch.no_grad():
        module.weight.mul_(2)


def _doubled_data(module: nn.Linear) -> None:
    module.weight.data = 2 * module.weight.data


def _replaced(module: nn.Linear) -> None:
    module.weight = nn.Parameter(2 * module.weight.detach())


class Rewriting(nn.Linear):
    """Changes its weight in every forward, as layers with a constraint do."""

    rewrite: Callable[[nn.Linear], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.rewrite is not None and self.training:
            self.rewrite(self)
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:mul at .* was not seen while tracing")  # the rewriting itself
@pytest.mark.parametrize("rewrite", [_doubled_in_place, _doubled_data, _replaced])
def test_a_weight_that_changes_in_the_forward_has_the_scale_of_what_the_op_uses(
    rewrite: Callable[[nn.Linear], None],
) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(Rewriting(4, 3), nn.ReLU()), torch.randn(8, 4)
    region = calibrated(module, x)
    module[0].rewrite = rewrite  # type: ignore[assignment]
    for _ in range(3):
        module.train()(x)
        used: Tensor = module[0].weight.detach()  # type: ignore[assignment]
        expected = used.abs().amax(dim=1) / 127
        torch.testing.assert_close(region.points["0.weight"].scale, expected, rtol=1e-6, atol=0)


def test_before_compiled_code_runs_all_scales_are_those_of_the_present_weights() -> None:
    """Compiled code takes them as they are: those that are followed together, and all others one by one."""
    module, region, x = kinds()
    trained(module, x)
    module.shared.weight = nn.Parameter(torch.randn(6, 6))  # type: ignore[union-attr]  # which no forward has seen
    region.runner._refresh_weights()
    waiting = {name for name, point in region.points.items() if point.outdated}
    assert waiting == {"linear_0.weight", "shared.weight", "shared@1.weight"}  # the first is computed in every forward
    for name, limit, dims in (("conv", 127, (1, 2, 3)), ("narrow", 7, (1, 2, 3)), ("single", 127, (0, 1))):
        weight: Tensor = module.get_submodule(name).weight.detach()  # type: ignore[assignment, operator]
        found = region.points[f"{name}.weight"].scale
        torch.testing.assert_close(found, weight.abs().amax(dims) / limit, rtol=1e-6, atol=0)


def test_a_parameter_without_memory_is_not_read() -> None:
    """Sharding gathers a weight for a forward, and frees its memory behind it; the parameter stays."""
    module, region, x = kinds()
    module.train()(x)
    memory = module.conv.weight.untyped_storage()  # type: ignore[union-attr]
    memory.resize_(0)
    assert region.points["conv.weight"] not in region.runner._weights.follow()


def test_other_parameters_in_the_call_have_their_own_scales() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(8, 4)
    region = calibrated(module, x)
    module.train()(x)
    others = {name: 3 * p.detach() for name, p in module.named_parameters()}
    torch.func.functional_call(module, others, (x,))
    expected = others["0.weight"].abs().amax(dim=1) / 127
    torch.testing.assert_close(region.points["0.weight"].scale, expected, rtol=1e-6, atol=0)


def test_scales_that_do_not_follow_stay() -> None:
    """In evaluation, frozen, without updates, learned, and under ``torch.func``."""
    torch.manual_seed(0)
    for case in ("eval", "frozen", "no updates", "learned", "torch.func"):
        module, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(8, 4)
        region = calibrated(module, x)
        module.train()(x)
        point = region.points["0.weight"]
        point.outdated = False
        before = point.scale.detach().clone()
        with torch.no_grad():
            module[0].weight.mul_(2)  # type: ignore[operator]
        run: Callable[[Tensor], Any] = module
        if case == "eval":
            module.eval()
        elif case == "frozen":
            point.frozen = True
        elif case == "no updates":
            region.set_state("quantize", updates=())
        elif case == "learned":
            point.learn_scale()
        else:
            run = _of_parameters(module)
        run(x)
        assert torch.equal(point.scale.detach(), before), case


def _of_parameters(module: nn.Module) -> Callable[[Tensor], Any]:
    """The gradient by the parameters, as ``torch.func`` computes it."""

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(module, parameters, (x,)).sum()

    return lambda x: torch.func.grad(loss)({name: p.detach() for name, p in module.named_parameters()}, x)
