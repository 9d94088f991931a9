"""States, taps, scales and devices of a region; torch.compile and torch.export (design sections 2, 3 and 12)."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.quantization.errors import ConfigurationError, TracingError
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region, find_regions
from lightning_qat.quantization.tracing.tracer import Tracer, trace
from tests.quantization.models import MINMAX, ZOO, ResNet, calibrated

IMAGE = torch.randn(4, 1, 8, 8)


@pytest.fixture
def region() -> Region:
    torch.manual_seed(0)
    return calibrated(ResNet(), IMAGE)


# -- states


def test_states_are_restored_exactly_also_after_exceptions(region: Region) -> None:
    region.set_state("observe", updates=["activation"])
    with contextlib.suppress(KeyboardInterrupt), region.state("quantize", updates=()):
        with region.state("off"):
            assert (region.current_state, region.updates) == ("off", frozenset())
        assert (region.current_state, region.updates) == ("quantize", frozenset())
        raise KeyboardInterrupt
    assert (region.current_state, region.updates) == ("observe", frozenset({"activation"}))


def test_updates_may_be_any_iterable(region: Region) -> None:
    region.set_state("quantize", updates=(u for u in ("weight", "activation")))  # type: ignore[arg-type]
    assert region.updates == frozenset({"weight", "activation"})


def test_wrong_state_changes_nothing(region: Region) -> None:
    with pytest.raises(ConfigurationError, match="unknown state 'quantise': did you mean 'quantize'"):
        region.set_state("quantise")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="unknown role"):
        region.set_state("off", updates=["weights"])  # type: ignore[list-item]
    assert (region.current_state, region.updates) == ("quantize", frozenset({"weight"}))


def test_only_quantizes_the_named_points(region: Region) -> None:
    """B2: isolation."""
    module = region.target.eval()
    everything = module(IMAGE)
    with region.state("off"):
        expected = module(IMAGE)
    changed: list[str] = []

    def tap(name: str, value: Tensor, quantized: Tensor) -> None:
        if not torch.equal(value, quantized):
            changed.append(name)

    with region.tap(tap), contextlib.suppress(KeyboardInterrupt), region.only(["stem.weight"]):
        one = module(IMAGE)
        with region.only([]):
            none = module(IMAGE)
        raise KeyboardInterrupt
    assert changed == ["stem.weight"]
    assert torch.equal(none, expected)
    assert not torch.equal(one, expected)
    assert torch.equal(module(IMAGE), everything)
    with pytest.raises(ConfigurationError, match=r"unknown point 'stem\.weigth': did you mean 'stem\.weight'"):
        region.only(["stem.weigth"]).__enter__()


def test_tap_sees_every_quantization_and_ends(region: Region) -> None:
    seen: list[str] = []
    with region.tap(lambda name, value, quantized: seen.append(name)):
        region.target(IMAGE)
    assert seen == [p.name for p in region.plan.points]
    region.target(IMAGE)
    assert len(seen) == len(region.plan.points)


# -- scales


def test_scales_follow_only_in_train_mode_and_only_what_was_asked(region: Region) -> None:
    """#8507, #8540: nothing moves in evaluation."""
    module = region.target
    weights = {p.name for p in region.plan.points if p.is_weight}

    def moved(train: bool, updates: list[Any]) -> set[str]:
        before = {name: f.scale.clone() for name, f in region.points.items()}
        region.set_state("quantize", updates=updates)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.01)
        module.train(train)(IMAGE * 3)
        return {name for name, f in region.points.items() if not torch.equal(f.scale, before[name])}

    assert moved(False, ["weight", "activation"]) == set()
    assert moved(True, []) == set()
    assert moved(True, ["weight"]) == weights
    activations = set(region.points) - weights
    assert moved(True, ["activation"]) == activations


def test_buffers_are_updated_in_place(region: Region) -> None:
    """design 6: the optimizer, DDP and checkpoints hold the same tensors."""
    addresses = {name: f.scale.data_ptr() for name, f in region.points.items()}
    with torch.inference_mode():
        with region.state("observe"):
            region.target.eval()(IMAGE)
        region.compute_scales()
    region.set_state("quantize", updates=["weight", "activation"])
    region.target.train()(IMAGE).sum().backward()
    assert {name: f.scale.data_ptr() for name, f in region.points.items()} == addresses


