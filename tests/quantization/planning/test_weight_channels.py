"""One scale per output channel for every op that has a weight: as many as channels, each that of the channel alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import check, compare, sensitivity
from lightning_qat.analysis.statistics.statistics import layer_statistics
from lightning_qat.quantization.functions.function_table import TABLE
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region

CONVS: dict[bool, tuple[Any, ...]] = {
    False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
WEIGHTS_ONLY = {"activation": {"dtype": "float32"}, "weight": {"observer": "minmax"}}


def uneven(weight: Tensor) -> None:
    """Every element of another size, so that no two channels have the same largest value."""
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape) * torch.logspace(-2, 1, weight.numel()).reshape(weight.shape))


def quantized(module: nn.Module, *args: Tensor, overrides: tuple[Any, ...] = ()) -> Region:
    region = insert(module, args, qconfig=WEIGHTS_ONLY, overrides=overrides)
    calibrate(region, [args])
    return region


def channel_of_conv(conv: Any, channel: int) -> Tensor:
    """The elements of a weight that an output channel is computed from, by the definition of the groups."""
    if not conv.transposed:
        return conv.weight[channel]
    rows, columns = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    group, column = divmod(channel, columns)
    return conv.weight[group * rows : (group + 1) * rows, column]


@pytest.mark.parametrize("norm", [False, True], ids=["", "batch_norm"])
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(4, 6, 1), (4, 6, 2), (6, 6, 6), (3, 6, 3), (6, 3, 3)])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "conv_transpose"])
def test_convolutions(transposed: bool, dimensions: int, inputs: int, outputs: int, groups: int, norm: bool) -> None:
    """Issue 12, number thirteen: groups, depthwise with one and with two outputs each, in every dimension."""
    torch.manual_seed(0)
    conv = CONVS[transposed][dimensions - 1](inputs, outputs, 2, groups=groups)
    uneven(conv.weight)
    module = nn.Sequential(conv, NORMS[dimensions - 1](outputs), nn.ReLU()) if norm else nn.Sequential(conv)
    if norm:
        nn.init.normal_(module[1].weight)
        nn.init.uniform_(module[1].running_var, 0.05, 4.0)
    module.eval()
    x = torch.randn(2, inputs, *[4] * dimensions)
    expected_channels = [channel_of_conv(conv, channel).detach() for channel in range(outputs)]
    region = quantized(module, x)
    scale = region.points["0.weight"].scale
    assert scale.shape == (outputs,)
    assert scale.tolist() == pytest.approx([float(c.abs().max()) / 127 for c in expected_channels])
    with torch.no_grad():
        for channel, values in enumerate(expected_channels):
            step = float(scale[channel])
            channel_of_conv(conv, channel).copy_(torch.fake_quantize_per_tensor_affine(values, step, 0, -127, 127))
        by_region = module(x)
        torch.testing.assert_close(by_region, region.remove()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unbatched", [False, True])
def test_groups_are_found_without_a_batch_axis(unbatched: bool) -> None:
    x = torch.randn(4, 5, 5) if unbatched else torch.randn(1, 4, 5, 5)
    region = quantized(nn.ConvTranspose2d(4, 6, 2, groups=2).eval(), x)
    assert region.points["weight"].scale.shape == (6,) if "weight" in region.points else True
    (point,) = [p for p in region.plan.points if p.is_weight]
    assert (point.axis, point.channels, point.groups) == (1, 6, 2)


class Product(nn.Module):
    """A function of data and a weight."""

    def __init__(self, shape: tuple[int, ...], function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        uneven(self.weight)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


# name: shape of the data, shape of the weight, function, axis of the output channels in the weight
PRODUCTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[..., Tensor], int]] = {
    "linear": ((2, 3), (5, 3), F.linear, 0),
    "matmul, weight right": ((2, 3), (3, 5), torch.matmul, 1),
    "matmul, weight left": ((3, 2), (5, 3), lambda x, w: w @ x, 0),
    "mm": ((2, 3), (3, 5), torch.mm, 1),
    "mv": ((3,), (5, 3), lambda x, w: torch.mv(w, x), 0),
    "addmm": ((2, 3), (3, 5), lambda x, w: torch.addmm(x[:, :1], x, w), 1),
    "addmv": ((3,), (5, 3), lambda x, w: torch.addmv(x[:1], w, x), 0),
    "inner": ((2, 3), (5, 3), torch.inner, 0),
    "einsum, right": ((2, 4, 3), (3, 5), lambda x, w: torch.einsum("bnd,de->bne", x, w), 1),
    "einsum, left": ((2, 3), (5, 3), lambda x, w: torch.einsum("ed,bd->be", w, x), 0),
    "einsum without arrow": ((2, 3), (3, 5), lambda x, w: torch.einsum("ab,bc", x, w), 1),
    "tensordot": ((2, 3), (3, 5), lambda x, w: torch.tensordot(x, w, dims=1), 1),
    "chain_matmul": ((2, 3), (3, 5), lambda x, w: torch.linalg.multi_dot([x, w]), 1),
    "conv_tbc": ((6, 2, 3), (2, 3, 5), lambda x, w: torch.conv_tbc(x, w, torch.zeros(5)), 2),
    "convolution": (
        (1, 3, 6),
        (5, 3, 2),
        lambda x, w: torch.convolution(x, w, None, [1], [0], [1], False, [0], 1),
        0,
    ),
    "bilinear": ((2, 3), (5, 3, 3), lambda x, w: F.bilinear(x, x, w), 0),
}


@pytest.mark.parametrize(("data", "shape", "function", "axis"), PRODUCTS.values(), ids=PRODUCTS.keys())
def test_products(data: tuple[int, ...], shape: tuple[int, ...], function: Callable[..., Tensor], axis: int) -> None:
    """Issue 12, number thirteen: a scale for each of five output channels."""
    torch.manual_seed(0)
    net = Product(shape, function)
    region = quantized(net, torch.randn(data))
    (point,) = [p for p in region.plan.points if p.is_weight]
    largest = net.weight.detach().abs().movedim(axis, 0).flatten(1).amax(1)
    assert region.points[point.name].scale.tolist() == pytest.approx((largest / 127).tolist())
    assert "shared scales" not in [f.kind for f in check(region).findings]


def test_grouped_transposed_convolution_by_its_primitive() -> None:
    net = Product((4, 3, 2), lambda x, w: torch.convolution(x, w, None, [1], [0], [1], True, [0], 2))
    region = quantized(net, torch.randn(1, 4, 6))
    (point,) = [p for p in region.plan.points if p.is_weight]
    assert (point.channels, point.groups) == (6, 2)


SHARED: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[..., Tensor], str]] = {
    "bmm": ((4, 2, 3), (4, 3, 5), torch.bmm, "all matrices of the batch share them"),
    "matmul": ((4, 2, 3), (4, 3, 5), torch.matmul, "all matrices of the batch share them"),
    "baddbmm": ((4, 2, 3), (4, 3, 5), lambda x, w: torch.baddbmm(x[..., :1], x, w), "all matrices of the batch"),
    "einsum of experts": ((4, 2, 3), (4, 3, 5), lambda x, w: torch.einsum("enk,ekf->enf", x, w), "all matrices"),
    "einsum of heads": ((2, 3), (3, 4, 5), lambda x, w: torch.einsum("nk,khf->nhf", x, w), "2 axes of it hold"),
    "tensordot": ((2, 3), (3, 4, 5), lambda x, w: torch.tensordot(x, w, dims=1), "2 axes of it hold"),
    "inner": ((2, 3), (4, 5, 3), torch.inner, "2 axes of it hold"),
}


@pytest.mark.parametrize(("data", "shape", "function", "why"), SHARED.values(), ids=SHARED.keys())
def test_coarser_scales_are_a_finding(
    data: tuple[int, ...], shape: tuple[int, ...], function: Callable[..., Tensor], why: str
) -> None:
    """Issue 12, number thirteen: where one axis does not hold all channels, the plan and the check say so."""
    torch.manual_seed(0)
    region = quantized(Product(shape, function), torch.randn(data))
    (point,) = [p for p in region.plan.points if p.is_weight]
    assert why in point.reason
    (found,) = [f for f in check(region).findings if f.kind == "shared scales"]
    assert (found.severity, found.names) == ("info", (point.name,))


def test_nothing_is_coarser_than_asked_where_one_scale_is_asked_for() -> None:
    rule = {"match": "*", "weight": {"granularity": "per_tensor"}}
    net = Product((4, 3, 5), torch.bmm)
    region = quantized(net, torch.randn(4, 2, 3), overrides=(rule,))
    assert [f for f in check(region).findings if f.kind == "shared scales"] == []


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_have_a_scale_per_gate_and_unit(kind: Any) -> None:
    layer = kind(3, 4, num_layers=2, bidirectional=True).eval()
    region = quantized(layer, torch.randn(5, 2, 3))
    scales = [region.points[p.name].scale for p in region.plan.points if p.is_weight]
    weights = [w.detach() for name, w in layer.named_parameters() if name.startswith("weight")]
    assert len(scales) == len(weights) == 8
    for scale, weight in zip(scales, weights, strict=True):
        assert scale.tolist() == pytest.approx((weight.abs().amax(1) / 127).tolist())


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_recurrent_cells(kind: Any) -> None:
    cell = kind(3, 4).eval()
    region = quantized(cell, torch.randn(2, 3))
    scales = [region.points[p.name].scale for p in region.plan.points if p.is_weight]
    for scale, weight in zip(scales, (cell.weight_ih, cell.weight_hh), strict=True):
        assert scale.tolist() == pytest.approx((weight.detach().abs().amax(1) / 127).tolist())


def test_attention_has_a_scale_per_row_of_its_projections() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    region = quantized(attention, x, x, x)
    scales = torch.cat([region.points[p.name].scale for p in region.plan.points if p.is_weight])
    rows = torch.cat([attention.in_proj_weight, attention.out_proj.weight]).detach().abs().amax(1) / 127
    assert scales.tolist() == pytest.approx(rows.tolist())


def test_a_table_of_values_has_one_scale_as_its_result_has() -> None:
    """The rows of an embedding are looked up: no channel is accumulated, and the codes are handed on."""
    region = quantized(nn.Embedding(10, 4).eval(), torch.tensor([1, 2]))
    (point,) = [p for p in region.plan.points if p.is_weight]
    assert point.axis is None
    assert "shared scales" not in [f.kind for f in check(region).findings]


def test_every_kind_with_a_weight_is_tried() -> None:
    """The table of functions and the tests above name the same kinds."""
    tried = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "rmatmul"}
    tried |= {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
    tried |= {"embedding", "embedding_bag", "bmm", "baddbmm", "addbmm", *(name.partition(",")[0] for name in PRODUCTS)}
    tried |= {name.partition(" ")[0] for name in PRODUCTS}
    without_channels = {"dot", "vdot", "vecdot", "outer", "addr"}  # one output; or an output for each number
    assert {kind for kind, spec in TABLE.items() if spec.weights or spec.gemm} <= tried | without_channels


# -- what is done with such a weight


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(4, 6, 2), (6, 6, 6), (3, 6, 3)])
@pytest.mark.parametrize("learned", [False, True])
def test_training_moves_each_scale_by_its_own_channel(inputs: int, outputs: int, groups: int, learned: bool) -> None:
    """Scales that follow the weight, and learned ones, whose gradient is that of an ungrouped layer per channel."""
    torch.manual_seed(0)
    conv = nn.ConvTranspose1d(inputs, outputs, 2, groups=groups, bias=False)
    net, x = nn.Sequential(conv), torch.randn(2, inputs, 5)
    region = quantized(net, x)
    if learned:
        region.learn_scales({"weight"})
    scale = region.points["0.weight"].scale
    before = scale.detach().clone()
    with torch.no_grad():
        channel_of_conv(conv, 1).mul_(3.0)
    net.train()
    result = net(x)
    if not learned:
        moved = torch.isclose(scale / before, torch.tensor(1.0))
        assert moved.tolist() == [channel != 1 for channel in range(outputs)]
        assert float(scale[1] / before[1]) == pytest.approx(3.0)
        return
    result[:, 1].sum().backward()
    gradient = region.points["0.weight"].scale.grad
    assert gradient is not None
    assert torch.nonzero(gradient).flatten().tolist() == [1]


def test_scales_survive_a_checkpoint_and_analyses_read_them() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5)

    def make() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose1d(4, 6, 2, groups=2), nn.ReLU(), nn.Conv1d(6, 2, 1)).eval()

    net = make()
    region = insert(net, (x,))
    calibrate(region, [x])
    other = make()
    restored = insert(other, (x,))
    other.load_state_dict(net.state_dict())
    restored.set_state("quantize")
    assert torch.equal(other(x), net(x))
    assert layer_statistics(region, [x]).rows[1].clipped_share == 0.0
    assert {"0.weight"} <= {row.point for row in sensitivity(region, [x]).rows}
    assert compare(region, [x]).rows
    assert "dead channels" not in [f.kind for f in check(region).findings]
