"""Splitting modules that are registered at several places: nothing changes but their names (A6)."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.shared_modules import split_shared_modules
from lightning_qat.quantization.tracing.tracer import trace
from tests.quantization.models import calibrated


class Block(nn.Module):
    def __init__(self, act: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 3, padding=1), norm, act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.norm(self.conv(x)))
        return y


class Shares(nn.Module):
    """One activation, one batch norm and one dropout everywhere; a whole block under two names; a list of one."""

    def __init__(self) -> None:
        super().__init__()
        act, norm = nn.ReLU(), nn.BatchNorm2d(4)
        self.one = Block(act, norm)
        self.two = Block(act, norm)
        self.again = self.two
        self.drop = self.also_drop = nn.Dropout(0.3)
        linear = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.layers = nn.ModuleList([linear, linear])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.again(self.also_drop(self.two(self.one(x))))).mean((2, 3))
        for layer in self.layers:
            x = torch.relu(layer(x))
        y: Tensor = self.head(x)
        return y


X = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))


def pair() -> tuple[Shares, Shares]:
    torch.manual_seed(0)
    module = Shares()
    return module, copy.deepcopy(module)


def step(module: nn.Module, train: bool) -> list[Any]:
    """Output, gradients, and everything after an optimizer step."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    output = module.train(train)(X)
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    optimizer.step()
    return [output, gradients, dict(module.state_dict())]


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    else:
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_outputs_gradients_and_steps_stay_bit_for_bit(train: bool) -> None:
    module, split = pair()
    report = split_shared_modules(split)
    assert [(s.path, s.copies) for s in report.split] == [
        ("one.norm", ("two.norm",)),
        ("one.act", ("two.act",)),
        ("two", ("again",)),
        ("drop", ("also_drop",)),
        ("layers.0", ("layers.1",)),
    ]
    assert report.kept == ()
    modules = [m for _, m in split.named_modules(remove_duplicate=False)]
    assert len(modules) == len({id(m) for m in modules})
    for _ in range(2):
        assert_equal(step(module, train), step(split, train))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.double().float(),
        lambda m: m.load_state_dict({k: v + 0.5 for k, v in m.state_dict().items() if v.is_floating_point()}, False),
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
        lambda m: nn.init.ones_(m.two.conv.weight),
        lambda m: setattr(m.one.norm, "running_mean", torch.ones(4)),
    ],
    ids=["types", "load", "load and assign", "in place", "new buffer"],
)
def test_tensors_stay_tied_whatever_replaces_them(change: Callable[[Any], object]) -> None:
    """Buffers are replaced by .to(), unlike parameters: batch norm statistics must not drift apart."""
    module, split = pair()
    split_shared_modules(split)
    change(module)
    change(split)
    assert_equal(step(module, True), step(split, True))
    assert split.one.norm.running_mean is split.again.norm.running_mean


def test_checkpoints_of_both_fit_each_other() -> None:
    module, split = pair()
    split_shared_modules(split)
    step(module, True)
    split.load_state_dict(module.state_dict(), strict=True)
    assert_equal(dict(split.state_dict()), dict(module.state_dict()))
    module.load_state_dict(split.state_dict(), strict=True)


def test_copies_stay_tied_in_copies_and_pickles() -> None:
    module, split = pair()
    for m in (module, split):  # torch does not pickle parametrizations
        m.layers = nn.ModuleList([linear := nn.Linear(4, 4), linear])
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    split_shared_modules(split)
    copies = (copy.deepcopy(split), pickle.loads(pickle.dumps(split)))
    expected = step(module, True)
    for copied in copies:
        assert_equal(step(copied, True), expected)


def test_every_place_has_its_own_name_in_the_graph() -> None:
    """What a finding about shared modules looks at: op scopes with @k whose place has another name."""
    module, split = pair()
    split_shared_modules(split)
    before, after = (trace(m, [X]) for m in (module, split))
    assert {op.scope for op in before.ops if "@" in op.scope} >= {"one.act@1", "two@1.conv", "layers.0@1"}
    assert not [op.scope for op in after.ops if "@" in op.scope]
    names = [op.name for op in after.ops if op.kind == "relu"]
    assert names[:3] == ["one.act", "two.act", "again.act"]


def test_overrides_can_name_each_place_and_weights_still_share_one_scale() -> None:
    """A6: activations have a scale per call, a weight has one however often it is used."""
    _, split = pair()
    rule = {"match": "again.act", "activation": {"dtype": "int16"}}
    with pytest.raises(ConfigurationError, match="matches no quantization point"):
        insert(copy.deepcopy(split), (X,), overrides=[rule])
    split_shared_modules(split)
    region = calibrated(split, X, overrides=[rule])
    dtypes = {name: region.points[f"{name}.output"].dtype for name in ("one.act", "two.act", "again.act")}
    assert dtypes == {"one.act": "int8", "two.act": "int8", "again.act": "int16"}
    assert region.points["two.conv.weight"] is region.points["again.conv.weight"]


def test_hooks_there_already_run_at_every_place_and_new_ones_at_one() -> None:
    split = Shares()
    seen: list[str] = []
    split.one.act.register_forward_hook(lambda *_: seen.append("old"))
    split_shared_modules(split)
    split.two.act.register_forward_hook(lambda *_: seen.append("new"))
    split(X)
    assert seen == ["old", "old", "new", "old"]


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.total = self.total + 1  # a buffer: tied
        return self._advance(x)

    def _advance(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_what_keeps_state_of_its_own_is_left_shared() -> None:
    counts, lazy = Counts(), nn.LazyLinear(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(nn.ReLU())
    module = nn.Sequential(counts, nn.Sequential(counts), lazy, lazy, script, script)
    report = split_shared_modules(module)
    assert report.split == ()
    assert [(k.path, k.copies, k.reason) for k in report.kept] == [
        (
            "0",
            ("1.0",),
            "Counts assigns attribute calls in its forward, and all its places share that value",
        ),
        ("2", ("3",), "LazyLinear has no parameters before its first batch: run one first"),
        ("4", ("5",), "RecursiveScriptModule is a script module, which cannot be copied without its tensors"),
    ]
    assert module[0] is module[1][0]


def test_assigned_buffers_are_no_obstacle() -> None:
    class Total(Counts):
        def _advance(self, x: Tensor) -> Tensor:
            return x * self.total

    torch.manual_seed(0)
    one = Total()
    module = nn.Sequential(one, nn.Tanh(), one)
    other = copy.deepcopy(module)
    assert split_shared_modules(module).split
    assert torch.equal(module(X), other(X))
    assert torch.equal(module(X), other(X))
    assert float(module[0].total) == float(module[2].total) == 4


def test_a_module_called_twice_under_one_name_is_left_alone() -> None:
    """Its calls have activation scales of their own without splitting."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.act(self.fc(self.act(x)) * 9) + 1
            return y

    module = Twice()
    report = split_shared_modules(module)
    assert report.split == report.kept == ()
    region = calibrated(module, torch.randn(8, 4))
    assert region.points["act.output"] is not region.points["act@1.output"]


def test_module_that_contains_itself_is_kept() -> None:
    outer = nn.Sequential(nn.ReLU())
    outer[0].add_module("back", outer)
    report = split_shared_modules(nn.Sequential(outer))
    assert [k.reason for k in report.kept] == ["it contains itself"]


def test_after_insertion_it_is_too_late() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    insert(module, (torch.ones(1, 2),))
    with pytest.raises(ConfigurationError, match="split before inserting"):
        split_shared_modules(module)
