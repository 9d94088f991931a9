"""Ops that run without having been traced, and are no surprise.

Siblings: what makes a weight and started to do so after tracing (pruning, weight and spectral norm, a parametrization,
a hook of the user), in the plain forward, in training and in an analysis, and with a plan that was restored; calls
under `torch.jit.trace` (`TensorBoardLogger(log_graph=True)`, export); layers that training leaves out at random, in the
user's code and in that of a library.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_qat.analysis.model_check.model_check import check
from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.quantization.planning.plan_compatibility import read_extra_state
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.calibration_findings import finding
from lightning_qat.quantization.region.insertion import attach, insert
from lightning_qat.quantization.region.region import Region

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def calibrated(module: nn.Module, x: Tensor = X) -> Region:
    region = insert(module, (x,))
    calibrate(region, [x])
    return region


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5 + 0.0


def own_hook(layer: nn.Module) -> None:
    """As scripts of pruning do it."""
    layer.kept = nn.Parameter(layer.weight.detach())  # type: ignore[operator]
    layer.register_buffer("mask", (layer.kept.abs() > 0.1).float())
    del layer._parameters["weight"]
    layer.register_forward_pre_hook(lambda m, _: setattr(m, "weight", m.kept * m.mask + m.kept * 0.0))


OF_TORCH: dict[str, Callable[[Any], object]] = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Half()),
}


@pytest.mark.parametrize("how", [*OF_TORCH, "own hook"])
def test_what_makes_a_weight_after_tracing_is_quantized_where_it_is_used(how: str) -> None:
    module = net()
    region = calibrated(module)
    {**OF_TORCH, "own hook": own_hook}[how](module[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not seen")
        module.train()(X).sum().backward()
        module.eval()(X)
        sensitivity(region, [X])
        assert not region.unplanned
    seen: list[Tensor] = []
    with region.tap(lambda point, before, after: seen.append(after) if point == "0.weight" else None):
        module(X)
    assert torch.allclose(region.points["0.weight"](seen[0]), seen[0])
    assert not torch.equal(module[0].weight, seen[0])


@pytest.mark.parametrize("how", OF_TORCH)
def test_a_restored_plan_takes_them_too(how: str) -> None:
    original = net()
    state = copy.deepcopy(calibrated(original).state_dict())
    module = net()
    region = attach(module, *read_extra_state(state["_extra_state"]), traced=False)
    region.load_state_dict(state)
    region.set_state("quantize")
    OF_TORCH[how](module[0])
    module.train()(X)
    assert not region.unplanned


@pytest.mark.skipif(
    sys.version_info < (3, 11),
    reason="Python 3.10 compiles what stands behind `a if b else c` once for each branch: two places, so two ops",
)
def test_what_joins_a_weight_with_data_is_still_said() -> None:
    class Late(nn.Module):
        late = False

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x) + (self.shift.exp() * x if self.late else 0.0)

    module = Late()
    region = calibrated(module)
    module.late = True
    with pytest.warns(UserWarning, match="mul at .* was not seen while tracing"):
        module(X)
    assert not any(place.startswith("exp") for place in region.unplanned)


class Shapes(nn.Module):
    """Computes with sizes, which are tensors while torch.jit.trace runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.body(x), scale_factor=2.0)
        y = y / (y.shape[1] * y.shape[2]) ** 0.5
        result: Tensor = self.head(y.mean(dim=(2, 3)))
        return result


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("state", ["off", "quantize"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_a_graph_of_torch_jit_is_that_of_the_region(state: Any, learned: bool) -> None:
    module = Shapes()
    images = torch.randn(4, 1, 6, 6)
    region = calibrated(module, images)
    if learned:
        region.learn_scales()
    region.set_state(state)
    module.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not seen")
        traced = torch.jit.trace(module, images, check_trace=False)
    assert not region.unplanned
    assert torch.equal(traced(images + 0.5), module(images + 0.5))


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.round = 0

    def forward(self, x: Tensor) -> Tensor:
        self.round += self.training
        for number, layer in enumerate(self.layers):
            if not (self.training and number == self.round % 4):
                x = F.relu(layer(x)) + x
        return x


def test_layers_that_training_leaves_out_are_no_varying_code() -> None:
    """Every evaluation runs them, so all their ops are known."""
    module = LayerDrop()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not seen")
        region = insert(module, batches=[X, X + 1.0])
        calibrate(region, [X])
        for _ in range(8):
            module.train()(X)
    assert region.graph.varying == ()
    assert not [found for found in check(region).findings if found.kind in ("varying code", "not traced")]


LIBRARY = """
import torch

def choose(x, negative):
    return torch.tanh(x) if negative else torch.sigmoid(x)
"""


def test_nobody_is_told_to_edit_an_installed_library(tmp_path: Any) -> None:
    file = tmp_path / "site-packages" / "library.py"
    names: dict[str, Any] = {}
    exec(compile(LIBRARY, str(file), "exec"), names)

    class Chooser(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = names["choose"](x * 2.0, bool(x.sum() < 0)) * 3.0
            return result

    region = insert(Chooser(), batches=[X.abs(), X.abs() + 1.0])
    calibrate(region, [X.abs()])
    with pytest.warns(UserWarning, match="tanh at .*library.py.* runs in float") as caught:
        region.target(-X.abs())
    varying = insert(Chooser(), batches=[X.abs(), -X.abs()])
    calibrate(varying, [X.abs()])
    findings = [found.action for r in (region, varying) for found in check(r).findings if "library.py" in found.what]
    said = [*findings, *(str(w.message) for w in caught), finding("unplanned", "", f"tanh at {file}:5").message]
    assert len(said) >= 4
    assert not any("dynamic_block" in text for text in said)
    assert all("layerdrop=0.0" in text for text in said)