def test_training_after_inference_mode_works() -> None:
    """lightning-facts: calibrating or testing under inference_mode and training afterwards."""
    module = ResNet()
    with torch.inference_mode():
        region = insert(module, (IMAGE,), qconfig=MINMAX)
        calibrate(region, [IMAGE])
        module.eval()(IMAGE)
    module.train()(IMAGE).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_is_calibrated() -> None:
    module = ResNet()
    region = insert(module, (IMAGE,), overrides=[{"match": "stem.input0", "activation": {"fixed_scale": 0.1}}])
    assert not region.is_calibrated  # a scale from the configuration is no calibration
    assert set(region.compute_scales()) == set(region.points) - {"stem.input0"}
    assert not region.is_calibrated
    calibrate(region, [IMAGE])
    assert region.is_calibrated


def test_region_whose_points_are_all_fixed_needs_no_calibration() -> None:
    rules = [{"match": "*", "activation": {"fixed_scale": 0.1}, "weight": {"dtype": "float32"}}]
    assert insert(nn.Sequential(nn.Linear(2, 2)), (torch.ones(1, 2),), overrides=rules).is_calibrated


def test_uncalibrated_points_stay_float() -> None:
    module, args = ZOO["branching"].make()
    region = insert(module, args)
    region.set_state("quantize")
    with torch.no_grad():
        quantized = module(*args)
        region.set_state("off")
        torch.testing.assert_close(quantized, module(*args))


def test_fake_quants_are_made_where_the_parameters_are_and_move_along() -> None:
    module = ResNet().to("meta")
    graph = trace(ResNet(), [IMAGE])
    from lightning_qat.quantization.planning.make_plan import make_plan

    region = Region(module, graph, make_plan(graph))
    assert {b.device.type for b in region.fake_quants.buffers()} == {"meta"}
    moved = calibrated(ResNet(), IMAGE).target.double()
    assert moved._quantization.points["stem.input0"].scale.dtype == torch.float32  # type: ignore[operator, union-attr]


def test_bfloat16_autocast_keeps_scales_in_float32(region: Region) -> None:
    """lightning-facts: bf16-mixed."""
    with torch.autocast("cpu", torch.bfloat16):
        out = region.target(IMAGE)
        out.float().sum().backward()
    assert {f.scale.dtype for f in region.points.values()} == {torch.float32}
    assert region.unplanned == {}


def test_find_regions() -> None:
    inner = nn.Linear(2, 2)
    outer = nn.ModuleDict({"a": inner, "b": nn.Sequential(nn.Linear(2, 2))})
    insert(inner, (torch.ones(1, 2),))
    region = insert(outer["b"], (torch.ones(1, 2),))
    assert list(find_regions(outer)) == ["a", "b"]
    assert find_regions(outer)["b"] is region
    assert find_regions(inner) == {"": inner._quantization}


def test_removing_twice_is_an_error(region: Region) -> None:
    region.remove()
    with pytest.raises(ConfigurationError, match="not attached"):
        region.remove()


def test_sequential_target_runs() -> None:
    """A target that calls all its children calls its region, too."""
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    expected = module(x)
    region = insert(module, (x,))
    assert torch.equal(module(x), expected)
    calibrate(region, [x])
    assert not torch.equal(module(x), expected)


# -- tracing


def test_target_that_was_never_called() -> None:
    with Tracer(nn.Linear(1, 1)) as tracer:
        pass
    with pytest.raises(TracingError, match="Linear was never called while tracing"):
        tracer.graph()
    with pytest.raises(TracingError, match="never called"):
        trace(nn.Linear(1, 1), [])


def test_tracing_somebody_elses_step() -> None:
    """The Trainer's way: forwards with gradients, a backward pass, several calls."""
    module = ResNet()
    with Tracer(module) as tracer:
        for _ in range(2):
            module(IMAGE).sum().backward()
    assert "forward" not in module.__dict__
    assert tracer.graph().forwards == 2
    assert [op.name for op in tracer.graph().ops] == [op.name for op in trace(ResNet(), [IMAGE]).ops]


def test_tracing_under_inference_mode_says_what_to_do() -> None:
    with Tracer(nn.Linear(2, 2)) as tracer, torch.inference_mode(), pytest.raises(TracingError, match="no_grad"):
        tracer.target(torch.ones(1, 2))


def test_script_modules_cannot_be_targets() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match="script module"):
        insert(scripted, (torch.ones(1, 2),))


