"""Recurrent layers are quantized at their inputs, outputs and weights; gates and cell state stay float."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_qat.quantization.fake_quant.fake_quantize_function import fake_quantize
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.quantization.functions.test_function_table import INT16, sqnr
from tests.quantization.functions.test_op_spellings import Calls
from tests.quantization.models import MINMAX, calibrated

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
X = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
LAYERS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (layer, options)
    for layer in (nn.LSTM, nn.GRU, nn.RNN)
    for options in (
        {},
        {"batch_first": True},
        {"num_layers": 2, "bidirectional": True},
        {"bias": False},
        {"num_layers": 2, "dropout": 0.5},
    )
]
LAYERS += [
    (nn.LSTM, {"proj_size": 3, "num_layers": 2}),
    (nn.RNN, {"nonlinearity": "relu"}),
]


class Recurrent(nn.Module):
    """A recurrent layer whose sequence and final state are both used."""

    def __init__(self, layer: type[nn.Module], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer(4, 5, **options)
        width = options.get("proj_size", 0) or 5
        self.head = nn.Linear(width * (2 if options.get("bidirectional") else 1), 2)
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sequence, state = self.layer(x)
        return self.head(sequence), self.last((state[0] if isinstance(state, tuple) else state)[-1])


def ids(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else "-".join(value) or "plain"


@pytest.mark.parametrize(("layer", "options"), LAYERS, ids=ids)
def test_inputs_weights_and_outputs_have_points(layer: type[nn.Module], options: dict[str, Any]) -> None:
    module = Recurrent(layer, **options)
    matrices = {n: p for n, p in module.layer.named_parameters() if p.ndim == 2}
    region = calibrated(module, X)
    points = {p.name: p for p in region.plan.points if p.op == "layer"}
    weights = [p for p in points.values() if p.is_weight]
    assert [(p.axis, p.channels) for p in weights] == [(0, w.shape[0]) for w in matrices.values()]
    assert [name for name, p in points.items() if not p.is_weight] == ["layer.input0", "layer.output"]
    assert "stay float" in region.plan.status["layer"].reason
    assert region.plan.float_points["layer.input1"] == "zeros are exact on every grid"
    assert "head.input0" not in points
    assert region.plan.by_name["last.input0"].reason == "default; result 1 of layer is not quantized"
    applied: list[str] = []
    with region.tap(lambda name, *_: applied.append(name)):
        module(X)
    assert sorted(applied) == sorted(region.points)


@pytest.mark.parametrize(("layer", "options"), LAYERS, ids=ids)
def test_int16_is_close_to_float_and_off_is_float(layer: type[nn.Module], options: dict[str, Any]) -> None:
    """Done-when 1: >= 50 dB in 16 bits, bit-identical when off, with gradients."""
    module = Recurrent(layer, **options).eval()
    reference = copy.deepcopy(module)
    region = calibrated(module, X, qconfig=INT16)
    for value, expected in zip(module(X), reference(X), strict=True):
        assert sqnr(value, expected) >= 50
    assert list(module.layer.state_dict()) == list(reference.layer.state_dict())
    region.set_state("off")
    for state in (False, True):
        module.train(state), reference.train(state)
        outputs = []
        for net in (module, reference):
            net.zero_grad()
            torch.manual_seed(3)
            out = torch.cat([o.flatten() for o in net(X)])
            out.square().sum().backward()
            outputs.append([out, *(p.grad for p in net.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_quantized_layer_equals_the_formula(kind: str) -> None:
    """One layer, one direction: torch's layer run by hand on fake-quantized tensors."""
    module = Recurrent(nn.LSTM if kind == "lstm" else nn.GRU).eval()
    region = calibrated(module, X)

    def quantized(name: str, value: Tensor) -> Tensor:
        f = region.points[name]
        return fake_quantize(value, f.scale, 0, f.quant_min, f.quant_max, f.axis)

    names = ["layer.weight", "layer.weight4" if kind == "lstm" else "layer.weight3"]
    layer: Any = copy.deepcopy(module.layer)
    layer.__dict__.pop("forward", None)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(quantized(names[0], layer.weight_ih_l0))
        layer.weight_hh_l0.copy_(quantized(names[1], layer.weight_hh_l0))
        sequence, state = layer(quantized("layer.input0", X))
        seen: dict[str, Tensor] = {}
        with region.tap(lambda name, _, value: seen.update({name: value})):
            module(X)
    assert torch.equal(seen["layer.output"], quantized("layer.output", sequence))
    final = (state[0] if kind == "lstm" else state)[-1]
    assert torch.equal(seen["last.input0"], quantized("last.input0", final))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN], ids=ids)
def test_packed_sequences(layer: type[nn.Module]) -> None:
    def forward(self: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return torch.tanh(pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0])

    torch.manual_seed(0)
    module = Calls(forward, layer=layer(4, 5, batch_first=True)).eval()
    lengths = torch.tensor([2, 7, 4])
    expected = copy.deepcopy(module)(X, lengths)
    region = calibrated(module, X, lengths, qconfig=INT16)
    assert sqnr(module(X, lengths), expected) >= 50
    names = {p.name for p in region.plan.points}
    assert {"layer.input0", "layer.weight", "layer.output"} <= names
    assert not names & {"tanh_0.input0"}  # packing and padding move data
    assert len([p for p in region.plan.points if p.is_weight]) == 2


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell], ids=ids)
def test_cells_in_a_loop_share_their_weights(cell: type[nn.Module]) -> None:
    def forward(self: Any, x: Tensor, h: Tensor) -> Tensor:
        state: Any = (h, h) if isinstance(self.cell, nn.LSTMCell) else h
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state  # type: ignore[no-any-return]

    torch.manual_seed(0)
    module = Calls(forward, cell=cell(4, 5)).eval()
    h = torch.randn(3, 5)
    expected = copy.deepcopy(module)(X[:, :3], h)
    region = calibrated(module, X[:, :3], h, qconfig=INT16)
    assert sqnr(module(X[:, :3], h), expected) >= 50
    points = [p.name.removeprefix("cell.") for p in region.plan.points if p.op == "cell"]
    second = "weight4" if cell is nn.LSTMCell else "weight3"
    assert points == ["input0", "input1", "weight", second, "output"]  # the cell state of an LSTM has none
    assert len({id(f) for name, f in region.points.items() if ".weight" in name}) == 2
    assert "cell@2.input1" not in region.points  # the hidden state of the step before is quantized already


def test_learned_initial_state_is_quantized() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.layer(x, self.h0.expand(1, 7, 5).contiguous())[0]  # type: ignore[no-any-return]

    region = insert(Calls(forward, layer=nn.GRU(4, 5), h0=nn.Parameter(torch.randn(1, 1, 5))), (X,))
    assert "layer.input1" in region.points


def test_recurrent_layer_trains() -> None:
    """Gradients flow through the quantizers of data and weights."""
    module = Recurrent(nn.LSTM)
    region: Region = calibrated(module, X, qconfig=MINMAX)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = sum((o - 0.5).square().mean() for o in module(X))
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in module.parameters())
    assert region.unplanned == {}
