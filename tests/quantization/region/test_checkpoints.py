"""Plans and scales in checkpoints: the stored plan wins, and what does not fit is said (foundation 1, Bad input)."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.quantization.errors import PlanMismatchError
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.numerics.range_search import expected_error
from lightning_qat.quantization.numerics.scales import MAX_SCALE, MIN_SCALE
from lightning_qat.quantization.planning.plan_compatibility import (
    STATE_VERSION,
    plan_differences,
    read_extra_state,
    rebound,
)
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import attach, insert
from lightning_qat.quantization.tracing.tracer import trace
from tests.quantization.models import MINMAX, ZOO, ResNet, calibrated

IMAGE = torch.randn(4, 1, 8, 8)
KEY = "_quantization._extra_state"

SOURCE = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def helper(self, x):
        return x * 2

    def forward(self, x, flag=False):
        x = self.helper(self.a(x)) + 1
        return self.b(torch.tanh(x))
"""


def model(source: str = SOURCE) -> nn.Module:
    namespace: dict[str, Any] = {"torch": torch, "nn": nn, "__name__": "net"}
    exec(compile(source, "net.py", "exec"), namespace)
    torch.manual_seed(0)
    return namespace["Net"]()  # type: ignore[no-any-return]


def edited(*changes: tuple[str, str]) -> nn.Module:
    source = SOURCE
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    return model(source)


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def test_plan_of_the_checkpoint_wins() -> None:
    """foundation: restored into a module that was inserted with another configuration."""
    module = ResNet().eval()
    overrides = [{"match": "layers.1", "activation": {"dtype": "int16"}}, {"match": "fc", "weight": {"dtype": "int4"}}]
    region = calibrated(module, IMAGE, overrides=overrides)
    fresh = ResNet().eval()
    other = insert(fresh, (IMAGE,), qconfig={"activation": {"dtype": "int4"}, "weight": {"granularity": "per_tensor"}})
    fresh.load_state_dict(module.state_dict())
    assert other.plan == region.plan
    assert other.points["layers.1.relu.output"].dtype == "int16"
    assert other.points["fc.weight"].dtype == "int4"
    other.set_state("quantize")
    assert torch.equal(fresh(IMAGE), module(IMAGE))
    # and it can be calibrated and saved once more
    assert other.compute_scales() == ()
    assert torch.equal(fresh(IMAGE), module(IMAGE))
    assert read_extra_state(fresh.state_dict()[KEY])[1] == region.plan


@pytest.mark.parametrize(
    ("observer", "dtype"), [("minmax", "int4"), ("ema", "int8"), ("mse", "int4"), ("percentile", "int8")]
)
def test_statistics_come_with_the_checkpoint(observer: str, dtype: str) -> None:
    """foundation: scales can be derived with another method or dtype without recalibrating.

    Extremes and averages are exact, and so are weights, whose statistics are taken again. A checkpoint has room for
    fewer bins than memory: a percentile comes as close as a bin is wide, and a search finds a scale that is as good.
    """
    torch.manual_seed(0)
    module, fresh = ResNet().eval(), ResNet().eval()
    region = calibrated(module, IMAGE)
    other = insert(fresh, (IMAGE,))
    fresh.load_state_dict(module.state_dict())
    for r in (region, other):
        assert r.compute_scales(observer, dtype) == ()
    for name, point in region.points.items():
        restored = other.points[name]
        assert restored.dtype == dtype
        if observer in ("minmax", "ema") or region.plan.by_name[name].is_weight:
            assert torch.equal(point.scale, restored.scale), name
        elif observer == "percentile":
            difference = (point.scale - restored.scale).abs() * point.quant_max
            assert float(difference) <= float(restored.statistics.histogram.width), name
        else:
            histogram, limits = point.statistics.histogram, (point.quant_min, point.quant_max)
            scales = [p.scale.double().reshape(1, 1) for p in (point, restored)]
            best, error = (float(expected_error(histogram, s, torch.zeros(1, 1), *limits)) for s in scales)
            assert error <= 1.02 * best, name


def test_checkpoint_can_be_attached_without_tracing() -> None:
    """foundation: a module that is rebuilt from its checkpoint alone."""
    module = ResNet().eval()
    calibrated(module, IMAGE)
    state = module.state_dict()
    fresh = ResNet().eval()
    region = attach(fresh, *read_extra_state(state[KEY]), traced=False)
    fresh.load_state_dict(state)
    region.set_state("quantize")
    assert torch.equal(fresh(IMAGE), module(IMAGE))
    assert region.unplanned == {}


