"""Weights with one scale are quantized with the batch norm folded in, as they are deployed (design section 4)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.checkpoint import checkpoint

from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.analysis.statistics.statistics import layer_statistics
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import attach, insert
from lightning_qat.quantization.region.region import Region

FLOAT = {"dtype": "float32"}
LAYERS: dict[str, Any] = {
    "conv": lambda: nn.Conv2d(6, 8, 3),
    "grouped": lambda: nn.Conv2d(6, 8, 3, groups=2, bias=False),
    "depthwise": lambda: nn.Conv1d(6, 6, 3, groups=6),
    "conv_transpose": lambda: nn.ConvTranspose2d(6, 8, 3, stride=2),
    "linear": lambda: nn.Linear(6, 8),
}


def layer_and_norm(layer: nn.Module) -> nn.Sequential:
    """Factors of both signs and very different sizes, as they are after training."""
    norm = {nn.Linear: nn.BatchNorm1d, nn.Conv1d: nn.BatchNorm1d}.get(type(layer), nn.BatchNorm2d)
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    bn = norm(channels)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    nn.init.normal_(bn.running_mean)
    nn.init.uniform_(bn.running_var, 0.05, 4.0)
    return nn.Sequential(layer, bn, nn.ReLU())


def example(layer: nn.Module) -> Tensor:
    return torch.randn(16, 6, *{nn.Linear: (), nn.Conv1d: (9,)}.get(type(layer), (9, 9)))


def quantized(module: nn.Module, x: Tensor, dtype: str = "int8", granularity: str = "per_tensor") -> Region:
    """Only the weights are quantized, so that nothing else differs from the folded model."""
    weight = {"dtype": dtype, "granularity": granularity, "observer": "minmax"}
    region = insert(module, (x,), qconfig={"activation": FLOAT, "weight": weight})
    calibrate(region, [x])
    return region


def tapped(region: Region, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    values: dict[str, tuple[Tensor, Tensor]] = {}
    with region.tap(lambda name, value, result: values.update({name: (value.detach(), result.detach())})):
        region.target(x)
    return values


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("kind", LAYERS)
def test_per_tensor_weight_equals_that_of_the_folded_model(kind: str, dtype: str) -> None:
    """Reference: torch's own folding and torch's own fake-quantize."""
    torch.manual_seed(0)
    module = layer_and_norm(LAYERS[kind]()).eval()
    x = example(module[0])
    fold = fuse_linear_bn_eval if kind == "linear" else fuse_conv_bn_eval
    transposed = {"transpose": True} if kind == "conv_transpose" else {}
    folded = fold(copy.deepcopy(module[0]), module[1], **transposed)
    quant_max = 127 if dtype == "int8" else 7
    scale = float(folded.weight.detach().abs().max()) / quant_max
    expected = torch.fake_quantize_per_tensor_affine(folded.weight.detach(), scale, 0, -quant_max, quant_max)
    region = quantized(module, x, dtype)
    assert [(p.batch_norm, p.axis, p.reason) for p in region.plan.points] == [
        ("1", None, "default; 1 is folded into it")
    ]
    value, result = tapped(region, x)["0.weight"]
    torch.testing.assert_close(value, folded.weight.detach(), rtol=1e-6, atol=1e-7)
    assert int(((result / scale).round() != (expected / scale).round()).sum()) == 0
    folded.weight.data = expected
    torch.testing.assert_close(module(x), torch.relu(folded(x)), rtol=1e-4, atol=1e-5)


def test_without_folding_the_codes_would_be_others() -> None:
    """The test above can fail: quantizing the weight as it is gives another model."""
    torch.manual_seed(0)
    module = layer_and_norm(nn.Conv2d(6, 8, 3)).eval()
    x = example(module[0])
    region = quantized(module, x)
    plain = module[0].weight.detach()
    scale = float(plain.abs().max()) / 127
    unfolded = torch.fake_quantize_per_tensor_affine(plain, scale, 0, -127, 127)
    applied = tapped(region, x)["0.weight"][1] / module[1].weight.detach().reshape(-1, 1, 1, 1)
    applied = applied * (module[1].running_var + module[1].eps).sqrt().reshape(-1, 1, 1, 1)
    assert (applied - unfolded).abs().max() > scale / 4


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_grouped_conv_transpose_shares_scales_over_groups_and_is_folded(granularity: str) -> None:
    """Its weight holds the output channels of one group: a scale per channel of the weight spans all groups."""
    torch.manual_seed(1)
    module = layer_and_norm(nn.ConvTranspose2d(6, 8, 3, groups=2, bias=False)).eval()
    x = example(module[0])
    region = quantized(module, x, granularity=granularity)
    assert region.plan.points[0].batch_norm == "1"
    bn = module[1]
    factor = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach()
    folded = module[0].weight.detach().clone()
    for channel in range(8):  # channel c is output c % 4 of group c // 4, which reads three inputs
        group, output = divmod(channel, 4)
        folded[3 * group : 3 * group + 3, output] *= factor[channel]
    largest = folded.abs().amax((0, 2, 3), keepdim=True) if granularity == "per_channel" else folded.abs().max()
    scale = largest / 127
    expected = (folded / scale).round() * scale
    bias = bn.bias - bn.running_mean * factor
    reference = torch.relu(F.conv_transpose2d(x, expected, bias.detach(), groups=2))
    torch.testing.assert_close(module(x), reference, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_weight_and_gamma() -> None:
    """Straight through: inside the range the weight's gradient is that of the layer with the quantized weight."""
    torch.manual_seed(2)
    module = layer_and_norm(nn.Conv2d(6, 8, 3)).eval()
    x = example(module[0])
    region = quantized(module, x)
    factor = (module[1].weight / (module[1].running_var + module[1].eps).sqrt()).detach().reshape(-1, 1, 1, 1)
    weight = (tapped(region, x)["0.weight"][1] / factor).requires_grad_()
    gamma = module[1].weight.detach().clone().requires_grad_()
    bn = module[1]
    y = F.batch_norm(
        F.conv2d(x, weight, module[0].bias), bn.running_mean, bn.running_var, gamma, bn.bias.detach(), eps=bn.eps
    )
    torch.relu(y).square().sum().backward()
    module(x).square().sum().backward()
    torch.testing.assert_close(module[0].weight.grad, weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(bn.weight.grad, gamma.grad, rtol=1e-4, atol=1e-3)


def test_zero_and_infinite_factors_keep_the_weight_and_widen_no_range() -> None:
    torch.manual_seed(3)
    module = layer_and_norm(nn.Conv2d(6, 8, 3)).eval()
    x = example(module[0])
    with torch.no_grad():
        module[1].weight[:2] = 0.0
        module[0].weight[:2] *= 1000.0
    region = quantized(module, x)
    value, _ = tapped(region, x)["0.weight"]
    assert not value[:2].any()
    assert float(region.points["0.weight"].scale) == pytest.approx(float(value[2:].abs().max()) / 127)
    module(x).sum().backward()
    assert module[0].weight.grad.isfinite().all()
    assert module[1].weight.grad[:2].any()
    module[1].eps = 0.0
    module[1].running_var[3] = 0.0
    assert tapped(region, x)["0.weight"][1].isfinite().all()


def test_off_uncalibrated_and_switched_off_are_the_float_module_bit_for_bit() -> None:
    torch.manual_seed(4)
    module = layer_and_norm(nn.Conv2d(6, 8, 3))
    x = example(module[0])
    float_module = copy.deepcopy(module)
    weight = {"granularity": "per_tensor"}
    region = insert(module, (x,), qconfig={"activation": FLOAT, "weight": weight})
    for state in ("off", "observe", "quantize"):
        with region.state(state):  # type: ignore[arg-type]
            for training in (True, False):
                assert torch.equal(module.train(training)(x), float_module.train(training)(x))
    calibrate(region, [x])
    with region.only(()):
        assert torch.equal(module.eval()(x), float_module.eval()(x))


def test_scale_follows_the_folded_weight_in_training() -> None:
    """update_scale sees what is quantized, made of the running statistics also while batch statistics are used."""
    torch.manual_seed(5)
    module = layer_and_norm(nn.Conv2d(6, 8, 3))
    x = example(module[0])
    region = quantized(module, x)
    with torch.no_grad():
        module[1].weight *= 2.0
    factor = (module[1].weight / (module[1].running_var + module[1].eps).sqrt()).detach().reshape(-1, 1, 1, 1)
    expected = float((module[0].weight.detach() * factor).abs().max()) / 127
    module.train()(x)
    assert float(region.points["0.weight"].scale) == pytest.approx(expected, rel=1e-5)


def test_recomputed_forward_uses_the_same_factor() -> None:
    """The running variance moves between a checkpointed forward and its repetition."""

    class Checkpointed(nn.Module):
        def __init__(self, body: nn.Module, active: bool) -> None:
            super().__init__()
            self.body, self.active = body, active

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.body, x, use_reentrant=False) if self.active else self.body(x)
            return y

    torch.manual_seed(6)
    body = layer_and_norm(nn.Conv2d(6, 8, 3))
    body[1].momentum = 0.9
    x = example(body[0])
    gradients = []
    for active in (False, True):
        module = Checkpointed(copy.deepcopy(body), active)
        region = quantized(module, x, "int4")
        region.set_state("quantize", updates=())
        module.train()(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_layer_shared_by_two_batch_norms_has_two_quantizers() -> None:
    class TwoNorms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 8, 3)
            self.one, self.two = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.one(self.conv(x))) + torch.relu(self.two(self.conv(x)))
            return y + torch.relu(self.one(self.conv(-x)))

    module = TwoNorms().eval()
    nn.init.constant_(module.two.weight, 5.0)
    region = quantized(module, torch.randn(4, 6, 5, 5))
    weights = [p for p in region.plan.points if p.is_weight]
    assert [(p.batch_norm, p.same_as) for p in weights] == [("one", None), ("two", None), ("one@1", "conv.weight")]
    scales = [float(region.points[p.name].scale) for p in weights]
    assert scales[1] == pytest.approx(5 * scales[0], rel=1e-4)


