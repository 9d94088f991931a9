"""Weights are quantized where they are used; with batch norm this equals folding (design section 4)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.quantization.region.insertion import insert
from tests.quantization.models import calibrated


class ConvNorm(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(8, 16, 3, bias=False)
        self.bn = nn.BatchNorm2d(16)
        for t in (self.bn.weight, self.bn.bias, self.bn.running_mean):
            nn.init.normal_(t)  # type: ignore[arg-type]
        nn.init.uniform_(self.bn.running_var, 0.5, 2.0)  # type: ignore[arg-type]
        nn.init.zeros_(self.bn.weight[:1])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.bn(self.conv(x)))


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "conv_transpose"])
def test_codes_equal_those_of_the_folded_weight(transposed: bool) -> None:
    """design 4: scaling a channel commutes with quantizing it, also by negative gammas."""
    torch.manual_seed(0)
    module, x = ConvNorm(transposed).eval(), torch.randn(2, 8, 6, 6)
    region = calibrated(module, x)
    weights: dict[str, Tensor] = {}
    with region.tap(lambda name, value, quantized: weights.update({name: quantized})), torch.no_grad():
        module(x)
    axis = 1 if transposed else 0
    shape = [1] * 4
    shape[axis] = -1
    factor = (module.bn.weight / (module.bn.running_var + module.bn.eps).sqrt()).detach()  # type: ignore[operator]
    assert (factor < 0).any()
    weight = module.conv.weight.detach()
    folded = weight * factor.reshape(shape)
    others = [d for d in range(4) if d != axis]
    folded_scale = folded.abs().amax(others) / 127
    # codes of the folded weight, computed from it alone
    expected = (folded / folded_scale.clamp_min(1e-30).reshape(shape)).round()
    point = region.points["conv.weight"]
    mine = (weights["conv.weight"] / point.scale.reshape(shape)).round() * factor.sign().reshape(shape)
    expected = expected * (factor != 0).reshape(shape)
    assert int((mine != expected).sum()) == 0
    assert mine.abs().max() == 127


def test_results_equal_those_of_the_folded_layer() -> None:
    """design 4."""
    torch.manual_seed(1)
    module, x = ConvNorm().eval(), torch.randn(2, 8, 6, 6)
    region = calibrated(module, x)
    values: dict[str, tuple[Tensor, Tensor]] = {}
    with region.tap(lambda name, value, quantized: values.update({name: (value, quantized)})), torch.no_grad():
        module(x)
    factor = (module.bn.weight / (module.bn.running_var + module.bn.eps).sqrt()).detach()  # type: ignore[operator]
    bias = module.bn.bias - module.bn.running_mean * factor  # type: ignore[operator]
    folded = values["conv.weight"][1] * factor.reshape(-1, 1, 1, 1)
    expected = F.conv2d(values["conv.input0"][1], folded, bias)
    torch.testing.assert_close(values["bn.output"][0], expected.detach(), rtol=1e-4, atol=1e-4)


def test_parametrized_weight_is_quantized_after_its_parametrization() -> None:
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.ReLU())
    x = torch.randn(2, 4)
    region = calibrated(module, x)
    weights: list[Tensor] = []
    with region.tap(lambda name, value, _: weights.append(value) if name.endswith("weight") else None):
        module(x)
    assert torch.equal(weights[0], module[0].weight)
    assert next(p for p in region.plan.points if p.is_weight).axis == 0


def test_weight_that_is_computed_from_data_is_an_activation() -> None:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maker = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(F.linear(x, torch.tanh(self.maker(x.mean(0))).reshape(3, 4)))

    region = insert(Hyper(), (torch.randn(2, 4),))
    assert [p.name for p in region.plan.points if p.is_weight] == ["maker.weight"]
    assert region.plan.status["linear_0"].status == "quantized"


def test_gradient_reaches_the_weight_through_its_quantizer() -> None:
    """Straight-through: inside the range the gradient is that of the quantized product."""
    module, x = nn.Linear(4, 3, bias=False), torch.randn(2, 4)
    region = calibrated(module, x, qconfig={"activation": {"dtype": "float32"}})
    module(x).sum().backward()
    torch.testing.assert_close(module.weight.grad, x.sum(0).expand(3, 4))
    assert list(region.points) == ["linear_0.weight"]