@pytest.mark.parametrize("name", ["vit", "transformer_padding", "shared", "cameras_annotated", "unet"])
def test_models_of_the_zoo_can_be_attached_without_tracing(name: str) -> None:
    module, args = ZOO[name].make()
    calibrated(module, *args)
    fresh, _ = ZOO[name].make(seed=3)
    region = attach(fresh, *read_extra_state(module.state_dict()[KEY]), traced=False)
    fresh.load_state_dict(module.state_dict())
    region.set_state("quantize")
    with torch.no_grad():
        a, b = module.eval()(*args), fresh.eval()(*args)
    assert torch.equal(a["map"] if name == "unet" else a, b["map"] if name == "unet" else b)


def test_attached_without_tracing_to_other_code_is_an_error_at_the_op() -> None:
    """Bad input: a plan that does not fit the code must not run half in float."""
    module = model()
    calibrated(module, X)
    fresh = edited(("x * 2", "x * 2 - 1"))
    region = attach(fresh, *read_extra_state(module.state_dict()[KEY]), traced=False)
    fresh.load_state_dict(module.state_dict())
    region.set_state("quantize")
    with pytest.raises(
        PlanMismatchError, match=r"restored plan of Net does not know (mul|sub|rsub) at .*net\.py:\d+.*"
    ):
        fresh(X)


def test_edited_code_with_the_same_ops_is_matched_by_name() -> None:
    """foundation: a print, an assertion, another torch version move the identities, not the ops."""
    module = model()
    calibrated(module, X)
    fresh = edited(
        ("x = self.helper(self.a(x)) + 1", "assert not flag\n        y = self.a(x)\n        x = self.helper(y) + 1")
    )
    region = insert(fresh, (X,), qconfig={"activation": {"dtype": "int4"}})
    fresh.load_state_dict(module.state_dict())
    region.set_state("quantize")
    assert torch.equal(fresh(X), module(X))
    assert region.unplanned == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("x * 2", "x * 2 - 1"), r"helper|sub_0: sub is in the code \(net\.py:\d+\), not in the checkpoint"),
        (("torch.tanh(x)", "x"), r"tanh_0: tanh is in the checkpoint, not in the code"),
        (("torch.tanh(x)", "torch.sigmoid(x)"), r"tanh_0: tanh is in the checkpoint"),
        (("x * 2", "x / 2"), r"div_0: div is in the code"),
    ],
)
def test_code_with_other_ops_is_an_error_that_names_them(change: tuple[str, str], message: str) -> None:
    """Bad input: a checkpoint whose plan does not fit the code says which ops differ."""
    module = model()
    calibrated(module, X)
    fresh = edited(change)
    region = insert(fresh, (X,), qconfig={"activation": {"dtype": "int4"}})
    before = region.plan
    with pytest.raises(PlanMismatchError, match=message) as error:
        fresh.load_state_dict(module.state_dict())
    assert "init_from" in str(error.value)
    assert region.plan is before


def test_long_lists_of_differences_are_cut() -> None:
    saved = trace(ResNet(), [IMAGE])
    traced = trace(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), [IMAGE])
    assert len(plan_differences(saved, traced)) > 11
    with pytest.raises(PlanMismatchError, match=r"and \d+ more"):
        rebound(saved, traced)


class Branch(nn.Module):
    def forward(self, x: Tensor, extra: bool) -> Tensor:
        x = x + 1
        if extra:
            x = x + 10
        return x + 100


def test_branch_that_only_one_side_has_traced_is_matched_by_identity() -> None:
    """foundation 3: names count from what was traced, so they must not be used here."""
    module = Branch()
    region = insert(module, batches=[(X, True), (X, False)], qconfig=MINMAX)
    with region.state("observe"):
        module(X, True)
    region.compute_scales()
    region.set_state("quantize")
    fresh = Branch()
    other = insert(fresh, (X, False), qconfig={"activation": {"dtype": "int4"}})
    assert sorted(other.points) == ["add_0.input0", "add_0.output", "add_1.output"]
    fresh.load_state_dict(module.state_dict())
    other.set_state("quantize")
    for extra in (True, False):
        assert torch.equal(fresh(X, extra), module(X, extra))
    assert other.unplanned == {}


def test_checkpoint_of_another_release_is_refused() -> None:
    module = model()
    calibrated(module, X)
    state = module.state_dict()
    state[KEY] = {**state[KEY], "version": STATE_VERSION + 1}
    fresh = model()
    insert(fresh, (X,))
    with pytest.raises(PlanMismatchError, match="this release reads versions up to 2"):
        fresh.load_state_dict(state)


def test_float_checkpoint_says_which_keys_are_missing() -> None:
    module = ResNet()
    insert(module, (IMAGE,))
    with pytest.raises(RuntimeError, match=re.escape("_quantization.fake_quants.stem/input0.scale")):
        module.load_state_dict(ResNet().state_dict())
    module.load_state_dict(ResNet().state_dict(), strict=False)


