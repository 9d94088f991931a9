"""Every op keeps its own quantizer whatever path the forward takes, or is reported; never a neighbour's (foundation 3).

The models add numbers of different sizes, so that the range a point has observed says which ops it has seen.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.quantization.interception.dynamic_block import dynamic_block
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.tracing.tracer import trace
from tests.quantization.models import MINMAX, Cameras, calibrated

X = torch.linspace(0, 1, 8).reshape(2, 4)


class Calls(nn.Module):
    """A module whose forward is the given function; submodules by keyword."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


class Add(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


@contextlib.contextmanager
def observing(region: Region) -> Iterator[dict[str, float]]:
    """Yield a dict that holds, at the end, the highest value each output point saw; each must have seen one value."""
    region.scales.reset_statistics()
    seen: dict[str, float] = {}
    with region.state("observe"), torch.no_grad():
        yield seen
    for name, fake_quant in region.points.items():
        if name.endswith(".output") and fake_quant.statistics.count:
            low, high = (float(v) for v in fake_quant.statistics.range)
            assert high - low < 1.001, f"{name} saw the values of several ops: {low} to {high}"
            seen[name.removesuffix(".output")] = round(high)


def values(region: Region, *args: Any) -> dict[str, float]:
    with observing(region) as seen:
        region.target(*args)
    return seen


# -- branches, loops, reuse


def test_branch_that_adds_an_op_does_not_shift_its_neighbours() -> None:
    """foundation 3."""

    def forward(self: Calls, x: Tensor, extra: bool) -> Tensor:
        x = x + 10
        if extra:
            x = x + 100
        return x + 1000

    region = insert(Calls(forward), batches=[(X, False), (X, True)])
    with_branch, without = values(region, X, True), values(region, X, False)
    assert with_branch == {"add_0": 11, "add_1": 111, "add_2": 1111}
    assert without == {"add_0": 11, "add_2": 1011}
    assert region.unplanned == {}


def test_branch_that_was_never_traced_runs_in_float_and_is_reported_with_file_and_line() -> None:
    """foundation 3, A3."""

    def forward(self: Calls, x: Tensor, extra: bool) -> Tensor:
        x = x + 10
        if extra:
            x = x + 100
        return x + 1000

    region = insert(Calls(forward), (X, False))
    line = inspect.getsourcelines(forward)[1] + 3
    place = rf"add at .*test_identity\.py:{line}"
    with pytest.warns(UserWarning, match=place + ".* was not seen while tracing Calls; it runs in float"):
        assert values(region, X, True) == {"add_0": 11, "add_1": 1111}
    values(region, X, True)  # reported once, counted each time
    ((found, count),) = region.unplanned.items()
    assert re.search(place, found)
    assert count == 2


def test_helper_called_in_a_branch_and_again_later_is_two_ops() -> None:
    """foundation 3: the innermost call site alone would confuse them."""

    def helper(x: Tensor, value: float) -> Tensor:
        return x + value

    def forward(self: Calls, x: Tensor, extra: bool) -> Tensor:
        if extra:
            x = helper(x, 100)
        return helper(x, 1000)

    region = insert(Calls(forward), batches=[(X, True), (X, False)])
    assert values(region, X, True) == {"add_0": 101, "add_1": 1101}
    assert values(region, X, False) == {"add_1": 1001}


def test_block_called_in_a_branch_and_again_later_is_two_scopes() -> None:
    """foundation 3."""

    def forward(self: Calls, x: Tensor, extra: bool) -> Tensor:
        if extra:
            x = self.block(x)
        return self.block(x) * 1

    region = insert(Calls(forward, block=Add(100)), batches=[(X, True), (X, False)])
    assert values(region, X, True) == {"block": 101, "block@1": 201, "mul_0": 201}
    assert values(region, X, False) == {"block@1": 101, "mul_0": 101}


def test_activation_used_twice_has_two_quantizers() -> None:
    """foundation 3."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        return self.act(self.act(x + 10) * 10 + 3)

    region = insert(Calls(forward, act=nn.Hardswish()), (X,))
    seen = {k: v for k, v in region.points.items() if k.startswith("act")}
    assert list(seen) == ["act.output", "act@1.output"]
    assert seen["act.output"] is not seen["act@1.output"]
    assert region.graph.by_name["act@1"].operands[0].sources[0].name == "add_1"


def test_loop_that_runs_longer_than_traced_keeps_the_first_rounds_and_reports_the_rest() -> None:
    """foundation 3."""

    def forward(self: Calls, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = self.step(x)
        return x + 1000

    region = insert(Calls(forward, step=Add(10)), (X, 2))
    assert values(region, X, 2) == {"step": 11, "step@1": 21, "add_0": 1021}
    with pytest.warns(UserWarning, match="dynamic_block"):
        assert values(region, X, 3) == {"step": 11, "step@1": 21, "add_0": 1031}
    assert values(region, X, 1) == {"step": 11, "add_0": 1011}
    assert list(region.unplanned.values()) == [1]


def test_loops_inside_loops_count_each_round_of_the_inner_one_from_the_start() -> None:
    """foundation 3: hits are counted within a module call, so a longer first round does not shift the second."""

    class Inner(nn.Module):
        def forward(self, x: Tensor, steps: int) -> Tensor:
            for _ in range(steps):
                x = x + 10
            return x

    def forward(self: Calls, x: Tensor, first: int, second: int) -> Tensor:
        return self.inner(self.inner(x, first), second)

    region = insert(Calls(forward, inner=Inner()), batches=[(X, 2, 2)])
    assert values(region, X, 1, 2) == {"inner.add_0": 11, "inner@1.add_0": 21, "inner@1.add_1": 31}


def test_recursion_of_functions_modules_and_the_target_itself() -> None:
    """foundation 3."""

    def down(x: Tensor, depth: int) -> Tensor:
        return x + 100 if depth == 0 else down(x + 10, depth - 1)

    def forward(self: Calls, x: Tensor, depth: int) -> Tensor:
        return self(x + 1000, depth - 1) if depth else down(x, 2)

    region = insert(Calls(forward), batches=[(X, 1), (X, 0)])
    assert sorted(values(region, X, 1).values()) == [1001, 1011, 1021, 1121]
    assert sorted(values(region, X, 0).values()) == [11, 21, 121]
    assert region.unplanned == {}


def test_sequential_target_called_from_different_places() -> None:
    """foundation 3: nothing above the target counts, so training and validation see the same ops."""
    target = nn.Sequential(Add(10), nn.Sequential(Add(100), Add(1000)))

    def training_step(x: Tensor) -> Tensor:
        return target.train()(x)

    def validation_step(x: Tensor) -> Tensor:
        return (lambda m: m.eval()(x))(target)

    region = insert(target, (X,))
    for step in (training_step, validation_step):
        with observing(region) as seen:
            step(X)
        assert seen == {"0": 11, "1.0": 111, "1.1": 1111}
    assert region.unplanned == {}
    with region.state("quantize"):
        assert training_step(X).shape == X.shape


def test_ops_that_run_only_while_training_do_not_shift_the_others() -> None:
    """foundation 3."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        if self.training:
            x = x + 100
        return x + 10

    module = Calls(forward)
    region = insert(module, (X,))
    module.train()
    assert values(region, X) == {"add_1": 111}
    module.eval()
    assert values(region, X) == {"add_1": 11}


# -- exceptions


def test_exception_in_mid_forward_leaves_nothing_behind() -> None:
    """foundation 3."""

    def forward(self: Calls, x: Tensor, fail: bool) -> Tensor:
        x = self.first(x)
        if fail:
            raise KeyboardInterrupt
        return self.second(x)

    region = insert(Calls(forward, first=Add(10), second=Add(100)), (X, False))
    before = torch.overrides._get_current_function_mode_stack()
    with pytest.raises(KeyboardInterrupt), region.state("observe"):
        region.target(X, True)
    assert torch.overrides._get_current_function_mode_stack() == before
    assert values(region, X, False) == {"first": 11, "second": 111}


def test_exception_caught_inside_the_model_does_not_shift_what_follows() -> None:
    """foundation 3: an op and a module call that raise count just as in tracing."""

    class Fragile(nn.Module):
        def forward(self, x: Tensor, fail: bool) -> Tensor:
            x = x + 10
            if fail:
                raise ValueError
            return x + 20

    def forward(self: Calls, x: Tensor, fail: bool) -> Tensor:
        outputs = []
        for k in range(2):
            try:
                outputs.append(self.fragile(x, fail and k == 0))
            except ValueError:
                outputs.append(self.fallback(x))
            with contextlib.suppress(RuntimeError):
                outputs.append(x @ x)  # never works: the shapes differ
        return outputs[0] + outputs[1] * 0 + 1000

    module = Calls(forward, fragile=Fragile(), fallback=Add(300))
    region = insert(module, batches=[(X, False), (X, True)])
    ok, failed = values(region, X, False), values(region, X, True)
    assert region.unplanned == {}
    assert (ok["fragile.add_1"], ok["fragile@1.add_1"]) == (31, 31)
    assert "fallback" not in ok
    assert failed["fallback"] == 301
    assert failed["fragile.add_0"] == 11
    assert "fragile.add_1" not in failed
    assert failed["fragile@1.add_1"] == 31


def test_interruption_keeps_no_frames_or_tensors_alive() -> None:
    """foundation 3."""
    import gc
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    def forward(self: Calls, x: Tensor, fail: bool) -> Tensor:
        big = self.first(x)
        alive.append(weakref.ref(big))
        if fail:
            raise KeyboardInterrupt
        return big + 1

    region = calibrated(Calls(forward, first=Add(10)), X, False)
    for fail in (False, True):
        alive.clear()
        with contextlib.suppress(KeyboardInterrupt):
            region.target(X, fail)
        gc.collect()
        assert alive[0]() is None


def test_finished_module_calls_let_their_tensors_go_at_the_next_op() -> None:
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    class Maker(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            big = x + 10
            alive.append(weakref.ref(big))
            return big.sum() * 2

    def forward(self: Calls, x: Tensor) -> Tensor:
        y = self.maker(x) + 1
        assert alive[-1]() is None
        return y

    region = calibrated(Calls(forward, maker=Maker()), X)
    with torch.no_grad():
        region.target(X)
    assert len(alive) > 3


# -- call sites


def test_module_call_without_ops_does_not_shift_the_calls_after_it() -> None:
    """foundation 3: at run time only ops that may carry quantizers are identified, so tracing counts only those."""

    class Sometimes(nn.Module):
        def forward(self, x: Tensor, active: bool) -> Tensor:
            return x + 10 if active else x.view(-1).view_as(x)

    def forward(self: Calls, x: Tensor) -> Tensor:
        for active in (False, True, False, True):
            x = self.block(x, active)
        return x * 1

    region = insert(Calls(forward, block=Sometimes()), (X,))
    seen = values(region, X)
    assert sorted(seen.values()) == [11, 21, 21]
    assert region.unplanned == {}


def test_modules_made_in_forward_are_told_apart_and_forgotten() -> None:
    """foundation 3."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        for value in (10.0, 100.0):
            x = Add(value)(x)
        return Add(1000)(x)

    region = insert(Calls(forward), (X,))
    assert sorted(values(region, X).values()) == [11, 111, 1111]
    known = len(region.runner.call_paths.root.children)
    for _ in range(5):
        values(region, X)
    assert len(region.runner.call_paths.root.children) == known
    assert region.unplanned == {}


def test_lambdas_of_one_line_are_told_apart() -> None:
    """foundation 3."""
    functions = [lambda x: x + 10, lambda x: x + 100]

    def forward(self: Calls, x: Tensor, order: tuple[int, int]) -> Tensor:
        for k in order:
            x = functions[k](x)
        return x

    region = insert(Calls(forward), batches=[(X, (0, 1)), (X, (1, 0))])
    for order in ((0, 1), (1, 0)):
        assert sorted(values(region, X, order).values()) == [(11, 101)[order[0]], 111]
    assert region.unplanned == {}


def test_closures_made_by_one_function_are_told_apart_by_where_they_are_called() -> None:
    """foundation 3."""

    def make(value: float) -> Callable[[Tensor], Tensor]:
        def add(x: Tensor) -> Tensor:
            return x + value

        return add

    first, second = make(10), make(100)

    def forward(self: Calls, x: Tensor, extra: bool) -> Tensor:
        x = second(x) if extra else x
        return first(x)

    region = insert(Calls(forward), batches=[(X, True), (X, False)])
    assert values(region, X, True) == {"add_0": 101, "add_1": 111}
    assert values(region, X, False) == {"add_1": 11}


def test_identity_survives_the_specializing_interpreter() -> None:
    """foundation 3: after some calls CPython inlines properties and subscripts, which moves f_lasti."""

    class Holder:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        @property
        def shifted(self) -> Tensor:
            return self.x + 10

        def __getitem__(self, value: int) -> Tensor:
            return self.x + value

        def __call__(self, value: int) -> Tensor:
            return self.x + value

    def forward(self: Calls, x: Tensor) -> tuple[Tensor, ...]:
        holder = Holder(x)
        return holder.shifted, holder[100], holder(1000)

    region = insert(Calls(forward), (X,))
    for _ in range(200):
        with region.state("quantize"):
            region.target(X)
    assert values(region, X) == {"add_0": 11, "add_1": 101, "add_2": 1001}
    assert region.unplanned == {}


def test_identity_survives_the_use_of_torch_compile_elsewhere() -> None:
    """foundation 3: the evaluation hook of torch.compile stays installed and moves f_lasti, too."""

    def helper(x: Tensor) -> Tensor:
        return x + 10

    def forward(self: Calls, x: Tensor) -> Tensor:
        return self.block(helper(x))

    region = insert(Calls(forward, block=Add(100)), (X,))
    torch.compile(lambda x: torch.sin(x) + 1, backend="eager")(X)
    assert values(region, X) == {"add_0": 11, "block": 111}
    assert region.unplanned == {}
    torch._dynamo.reset()


def test_hooks_on_modules_do_not_change_the_identity_of_ops() -> None:
    """foundation 3: user hooks come and go; the ops inside of them are ops of the module."""
    region = insert(Calls(lambda self, x: self.block(x) * 1, block=Add(100)), (X,))
    handle = region.target.block.register_forward_hook(lambda module, args, output: None)
    assert values(region, X) == {"block": 101, "mul_0": 101}
    handle.remove()
    assert region.unplanned == {}


def test_op_named_like_a_module_keeps_its_own_name() -> None:
    def forward(self: Calls, x: Tensor) -> Tensor:
        return self.add_0(x) + 100

    region = insert(Calls(forward, add_0=Add(10)), (X,))
    assert values(region, X) == {"add_0": 11, "add_1": 111}


def test_direct_calls_of_forward_are_call_sites() -> None:
    def forward(self: Calls, x: Tensor, extra: bool) -> Tensor:
        x = self.a.forward(x) if extra else x
        return self.b.forward(x)

    region = insert(Calls(forward, a=Add(10), b=Add(100)), batches=[(X, True), (X, False)])
    assert values(region, X, True) == {"add_0": 11, "add_1": 111}
    assert values(region, X, False) == {"add_1": 101}


def test_generators_and_comprehensions() -> None:
    def parts(x: Tensor) -> Iterator[Tensor]:
        for value in (10, 100):
            yield x + value

    def forward(self: Calls, x: Tensor) -> Tensor:
        lazily = [self.block(part) for part in parts(x)]
        return torch.stack(lazily)

    region = insert(Calls(forward, block=Add(1000)), (X,))
    seen = values(region, X)
    assert {k: v for k, v in seen.items() if "add" in k} == {"add_0": 11, "add_1": 101}
    assert {k: v for k, v in seen.items() if "block" in k} == {"block": 1011, "block@1": 1101}


def test_two_threads_run_two_regions_at_the_same_time() -> None:
    """foundation 3."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        for _ in range(20):
            x = self.block(x)
        return x

    modules = [Calls(forward, block=Add(value)) for value in (1.0, 10.0)]
    regions = [calibrated(module, X) for module in modules]
    with torch.no_grad():
        expected = [module(X) for module in modules]
    failures: list[object] = []

    def work(k: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    if not torch.equal(modules[k](X), expected[k]):
                        failures.append(k)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k % 2,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(region.unplanned == {} for region in regions)


# -- dynamic blocks


def images(*names: str) -> dict[str, Tensor]:
    scale = {"front": 1.0, "left": 2.0, "right": 3.0}
    return {name: torch.full((1, 2, 3, 3), scale[name]) for name in names}


def test_dynamic_block_uses_the_same_quantizers_whatever_the_count() -> None:
    """A3: a varying number of cameras, convs picked from a dict, an add inside that fuses."""
    module = Cameras(annotated=True)
    region = insert(module, batches=[(images("front", "left", "right"),), (images("left"),)], qconfig=MINMAX)
    assert region.graph.varying == ()
    assert [f.ops[-1] for f in region.plan.fusions] == ["cameras.add_0"]
    assert set(region.plan.fusions[0].ops[:-1]) == {f"input_proj.{n}" for n in ("front", "left", "right")}
    inputs = [p for p in region.points if p.endswith(".output")]
    assert "cameras.add_0.output" in inputs
    for names in (("front", "left", "right"), ("right",), ("left", "front"), ("left",) * 1):
        with region.state("observe"):
            module(images(*names))
    assert region.unplanned == {}
    region.compute_scales()
    taps: list[str] = []
    with region.state("quantize"), region.tap(lambda name, *_: taps.append(name)):
        module(images("right", "front"))
    assert taps.count("cameras.add_0.output") == 2
    assert taps.count("input_proj.right.weight") == taps.count("input_proj.front.weight") == 1
    assert "input_proj.left.weight" not in taps


def test_loop_over_a_dict_without_annotation_is_reported_as_varying_and_as_a_fusion_miss() -> None:
    """A2, A3."""
    module = Cameras()
    region = insert(module, batches=[(images("front", "left"),), (images("left"),)])
    line = inspect.getsourcelines(Cameras.one)[1] + 1
    assert any(location.endswith(f"models.py:{line}") for location in region.graph.varying)
    causes = {miss.kinds: miss.cause for miss in region.plan.misses}
    assert causes[("conv2d", "add")].startswith("dynamic code")
    assert "dynamic_block" in causes[("conv2d", "add")]


def test_static_loop_over_cameras_fuses_by_itself() -> None:
    """A2: the worked example; each pass has its own ops."""
    region = insert(Cameras(), (images("front", "left", "right"),))
    groups = [f.ops for f in region.plan.fusions]
    assert groups == [(f"input_proj.{n}", f"add_{k}") for k, n in enumerate(("front", "left", "right"))]


def test_dynamic_block_behind_context_manager_helpers() -> None:
    @contextlib.contextmanager
    def camera(module: nn.Module) -> Iterator[None]:
        with dynamic_block(module, "camera"):
            yield

    def forward(self: Calls, x: Tensor, count: int) -> Tensor:
        for _ in range(count):
            with camera(self):
                y = x + 10
            with contextlib.ExitStack() as stack:
                stack.enter_context(dynamic_block(self, "stacked"))
                y = y + 100
        return y

    region = insert(Calls(forward), (X, 1))
    assert values(region, X, 3) == {"camera.add_0": 11, "stacked.add_0": 111}
    assert region.unplanned == {}


def test_dynamic_block_left_by_an_exception_ends() -> None:
    def forward(self: Calls, x: Tensor, fail: bool) -> Tensor:
        for k in range(2):
            with contextlib.suppress(ValueError), dynamic_block(self, "block"):
                y = self.inner(x)
                if fail and k == 0:
                    raise ValueError
                y = y + 100
        return x + 1000 if fail else y + 1000

    region = insert(Calls(forward, inner=Add(10)), batches=[(X, False), (X, True)])
    assert values(region, X, False) == {"inner": 11, "block.add_0": 111, "add_1": 1111}
    assert values(region, X, True) == {"inner": 11, "block.add_0": 111, "add_0": 1001}
    assert region.unplanned == {}


def test_nested_and_recursive_dynamic_blocks() -> None:
    def forward(self: Calls, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        out = x + 1
        for count in counts:
            with dynamic_block(self, "outer"):
                y = x + 10
                for _ in range(count):
                    with dynamic_block(self, "inner"):
                        z = self.block(x)
                out = out + (y - y) + (z - z)
        return out

    region = insert(Calls(forward, block=Add(100)), (X, (1,)))
    seen = values(region, X, (2, 3, 1))
    assert (seen["outer.add_0"], seen["block"]) == (11, 101)
    assert region.unplanned == {}


def test_dynamic_block_does_nothing_outside_of_a_region() -> None:
    with dynamic_block(nn.Identity(), "anywhere"):
        assert torch.equal(X + 1, X.add(1))


# -- keys in other processes

SCRIPT = """
import torch
from torch import nn
import torch.nn.functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])

    def helper(self, x):
        return x * 2

    def forward(self, x):
        x = self.helper(self.a(x)) + 1
        for block in self.blocks:
            x = self.helper(block(x))
        return [F.gelu(y) for y in (x, x - 1)]


if __name__ == "__main__":
    from lightning_qat.quantization.tracing.tracer import trace
    print(*[op.key for op in trace(Net(), [torch.ones(1, 4)]).ops])
"""


def keys(source: str, file: Path) -> list[str]:
    namespace: dict[str, Any] = {"__name__": "net"}
    exec(compile(source, str(file), "exec"), namespace)
    return [op.key for op in trace(namespace["Net"](), [torch.ones(1, 4)]).ops]


def test_keys_are_the_same_in_another_process_and_after_adding_comments(tmp_path: Path) -> None:
    """foundation 3: checkpoints find their ops again."""
    expected = keys(SCRIPT, tmp_path / "net.py")
    assert len(set(expected)) == len(expected) > 8
    script, root = tmp_path / "net.py", Path(__file__).parents[3]
    script.write_text(SCRIPT.replace("\n        for", "\n        # a comment\n\n        for"))
    environment = {"PYTHONPATH": str(root), "PYTHONHASHSEED": "5"}
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.split() == expected
    assert set(keys(SCRIPT, tmp_path / "elsewhere" / "net.py")) == set(expected)
    assert not set(keys(SCRIPT, tmp_path / "other.py")) & set(expected)


def test_keys_of_an_edited_function_are_not_taken_for_the_old_ones(tmp_path: Path) -> None:
    """foundation 3: an op that moved to the offset of another one must not get its quantizer."""
    edited = SCRIPT.replace("self.helper(self.a(x)) + 1", "self.a(self.helper(x)) + 1")
    assert not set(keys(SCRIPT, Path("net.py"))) & set(keys(edited, Path("net.py")))


def test_tracing_the_same_module_twice_gives_the_same_graph() -> None:
    module = Cameras()
    batch = (images("front", "left"),)
    assert trace(module, [batch]) == trace(module, [batch])


def test_functional_and_module_relu_in_one_scope() -> None:
    region = insert(Calls(lambda self, x: F.relu(self.act(x - 2) + 5) + 100, act=nn.ReLU()), (X,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert values(region, X)["add_1"] == 105


def test_ops_called_by_builtins_keep_their_identity_when_the_interpreter_warms_up() -> None:
    """foundation 3: Python 3.11 executes a call that it specialized at another instruction."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            doubled = list(map(self.double, (x, -x)))
            return sum(y * 0.5 for y in doubled)  # type: ignore[return-value]

        @staticmethod
        def double(x: Tensor) -> Tensor:
            return x * 2.0

    module = Net().eval()
    region = calibrated(module, torch.randn(3))
    for _ in range(50):
        module(torch.randn(3))
    assert region.unplanned == {}


def test_unseen_ops_without_a_float_result_are_not_reported() -> None:
    """design 3: what counts and compares is never quantized, seen or not."""

    class Net(nn.Module):
        def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
            y = x * 2.0
            return y if lengths is None else y[: int(lengths.cumsum(0).add(1).sum())]

    module = Net().eval()
    region = calibrated(module, torch.randn(30))
    module(torch.randn(30), torch.tensor([1, 2]))
    assert region.unplanned == {}
