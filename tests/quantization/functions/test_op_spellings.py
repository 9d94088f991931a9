"""Every spelling of an op gets its quantizers, and at run time exactly the planned points are applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.quantization.region.insertion import insert
from tests.quantization.models import calibrated

X = torch.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)
Y = torch.linspace(0.5, 2.0, 24).reshape(2, 3, 4)
IMAGE = torch.linspace(-1.0, 1.0, 192).reshape(2, 6, 4, 4)


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def points(function: Callable[..., Any], *args: Tensor, **members: Any) -> dict[str, str]:
    """Insert, calibrate and run: the points that were applied by suffix, with the kind of their op."""
    module = Calls(function, **members)
    region = calibrated(module, *(a.clone() for a in args))
    applied: list[str] = []
    with region.tap(lambda name, *_: applied.append(name)):
        module(*(a.clone() for a in args))
    assert sorted(applied) == sorted(region.points)
    assert region.unplanned == {}
    kinds = {op.name: op.kind for op in region.graph.ops}
    return {name: kinds[name.rpartition(".")[0]] for name in region.points}


def iop(operation: str) -> Callable[[Tensor, Any], Tensor]:
    def apply(x: Tensor, y: Any) -> Tensor:
        return getattr(x, f"__i{operation}__")(y)  # type: ignore[no-any-return]

    return apply


BINARY: dict[str, list[Callable[[Tensor, Any], Tensor]]] = {
    "add": [
        lambda x, y: x + y, lambda x, y: torch.add(x, y), lambda x, y: torch.add(x, y, alpha=2), lambda x, y: x.add(y),
        lambda x, y: x.add_(y), iop("add"), lambda x, y: torch.add(input=x, other=y), lambda x, y: x.__radd__(y),
    ],
    "sub": [
        lambda x, y: x - y, lambda x, y: torch.sub(x, y), lambda x, y: x.subtract(y), lambda x, y: x.sub_(y),
        iop("sub"), lambda x, y: torch.subtract(x, y, alpha=3),
    ],
    "mul": [
        lambda x, y: x * y, lambda x, y: torch.mul(x, y), lambda x, y: x.multiply(y), lambda x, y: x.mul_(y),
        iop("mul"),
    ],
    "div": [
        lambda x, y: x / y, lambda x, y: torch.div(x, y), lambda x, y: torch.true_divide(x, y), lambda x, y: x.div_(y),
        iop("truediv"), lambda x, y: x.divide(y),
    ],
}  # fmt: skip
SPELLINGS = [(kind, n, f) for kind, functions in BINARY.items() for n, f in enumerate(functions)]


@pytest.mark.parametrize(("kind", "number", "function"), SPELLINGS, ids=[f"{k}-{n}" for k, n, _ in SPELLINGS])
def test_arithmetic_of_two_tensors(kind: str, number: int, function: Callable[[Tensor, Any], Tensor]) -> None:
    found = points(lambda self, x, y: function(x, y), X, Y)
    assert found == {f"{kind}_0.input0": kind, f"{kind}_0.input1": kind, f"{kind}_0.output": kind}


@pytest.mark.parametrize(("kind", "number", "function"), SPELLINGS, ids=[f"{k}-{n}" for k, n, _ in SPELLINGS])
def test_arithmetic_with_a_scalar(kind: str, number: int, function: Callable[[Tensor, Any], Tensor]) -> None:
    found = points(lambda self, x: function(x, 2.0), X)
    assert found == {f"{kind}_0.input0": kind, f"{kind}_0.output": kind}


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("add", lambda x: 1 + x), ("rsub", lambda x: 1 - x), ("mul", lambda x: 3 * x), ("rdiv", lambda x: 2 / (x + 3)),
        ("rpow", lambda x: 2**x), ("rsub", lambda x: torch.rsub(x, 1)), ("neg", lambda x: -x), ("pow", lambda x: x**2),
        ("abs", abs),
    ],
)  # fmt: skip
def test_reflected_and_unary_operators(kind: str, function: Callable[[Tensor], Tensor]) -> None:
    assert kind in points(lambda self, x: function(x), X).values()


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("matmul", lambda x, y: x @ y.transpose(1, 2)), ("matmul", lambda x, y: torch.matmul(x, y.mT)),
        ("bmm", lambda x, y: torch.bmm(x, y.transpose(-1, -2))), ("matmul", lambda x, y: torch.mm(x[0], y[0].T)),
        ("matmul", lambda x, y: x[0].mm(y[0].t())), ("einsum", lambda x, y: torch.einsum("bij,bkj->bik", x, y)),
        ("baddbmm", lambda x, y: torch.baddbmm(torch.zeros(1), x, y.mT)), ("mv", lambda x, y: x[0].mv(y[0, 0])),
        ("addmm", lambda x, y: torch.addmm(torch.zeros(1), x[0], y[0].T)), ("dot", lambda x, y: x[0, 0].dot(y[0, 0])),
        ("tensordot", lambda x, y: torch.tensordot(x, y, dims=([2], [2]))),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_products_of_activations(kind: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = points(lambda self, x, y: torch.tanh(function(x, y)), X, Y)
    assert [v for k, v in found.items() if k.startswith(f"{kind}_0.input")] == [kind, kind]
    assert f"{kind}_0.output" in found


@pytest.mark.parametrize(
    ("axis", "function"),
    [
        (1, lambda x, w: x @ w), (0, lambda x, w: w.T.contiguous().T.t() @ x.mT), (1, torch.matmul), (1, None),
    ],
)  # fmt: skip
def test_product_with_a_parameter_has_a_weight(axis: int, function: Any) -> None:
    weight = nn.Parameter(torch.randn(4, 5))
    if function is None:
        function, weight = (lambda x, w: torch.einsum("bij,jk->bik", x, w)), nn.Parameter(torch.randn(4, 5))
    region = insert(Calls(lambda self, x: function(x, self.w), w=weight), (X,))
    (point,) = [p for p in region.plan.points if p.is_weight]
    assert point.axis == axis


LAYERS = [
    ("conv1d", nn.Conv1d(3, 4, 2), X, 0), ("conv2d", nn.Conv2d(6, 4, 3, groups=2), IMAGE, 0),
    ("conv3d", nn.Conv3d(6, 4, 1), IMAGE[..., None], 0), ("conv_transpose1d", nn.ConvTranspose1d(3, 4, 2), X, 1),
    ("conv_transpose2d", nn.ConvTranspose2d(6, 5, 2), IMAGE, 1),
    ("conv_transpose3d", nn.ConvTranspose3d(6, 4, 1), IMAGE[..., None], 1), ("linear", nn.Linear(4, 7), X, 0),
    ("conv2d", nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), IMAGE, 0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "layer", "x", "axis"), LAYERS, ids=[f"{k}{n}" for n, (k, *_) in enumerate(LAYERS)])
def test_layers_have_a_per_channel_weight(kind: str, layer: nn.Module, x: Tensor, axis: int) -> None:
    module = Calls(lambda self, x: torch.tanh(self.layer(x)), layer=layer)
    region = calibrated(module, x)
    point = next(p for p in region.plan.points if p.is_weight)
    assert (point.axis, point.channels) == (axis, layer.weight.shape[axis])  # type: ignore[union-attr, index, operator]
    assert {p.rpartition(".")[2] for p in region.points if p.startswith("layer.")} >= {"input0", "weight", "output"}


def test_grouped_transposed_convolution_has_one_scale_for_each_output_channel() -> None:
    """Output channel c of every group reads column c of the rows of its group: one scale for each."""
    layer = nn.ConvTranspose2d(6, 4, 2, groups=2)
    region = calibrated(Calls(lambda self, x: self.layer(x), layer=layer), IMAGE)
    assert region.plan.by_name["layer.weight"].channels == 4


@pytest.mark.parametrize(
    "function",
    [
        F.relu, torch.relu, Tensor.relu, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.leaky_relu, F.hardswish,
        F.hardsigmoid, torch.sigmoid, F.sigmoid, Tensor.sigmoid, torch.tanh, F.softplus, lambda x: F.softmax(x, -1),
        lambda x: x.softmax(-1), lambda x: torch.softmax(x, 1), lambda x: F.log_softmax(x, -1), F.hardtanh, F.selu,
        lambda x: F.glu(x, -1), torch.exp, torch.sin, torch.cos, lambda x: x.mean(1), lambda x: torch.sum(x, (1, 2)),
        lambda x: x.sum(), torch.square, lambda x: x.clamp(-0.5, 0.5), lambda x: F.normalize(x, dim=-1),
        lambda x: F.layer_norm(x, (4,)), lambda x: F.group_norm(x, 3), F.instance_norm, lambda x: x.cumsum(-1),
        lambda x: F.avg_pool1d(x, 2), lambda x: F.adaptive_avg_pool1d(x, 2), lambda x: F.rms_norm(x, (4,)),
        lambda x: F.prelu(x, torch.tensor(0.1)), lambda x: torch.lerp(x, x * 2, 0.5),
    ],
)  # fmt: skip
def test_unary_functions(function: Callable[[Tensor], Tensor]) -> None:
    found = points(lambda self, x: function(x), X)
    assert sum(name.endswith(".output") for name in found) >= 1
    assert sum(".input" in name for name in found) >= 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(2, -1), lambda x: x.reshape(-1), lambda x: x.permute(2, 0, 1), lambda x: x.transpose(0, 1),
        lambda x: x.flatten(1), lambda x: x[:, 1:], lambda x: x[..., None], lambda x: x[:, torch.tensor([0, 2])],
        lambda x: x.expand(2, 3, 4), lambda x: F.pad(x, (1, 1)), lambda x: torch.roll(x, 1, 0), lambda x: x.squeeze(),
        lambda x: x.unsqueeze(0), lambda x: x.repeat(2, 1, 1), lambda x: x.flip(0),
        lambda x: x.to(torch.float64).float(),
        lambda x: F.dropout(x, 0.5, training=True), lambda x: F.max_pool1d(x, 2), lambda x: x.max(-1).values,
        lambda x: x.topk(2).values, lambda x: x.chunk(2, -1)[1], lambda x: x.unbind(0)[0], lambda x: x.split(1)[1],
        lambda x: torch.split(x, [1, 2], 1)[1], lambda x: next(iter(x)), lambda x: torch.stack(list(x)), lambda x: x.mT,
        lambda x: x.gather(-1, torch.zeros(2, 3, 1, dtype=torch.int64)), lambda x: x.contiguous().clone().detach(),
        lambda x: F.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, size=8, mode="nearest-exact"),
        lambda x: x.masked_fill(x > 0, 0.0), lambda x: torch.where(x > 0, x, 0.0), lambda x: torch.cat([x, x], 1),
        lambda x: torch.tril(x), lambda x: x.index_select(0, torch.tensor([1])), lambda x: x.unflatten(2, (2, 2)),
        lambda x: F.pixel_shuffle(x.reshape(1, 6, 2, 2)[:, :4], 2), lambda x: x.movedim(0, 1),
        lambda x: x.swapaxes(0, 1),
    ],
    ids=[f"{n}" for n in range(40)],
)  # fmt: skip
def test_data_movement_passes_quantization_through(function: Callable[[Tensor], Tensor]) -> None:
    """design 4: no quantizer of its own, and none at the consumer of what is quantized already."""
    found = points(lambda self, x: torch.sigmoid(function(torch.tanh(x))), X)
    assert found == {"tanh_0.input0": "tanh", "tanh_0.output": "tanh", "sigmoid_0.output": "sigmoid"}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.pad(x, (1, 1), value=3.0), lambda x: x.masked_fill(x > 0, 5.0),
        lambda x: torch.where(x > 0, x, 7.0),
        lambda x: F.interpolate(x, scale_factor=2, mode="linear"), lambda x: torch.maximum(x, x * 2),
        lambda x: F.interpolate(x[None], scale_factor=2, mode="bicubic"),
    ],
)  # fmt: skip
def test_options_that_leave_the_grid_need_a_quantizer(function: Callable[[Tensor], Tensor]) -> None:
    found = points(lambda self, x: torch.sigmoid(function(torch.tanh(x))), X)
    outputs = [name for name in found if name.endswith(".output")]
    assert len(outputs) >= 3


def test_unpacking_a_tensor_row_by_row() -> None:
    def forward(self: Calls, x: Tensor) -> Tensor:
        total = torch.tanh(x)
        first, second = total
        for row in total:
            first = first + row
        return first * second

    found = points(forward, X)
    assert [name for name in found if ".input" in name] == ["tanh_0.input0"]
    assert len(found) == 5


def test_embedding_quantizes_its_table() -> None:
    def forward(self: Calls, tokens: Tensor) -> Tensor:
        return self.table(tokens) + 1

    found = points(forward, torch.tensor([[0, 2], [1, 1]]), table=nn.Embedding(4, 3))
    assert found == {"table.weight": "embedding", "table.output": "embedding", "add_0.output": "add"}


def test_grid_sample_quantizes_image_and_grid() -> None:
    grid = torch.rand(2, 3, 3, 2) * 2 - 1
    found = points(lambda self, x, g: F.grid_sample(x, g, align_corners=False), IMAGE, grid)
    assert list(found) == ["grid_sample_0.input0", "grid_sample_0.input1", "grid_sample_0.output"]


def test_batch_norm_alone_is_an_op_whose_statistics_are_no_data() -> None:
    module = Calls(lambda self, x: self.bn(x), bn=nn.BatchNorm2d(6))
    region = calibrated(module, IMAGE)
    assert list(region.points) == ["bn.input0", "bn.output"]
    assert region.graph.by_name["bn"].operands[1].role == "parameter"


def out(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        result = torch.empty(2, 3, 4)
        function(x, out=result)
        return result

    return apply


@pytest.mark.parametrize(
    ("kind", "functions"),
    [
        ("sigmoid", [torch.special.expit, Tensor.sigmoid_, torch.sigmoid_, F.sigmoid, torch.ops.aten.sigmoid]),
        ("erf", [torch.erf, Tensor.erf, Tensor.erf_, torch.special.erf, torch.ops.aten.erf.default]),
        ("expm1", [torch.expm1, torch.special.expm1, Tensor.expm1_]),
        ("exp2", [torch.exp2, torch.special.exp2, Tensor.exp2]),
        ("log1p", [lambda x: (x + 2).log1p(), lambda x: torch.special.log1p(x + 2)]),
        ("atan", [torch.atan, torch.arctan, Tensor.arctan_]),
        ("asinh", [torch.asinh, torch.arcsinh, Tensor.arcsinh]),
        ("atan2", [lambda x: torch.atan2(x, x + 3), lambda x: torch.arctan2(x, x + 3)]),
        ("abs", [torch.absolute, Tensor.absolute_, abs, torch.abs_]),
        ("neg", [torch.negative, Tensor.negative_, lambda x: -x]),
        ("clamp", [lambda x: x.clip(-0.5, 0.5), lambda x: torch.clip(x, max=0.5), lambda x: torch.clamp(x, min=-0.5)]),
        ("logsigmoid", [F.logsigmoid, torch.nn.LogSigmoid()]),
        ("threshold", [lambda x: F.threshold(x, 0.1, 0.0), nn.Threshold(0.1, 0.0), lambda x: torch.threshold(x, 0, 0)]),
        ("log_softmax", [lambda x: torch.special.log_softmax(x, -1), lambda x: x.log_softmax(-1), nn.LogSoftmax(-1)]),
        ("logsumexp", [lambda x: torch.special.logsumexp(x, -1), lambda x: x.logsumexp(-1)]),
        ("norm", [lambda x: x.norm(dim=-1), lambda x: torch.linalg.norm(x, dim=-1), torch.linalg.vector_norm,
                  lambda x: torch.norm(x, p=1), torch.linalg.matrix_norm]),
        ("std", [torch.std, lambda x: x.std(-1)]),
        ("prod", [lambda x: torch.prod(x, -1), lambda x: x.prod(0)]),
        ("hardshrink", [F.hardshrink, Tensor.hardshrink, nn.Hardshrink()]),
        ("softshrink", [F.softshrink, nn.Softshrink()]),
        ("celu", [F.celu, torch.celu, lambda x: torch.celu_(x.clone()), nn.CELU(inplace=True)]),
        ("prelu", [nn.PReLU(3), lambda x: torch.prelu(x, torch.tensor(0.1))]),
        ("local_response_norm", [nn.LocalResponseNorm(2)]),
        ("cosine_similarity", [lambda x: F.cosine_similarity(x, x + 1), lambda x: nn.CosineSimilarity()(x, x + 1)]),
        ("cdist", [lambda x: torch.cdist(x, x + 1)]),
        ("fold", [lambda x: F.fold(x.reshape(1, 4, 6), (3, 4), 2), lambda x: nn.Fold((3, 4), 2)(x.reshape(1, 4, 6))]),
        ("vecdot", [lambda x: torch.linalg.vecdot(x, x + 1)]),
        ("chain_matmul", [lambda x: torch.linalg.multi_dot([x[0], x[0].T])]),
        ("outer", [lambda x: torch.ger(x[0, 0], x[0, 1]), lambda x: x[0, 0].outer(x[0, 1])]),
        ("interpolate", [lambda x: F.interpolate(x, scale_factor=2, mode="linear"), nn.Upsample(7, mode="linear")]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_every_name_of_a_function_is_the_same_op(kind: str, functions: list[Callable[[Tensor], Tensor]]) -> None:
    """A2: torch.special, torch.linalg, methods, in-place forms, modules and torch.ops."""
    for function in functions:
        found = points(lambda self, x, function=function: torch.tanh(function(torch.sin(x))), X)
        assert [k for name, k in found.items() if name.endswith(".output")].count(kind) == 1, function
        assert "tanh_0.input0" not in found, function


@pytest.mark.parametrize("function", [torch.erf, torch.sinh, torch.neg])
def test_result_written_into_a_given_tensor(function: Callable[..., Tensor]) -> None:
    found = points(lambda self, x: torch.tanh(out(function)(x)), X)
    assert list(found) == [f"{function.__name__}_0.input0", "tanh_0.input0", "tanh_0.output"]


def test_parameters_of_an_op_are_no_data() -> None:
    """Slopes, statistics and scales of layers stay float; weights of products have a point."""
    module = Calls(
        lambda self, x: self.last(self.prelu(self.norm(x)), x),
        prelu=nn.PReLU(3),
        norm=nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        last=nn.Bilinear(4, 4, 2),
    )
    region = calibrated(module, X)
    roles = {f"{op.name}.{o.name}": o.role for op in region.graph.ops for o in op.operands}
    assert roles == {
        "norm.input": "data", "norm.running_mean": "parameter", "norm.running_var": "parameter",
        "norm.weight": "parameter", "norm.bias": "parameter", "prelu.input": "data", "prelu.weight": "parameter",
        "last.input1": "data", "last.input2": "data", "last.weight": "weight", "last.bias": "parameter",
    }  # fmt: skip
    assert (region.plan.by_name["last.weight"].axis, region.plan.by_name["last.weight"].channels) == (0, 2)


def test_embedding_bag_quantizes_its_table() -> None:
    found = points(lambda self, i: self.bag(i) + 1, torch.tensor([[0, 2], [1, 1]]), bag=nn.EmbeddingBag(4, 3))
    assert found == {"bag.weight": "embedding_bag", "bag.output": "embedding_bag", "add_0.output": "add"}


def test_float_functions_have_a_reason() -> None:
    region = insert(Calls(lambda self, x: torch.tanh(torch.special.i0(x)) + (x > 0).float()), (X,))
    reasons = {op.name: op.reason for op in region.plan.ops if op.status == "float"}
    assert reasons == {
        "i0_0": "special function: its poles and steep ends leave no useful integer range",
        "gt_0": "returns no floating-point tensor",
    }
    assert region.plan.by_name["tanh_0.input0"].reason == "default; i0_0 is not quantized"


def test_function_without_a_row_is_float_with_a_reason() -> None:
    """A function of a torch release that is newer than the table."""

    def brand_new(x: Tensor) -> Tensor:
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(brand_new, (x,), x)  # type: ignore[no-any-return]
        return x * 2

    region = insert(Calls(lambda self, x: torch.tanh(brand_new(x))), (X,))
    assert region.plan.status["brand_new_0"].reason == "brand_new is unknown to this release"
    assert "tanh_0.input0" in region.points
