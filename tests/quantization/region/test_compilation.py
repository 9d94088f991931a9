"""Compiled regions: bit for bit what eager mode computes, one graph for each mode, and never a neighbour's fake-quant.

The backend ``eager`` runs the captured graph op by op, so every difference would be one of capturing. What inductor
makes of a fake-quant is compared in ``tests/quantization/fake_quant/test_compiled.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.quantization.errors import ConfigurationError, PlanMismatchError
from lightning_qat.quantization.interception.dynamic_block import dynamic_block
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.tensor_leaves import leaves
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.quantization.models import ZOO, ResNet, calibrated

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
EAGER = {"backend": "eager"}
QUICK = ["shared"]
FULL = ["attention_weights", "cameras", "resnet", "resnet_inplace", "vit", "transformer_padding", "transformer_causal"]
FULL += ["attention_seq_first", "unet"]


@pytest.fixture(autouse=True)
def no_cache() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def region_of(module: nn.Module, *args: Tensor, qconfig: Any = None, overrides: Any = ()) -> Region:
    region = insert(module, args, qconfig=qconfig, overrides=overrides)
    calibrate(region, [args])
    return region


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in FULL)])
def test_a_compiled_model_has_the_bits_of_the_eager_one_in_both_modes(name: str) -> None:
    torch.manual_seed(0)
    module, args = ZOO[name].make()
    region = calibrated(module, *args)
    eager = copy.deepcopy(module)
    region.set_compile(EAGER)
    for training in (False, True):
        module.train(training)
        eager.train(training)
        for seed in range(3):
            torch.manual_seed(seed)
            expected = eager(*copy.deepcopy(args))
            torch.manual_seed(seed)
            assert same(module(*copy.deepcopy(args)), expected)
    assert graphs() == 2
    assert region.unplanned == {}


class Activations(nn.Module):
    """What dynamo does not hand to modes by itself: in-place functions, ``F.hardswish``, ``F.pad``, ``F.sigmoid``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.conv(F.pad(x, (1, 1, 1, 1))))
        x = torch.relu_(x * F.hardsigmoid(x)) + F.sigmoid(x)
        return F.leaky_relu_(x + 1.0).unflatten(1, (2, 2)).flatten(1)


def trained(module: nn.Module, images: Tensor, steps: int = 4) -> list[Tensor]:
    """Losses and outputs of a training with evaluations in between."""
    optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = module.train()(images).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
        if step % 2:
            with torch.no_grad():
                found.append(module.eval()(images))
    return found


@pytest.mark.parametrize(
    ("learned", "updates", "qconfig"),
    [
        ((), ("weight",), None),
        pytest.param((), (), None, marks=pytest.mark.full),
        ((), ("weight", "activation"), None),
        (("weight", "activation"), (), None),
        ((), ("weight",), {"weight": {"granularity": "per_tensor"}}),  # batch norm is folded into the weight
        pytest.param(
            (), ("weight", "activation"), {"activation": {"scheme": "affine", "dtype": "uint8"}}, marks=pytest.mark.full
        ),
    ],
    ids=["weights", "fixed", "ema", "learned", "folded", "affine"],
)
def test_a_training_is_the_same_bit_for_bit_however_scales_move(
    learned: Any, updates: Any, qconfig: dict[str, Any] | None
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    region = region_of(module, IMAGES, qconfig=qconfig)
    region.learn_scales(learned)
    region.set_state("quantize", updates=updates)
    eager = copy.deepcopy(module)
    region.set_compile(EAGER)
    expected = trained(eager, IMAGES)
    assert same(trained(module, IMAGES), expected)
    assert graphs() == 2
    other = eager._quantization
    assert isinstance(other, Region)
    for name, point in region.points.items():
        assert torch.equal(point.scale, other.points[name].scale), name
    state, expected_state = region.get_extra_state(), other.get_extra_state()
    assert state["statistics"] == expected_state["statistics"]


def test_every_function_reaches_its_fake_quants() -> None:
    module = Activations()
    region = region_of(module, IMAGES)
    eager = copy.deepcopy(module)
    region.set_compile(EAGER)
    assert same(trained(module, IMAGES), trained(eager, IMAGES))
    assert graphs() == 2


def twice(module: nn.Module, *args: Tensor) -> None:
    """The first forward is eager."""
    module(*args)
    module(*args)


class Switched(nn.Module):
    """Two branches with the same kinds of ops, more ops, and fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, how: str = "") -> Tensor:
        if how == "swapped":
            x = F.relu(self.b(x))
            x = F.relu(self.a(x))
        else:
            x = F.relu(self.a(x))
            x = F.relu(self.b(x))
        if how == "more":
            x = torch.tanh(x)
        return x if how == "fewer" else x * 2


@pytest.mark.parametrize("how", ["swapped", "more", "fewer"])
def test_another_order_is_learned_in_eager_mode_first(how: str) -> None:
    """A forward whose ops no eager forward has run is never given the fake-quants of their neighbours."""
    module = Switched()
    calls = [Call.of(X), Call((X,), {"how": how})]
    region = insert(module, batches=calls)
    calibrate(region, calls)
    region.runner.sequences.__init__(region.runner.sequences.target_type)  # type: ignore[misc]  # nothing has run yet
    region.set_compile(EAGER)
    eager = copy.deepcopy(module)
    with torch.no_grad():
        for value in ("", "", how, "", how, how):
            assert same(module(X, how=value), eager(X, how=value))
    assert graphs() == 3  # a second sequence compiles the first anew


def test_a_forward_that_differs_under_torch_compile_alone_is_one_error_with_both_ops() -> None:
    class Differs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling():
                x = self.b(x)
                return self.a(x)
            x = self.a(x)
            return self.b(x)

    module = Differs()
    region = region_of(module, X)
    region.set_compile(EAGER)
    with pytest.raises(
        PlanMismatchError,
        match=r"Differs cannot be compiled: .* linear at .*test_compilation.py:\d+ ran where linear at "
        r".*test_compilation.py:\d+ ran in eager mode. Leave that part out of the target, or write compile: false",
    ):
        twice(module.eval(), X)
    region.set_compile(False)
    with torch.no_grad():
        assert same(module(X), copy.deepcopy(module)(X))


class Rounds(nn.Module):
    """A loop with another number of rounds in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.rounds = 1

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.rounds):
            with dynamic_block(self, "round"):
                x = self.layer(x)
        return x