@pytest.mark.parametrize(
    ("module", "x", "reason"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
            torch.randn(2, 3, 4, 4),
            "default; the batch norm has no running statistics of a module, so 1 is not folded into the weight",
        ),
        (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5), nn.ReLU()),
            torch.randn(2, 5, 3),
            "default; the batch norm has other channels than the layer, so 1 is not folded into the weight",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()),
            torch.randn(2, 3, 4, 4),
            "default",
        ),
    ],
    ids=["batch statistics", "other axis", "not fused"],
)
def test_what_cannot_be_folded_says_why(module: nn.Module, x: Tensor, reason: str) -> None:
    region = insert(module, (x,), qconfig={"weight": {"granularity": "per_tensor"}})
    (weight,) = [p for p in region.plan.points if p.is_weight]
    assert (weight.batch_norm, weight.reason) == (None, reason)


def test_per_channel_weights_are_not_folded() -> None:
    """Scaling a channel commutes with quantizing it."""
    module = layer_and_norm(nn.Conv2d(6, 8, 3))
    assert insert(module, (example(module[0]),)).plan.by_name["0.weight"].batch_norm is None


def test_statistics_and_sensitivity_are_those_of_the_folded_weight() -> None:
    """B2, B4, B10."""
    torch.manual_seed(8)
    module = layer_and_norm(nn.Conv2d(6, 8, 3)).eval()
    x = example(module[0])
    region = quantized(module, x, "int4")
    folded = fuse_conv_bn_eval(copy.deepcopy(module[0]), module[1]).weight.detach()
    (row,) = layer_statistics(region, [x]).rows
    assert (row.max, row.count) == (pytest.approx(float(folded.max()), rel=1e-6), folded.numel())
    (found,) = sensitivity(region, [x], metric="MSE").rows
    with torch.no_grad(), region.state("off"):
        expected = module(x)
    with torch.no_grad():
        change = module(x) - expected
    assert found.value == pytest.approx(float(change.square().mean()), rel=1e-4)


def test_copies_and_checkpoints_fold_their_own_batch_norm() -> None:
    torch.manual_seed(7)
    module = layer_and_norm(nn.Conv2d(6, 8, 3)).eval()
    x = example(module[0])
    region = quantized(module, x)
    expected = module(x)
    other = layer_and_norm(nn.Conv2d(6, 8, 3)).eval()
    restored = attach(other, region.graph, region.plan, traced=False)
    other.load_state_dict(module.state_dict())
    restored.set_state("quantize")
    assert torch.equal(other(x), expected)
    copied = copy.deepcopy(module)
    with torch.no_grad():
        module[1].weight.mul_(-3.0)
    assert torch.equal(copied(x), expected)