def test_keyword_arguments_and_several_arguments() -> None:
    """#7926, #15862."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, *, scale: Tensor, extra: dict[str, list[Tensor]]) -> Tensor:
            return self.linear(x) * scale + extra["y"][0]

    x = torch.ones(2, 4)
    region = insert(Net(), (x,), {"scale": x * 2, "extra": {"y": [x * 3]}})
    sources = {s.name for op in region.graph.ops for o in op.operands for s in o.sources if s.kind == "input"}
    assert sources == {"0", "scale", "extra.y.0"}


def test_forward_that_returns_before_its_ops_run_is_refused() -> None:
    """Otherwise the plan would be empty, and nothing quantized, without a word."""

    class Lazy(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return (x * i for i in range(2))

    with pytest.raises(TracingError, match="returns a generator: its ops run after the forward"):
        insert(Lazy(), (torch.ones(2),))


# -- torch.func


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch uses it in forward mode itself
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_function_transforms_of_a_region_equal_autograd(training: bool, scheme: str) -> None:
    """Per-sample gradients and Jacobians, by vmap, grad, jacrev and jacfwd; the scales stay."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)).train(training)
    x = torch.randn(3, 4)
    qconfig = {"activation": {"scheme": scheme, "observer": "minmax"}}
    region = calibrated(module, x / 2, qconfig=qconfig)  # half of the values are clipped below
    parameters = dict(module.named_parameters())
    scales = {name: f.scale.clone() for name, f in region.points.items()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index, row in enumerate(x):
        found = torch.autograd.grad(module(row).square().sum(), list(parameters.values()))
        for name, gradient in zip(parameters, found, strict=True):
            torch.testing.assert_close(each[name][index], gradient)
    expected = torch.autograd.functional.jacobian(module, x)
    assert torch.count_nonzero(expected)
    torch.testing.assert_close(torch.func.jacrev(module)(x), expected)
    torch.testing.assert_close(torch.func.jacfwd(module)(x), expected)
    assert torch.equal(torch.func.vmap(module)(x), module(x))
    assert region.unplanned == {}
    assert all(torch.equal(f.scale, scales[name]) for name, f in region.points.items())


# -- torch.compile, torch.export


@pytest.fixture
def compiling() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["resnet", "vit", "unet"])
def test_region_that_is_off_compiles_in_one_graph(name: str, compiling: None) -> None:
    module, args = ZOO[name].make()
    module.eval()
    calibrated(module, *args, state="off")
    with torch.no_grad():
        expected = module(*args)
        found = torch.compile(module, backend="eager", fullgraph=True)(*args)
    for a, b in zip(*((list(v.values()) if isinstance(v, dict) else [v]) for v in (found, expected)), strict=True):
        assert torch.equal(a, b)


def test_region_that_must_not_be_compiled_runs_eagerly_under_torch_compile(compiling: None, region: Region) -> None:
    """Never silently in float."""
    module = region.target.eval()
    outer = nn.Sequential(module, nn.Softmax(-1))
    region.set_compile(False)
    with torch.no_grad():
        expected = outer(IMAGE)
        assert torch.equal(torch.compile(outer, backend="eager")(IMAGE), expected)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="quantized_region_runs_eagerly"):
            torch.compile(outer, backend="eager", fullgraph=True)(IMAGE)
    assert region.unplanned == {}


def test_compiled_submodules_and_functions_inside_a_region_run_eagerly(compiling: None) -> None:
    """Compiled code would run past the interception."""
    module, args = ZOO["vit"].make()
    expected = calibrated(module, *args)
    module.eval()
    with torch.no_grad():
        reference = module(*args)
    expected.remove()
    for block in module.blocks:  # type: ignore[union-attr]
        block.compile(backend="eager")
    with torch.no_grad():
        module(*args)  # compiled before insertion
    region = calibrated(module, *args)
    with torch.no_grad():
        assert torch.equal(module(*args), reference)
    assert region.unplanned == {}
    assert list(region.points) == list(expected.points)


@pytest.mark.parametrize("state", ["off", "quantize"])
def test_region_exports(state: str, compiling: None) -> None:
    module, args = ZOO["resnet"].make()
    module.eval()
    region = calibrated(module, *args, state=state)
    with torch.no_grad():
        expected = module(*args)
        program = torch.export.export(module, args, strict=False)
        torch.testing.assert_close(program.module()(*args), expected)
    assert region.unplanned == {}


def test_strict_export_works_when_off_and_says_why_not_otherwise(compiling: None, region: Region) -> None:
    module = region.target.eval()
    with pytest.raises(Exception, match="quantized_region_runs_eagerly"):
        torch.export.export(module, (IMAGE,), strict=True)
    region.set_state("off")
    torch.export.export(module, (IMAGE,), strict=True)