def test_a_loop_with_a_fixed_number_of_rounds_is_compiled() -> None:
    module = Rounds()
    module.rounds = 3
    region = region_of(module, X)
    region.set_compile(EAGER)
    with torch.no_grad():
        expected = module.eval()(X)
        assert same(module(X), expected)
    assert graphs() == 1


def test_what_varies_from_forward_to_forward_is_refused_with_its_line() -> None:
    module = Rounds()
    region = insert(module, (X,))
    region.set_state("observe")
    for module.rounds in range(1, 12):
        module(X)
    region.compute_scales()
    region.set_state("quantize")
    region.set_compile(True)
    with pytest.raises(
        ConfigurationError, match=r"differs from forward to forward at linear at .*:\d+.*compile: false"
    ):
        module(X)


def test_what_torch_cannot_capture_is_one_error() -> None:
    module, args = ZOO["branching"].make()
    region = calibrated(module, *args)
    region.set_compile(EAGER)
    with pytest.raises(ConfigurationError, match="Branching cannot be compiled as one graph: Data-dependent branching"):
        twice(module.eval(), *args)


@pytest.mark.parametrize("name", ["branching", "recurrent"])
def test_a_graph_that_breaks_within_the_users_own_compile_is_one_error(name: str) -> None:
    module, args = ZOO[name].make()
    region = calibrated(module, *args)
    with torch.no_grad():
        expected = module.eval()(*args)
        with pytest.raises(PlanMismatchError, match=r"is not captured as one graph: .* or write compile: false"):
            torch.compile(module, **EAGER)(*args)
        region.set_compile(False)
        torch._dynamo.reset()
        assert same(torch.compile(module, **EAGER)(*args), expected)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(m, nn.Softmax(-1))], ids=["target", "around"])
def test_the_users_own_compile_captures_the_region(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    region = calibrated(ResNet(), IMAGES)
    outer = wrap(region.target.eval())
    with torch.no_grad():
        expected = outer(IMAGES)
        assert same(torch.compile(outer, fullgraph=True, **EAGER)(IMAGES), expected)
    assert graphs() == 1


def test_the_users_own_compile_captures_the_first_training_step() -> None:
    """Tracing has seen the order of the ops: after calibration, which is eval mode, no forward has to run eagerly.

    The scales in a checkpoint are those of the weights after the last step, as they are in eager mode.
    """
    torch.manual_seed(0)
    region = calibrated(ResNet(), IMAGES)
    module = region.target
    eager = copy.deepcopy(module)
    module.compile(fullgraph=True, **EAGER)
    assert same(trained(module, IMAGES), trained(eager, IMAGES))
    assert not torch._dynamo.utils.counters["graph_break"]
    trained(module, IMAGES, 1)
    trained(eager, IMAGES, 1)
    assert_same_state(module, eager)


def assert_same_state(module: nn.Module, other: nn.Module) -> None:
    state, expected = module.state_dict(), other.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    assert tensors.keys() <= expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())