def test_extra_state_is_plain_data() -> None:
    """foundation 1: what the default, restricted unpickler accepts."""
    module = ResNet()
    calibrated(module, IMAGE)
    allowed = (str, int, float, bool, type(None), Tensor)

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                assert type(key) is str
                check(item)
        elif type(value) in (list, tuple):
            for item in value:
                check(item)
        else:
            assert isinstance(value, allowed), value
            assert type(value) in (str, int, float, bool, type(None)) or isinstance(value, Tensor)

    check(module.state_dict()[KEY])


def test_copies_can_be_saved_and_restored() -> None:
    module = ResNet().eval()
    calibrated(module, IMAGE)
    clone = copy.deepcopy(module)
    fresh = ResNet().eval()
    insert(fresh, (IMAGE,)).set_state("quantize")
    fresh.load_state_dict(clone.state_dict())
    assert torch.equal(fresh(IMAGE), module(IMAGE))


@pytest.mark.parametrize("follows", [True, False])
def test_weights_loaded_without_a_plan_get_scales_of_their_own(follows: bool) -> None:
    """foundation 5: scales of the weights before would clip the new ones, here to a quarter; fixed scales stay."""
    module, other = model(), model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(4.0)
    region = calibrated(module, X, qconfig=MINMAX)
    region.set_state("quantize", updates={"weight"} if follows else ())
    before = region.points["a.weight"].scale.clone()
    module.load_state_dict(other.state_dict(), strict=False)
    module.eval()(X)
    assert torch.equal(region.points["a.weight"].scale, before * 4 if follows else before)
    module.load_state_dict(module.state_dict())
    assert not region.points["a.weight"].outdated


def test_average_by_hand_of_the_tensors_of_a_state_dict() -> None:
    """foundation 1: what a module with an average of its own writes, as the plan in a state_dict is no tensor."""
    module = model()
    region = calibrated(module, X, qconfig=MINMAX)
    region.set_state("quantize")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    average = {k: v.clone() for k, v in module.state_dict().items() if torch.is_tensor(v)}
    history = [module.a.weight.detach().clone()]
    for _ in range(3):
        optimizer.zero_grad()
        module.train()(X).square().sum().backward()
        optimizer.step()
        history.append(module.a.weight.detach().clone())
        for key, value in module.state_dict().items():
            if torch.is_tensor(value) and value.is_floating_point():
                average[key].lerp_(value, 0.5)
    assert module.load_state_dict(average, strict=False).missing_keys == [KEY]
    shares = (0.125, 0.125, 0.25, 0.5)
    expected = sum(share * weight for share, weight in zip(shares, history, strict=True))
    torch.testing.assert_close(module.a.weight, expected)
    assert not torch.equal(module.a.weight, history[-1])
    module.eval()(X)
    torch.testing.assert_close(region.points["a.weight"].scale, module.a.weight.detach().abs().amax(dim=1) / 127)
    assert region.is_calibrated


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_learned_scales_of_a_run_that_diverged_can_be_loaded(value: float) -> None:
    """They are parameters, as weights are: what training made of them is there to be looked at."""
    module = ResNet().eval()
    region = calibrated(module, IMAGE)
    region.learn_scales()
    names = [name for name, point in region.points.items() if point.learned]
    with torch.no_grad():
        for name in names:
            region.points[name].scale.fill_(value)
    fresh = ResNet().eval()
    again = insert(fresh, (IMAGE,))
    fresh.load_state_dict(module.state_dict())
    assert len(names) > 5
    for name in names:
        scale = again.points[name].scale
        assert torch.allclose(scale, torch.full_like(scale, value), equal_nan=True)
    again.set_state("quantize")
    assert bool(fresh(IMAGE).isnan().any()) == math.isnan(value)
    state = module.state_dict()
    key = next(key for key in state if key.endswith(f"{names[0].replace('.', '/')}.scale"))
    state[key] = state[key].to(torch.int64) if value == -1 else state[key].to(torch.complex64)
    other = ResNet().eval()
    insert(other, (IMAGE,))
    with pytest.raises(PlanMismatchError, match="must be floating-point numbers"):
        other.load_state_dict(state)


@pytest.mark.parametrize("scale", [MIN_SCALE, 1.0, MAX_SCALE])
def test_every_fixed_scale_that_a_point_takes_can_be_loaded(scale: float) -> None:
    rules = [{"match": "a", "activation": {"fixed_scale": scale}}]
    module, fresh = model(), model()
    region = insert(module, (X,), overrides=rules)
    calibrate(region, [Call((X,))])
    restored = insert(fresh, (X,))
    fresh.load_state_dict(module.state_dict())
    assert {p.scale.item() for p in restored.points.values() if p.fixed_scale is not None} == {scale}