class PartsOfParameters(nn.Module):
    """A weight that is a slice of a parameter, and a square one that is used transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.square = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.both[:4])) @ self.square.t()


def test_parts_of_parameters_have_the_scales_of_eager_mode_under_the_users_own_compile() -> None:
    """A forward in eager mode comes first there: only that can note which part a weight is."""
    torch.manual_seed(0)
    module = PartsOfParameters()
    region_of(module, X)
    eager = copy.deepcopy(module)
    module.compile(**EAGER)
    assert same(trained(module, X), trained(eager, X))
    trained(module, X, 1)
    trained(eager, X, 1)
    assert_same_state(module, eager)


@pytest.mark.parametrize("how", ["swapped", "more", "fewer"])
def test_the_users_own_compile_refuses_another_order_than_the_traced_one(how: str) -> None:
    module = Switched()
    region_of(module, X)
    module.compile(**EAGER)
    with torch.no_grad(), pytest.raises((PlanMismatchError, torch._dynamo.exc.TorchDynamoException)) as raised:
        module.train()(X, how=how)
    assert "cannot be compiled: while its forward was captured" in str(raised.value)


def test_in_an_analysis_nothing_is_compiled() -> None:
    """Taps and replaced modes would see nothing. The results are those of a region that is not compiled."""
    torch.manual_seed(0)
    region = calibrated(ResNet(), IMAGES)
    expected = sensitivity(region, [Call.of(IMAGES)])
    region.set_compile(EAGER)
    seen: list[str] = []
    with torch.no_grad():
        region.target.eval()(IMAGES)
        region.target(IMAGES)
        assert graphs() == 1
        with region.tap(lambda name, *_: seen.append(name)):
            region.target(IMAGES)
    assert set(seen) == set(region.points)
    assert sensitivity(region, [Call.of(IMAGES)]).rows == expected.rows
    assert graphs() == 1


def test_a_copy_runs_eagerly_and_has_its_own_weights() -> None:
    region = calibrated(ResNet(), IMAGES)
    region.set_compile(EAGER)
    module = region.target.eval()
    with torch.no_grad():
        module(IMAGES)
        twin = copy.deepcopy(module)
        for parameter in twin.parameters():
            parameter.zero_()
        assert not same(twin(IMAGES), module(IMAGES))
    assert graphs() == 1


def test_a_frozen_part_stays_frozen() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    region = region_of(module, IMAGES)
    region.freeze(["0", "1"])
    eager = copy.deepcopy(module)
    region.set_compile(EAGER)
    assert same(trained(module, IMAGES), trained(eager, IMAGES))
    assert not module[1].training


def test_a_part_that_is_frozen_for_a_while_moves_as_in_eager_mode_afterwards() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    region = region_of(module, IMAGES)
    eager = copy.deepcopy(module)
    region.set_compile(EAGER)
    for model in (module, eager):
        own = model._quantization
        assert isinstance(own, Region)
        trained(model, IMAGES, 2)
        own.freeze("0")
        trained(model, IMAGES, 2)
        own.unfreeze()
    with torch.no_grad():
        assert same(module.eval()(IMAGES), eager.eval()(IMAGES))
    assert same(trained(module, IMAGES, 2), trained(eager, IMAGES, 2))


def test_a_parameter_that_is_replaced_has_the_scale_of_its_own_values() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    region = region_of(module, X)
    eager = copy.deepcopy(module)
    region.set_compile(EAGER)
    for model in (module, eager):
        trained(model, X, 2)
        with torch.no_grad():
            model[0].weight = nn.Parameter(3 * model[0].weight)
    assert same(trained(module, X, 3), trained(eager, X, 3))


def test_a_point_that_begins_at_zero_takes_its_first_scales_in_eager_mode() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            nn.init.zeros_(self.b.weight)
            nn.init.zeros_(self.b.bias)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(F.relu(self.a(x)))

    torch.manual_seed(0)
    module = Branch()
    region = region_of(module, X)
    assert any(point.starts_at_zero for point in region.points.values())
    eager = copy.deepcopy(module)
    region.set_compile(EAGER)
    assert same(trained(module, X, 6), trained(eager, X, 6))


def test_other_batch_sizes_and_other_options() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    region = region_of(module, IMAGES)
    eager = copy.deepcopy(module).eval()
    region.set_compile({**EAGER, "dynamic": True})
    with torch.no_grad():
        for size in (4, 4, 3, 2):
            assert same(module.eval()(IMAGES[:size]), eager(IMAGES[:size]))
