"""In-place writes, opaque producers, constants, masks, transforms (foundation 4; design sections 3 and 4)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.tracing.tracer import trace
from tests.quantization.models import Transformer, calibrated

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Calls(nn.Module):
    """A module whose forward is the given function; submodules, parameters and buffers by keyword."""

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def close_to_float(module: nn.Module, *args: Any, rtol: float = 1e-3, **options: Any) -> Region:
    """Quantize with 16 bits and check that the result is that of the float module up to small errors, with gradient."""
    reference = copy.deepcopy(module)
    expected = reference(*copy.deepcopy(args))
    qconfig = {"activation": {"dtype": "int16", "observer": "minmax"}, "weight": {"dtype": "int16"}}
    region = calibrated(module, *copy.deepcopy(args), qconfig=qconfig, **options)
    copies = copy.deepcopy(args)
    result = module(*copies)
    assert region.unplanned == {}
    torch.testing.assert_close(result, expected, rtol=rtol, atol=rtol * float(expected.detach().abs().max()))
    if result.requires_grad:
        result.square().sum().backward()
        expected.square().sum().backward()
        for mine, float_one in zip(module.parameters(), reference.parameters(), strict=True):
            if float_one.grad is not None:
                scale = float(float_one.grad.abs().max())
                torch.testing.assert_close(mine.grad, float_one.grad, rtol=0.05, atol=0.05 * scale)
    return region


# -- in-place writes


def test_in_place_op_with_discarded_result_is_quantized_where_it_is_read() -> None:
    """foundation 4, design 3."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        y = self.linear(x)
        y.mul_(2)
        return self.last(y)

    region = close_to_float(Calls(forward, linear=nn.Linear(4, 4), last=nn.Linear(4, 2)), X)
    assert "mul_0.output" not in region.points
    assert "quantized where it is read" in region.plan.float_points["mul_0.output"]
    assert region.plan.by_name["last.input0"].reason.endswith("written in place by mul_0")


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.mul_(2),
        lambda y: y.add_(1).relu_(),
        lambda y: F.relu(y, inplace=True),
        lambda y: F.leaky_relu_(y),
        lambda y: y.__setitem__((slice(None), 0), 5.0),
        lambda y: y.__setitem__(y > 0, -1.0),
        lambda y: y[1:].mul_(3),
        lambda y: y.view(-1)[2:5].zero_(),
        lambda y: y.clamp_(-0.5, 0.5),
        lambda y: y.copy_(y.flip(0) * 2),
        lambda y: y.masked_fill_(y < 0, 0.25),
        lambda y: y.index_add_(0, torch.tensor([0]), torch.ones(1, 4)),
        lambda y: torch.sin_(y),
    ],
    ids="mul add-relu relu leaky setitem mask slice zero clamp copy masked_fill index_add sin".split(),  # noqa: SIM905
)
@pytest.mark.parametrize("first", ["input", "op", "view"])
def test_what_an_in_place_write_does_is_not_lost(write: Callable[[Tensor], object], first: str) -> None:
    """foundation 4: whatever the spelling, and whether the tensor is an input, a result or a view of one."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        y = {"input": lambda: x, "op": lambda: self.linear(x) * 1.5, "view": lambda: (self.linear(x) + 1).t().t()}[
            first
        ]()
        write(y)
        return self.last(y + 0.5)

    close_to_float(Calls(forward, linear=nn.Linear(4, 4), last=nn.Linear(4, 2)), X)


def test_in_place_op_whose_result_is_used_has_an_output_quantizer() -> None:
    """foundation 4."""

    def forward(self: Calls, x: Tensor, y: Tensor) -> Tensor:
        x = self.linear(x)
        x += self.linear(y)
        return torch.tanh(x)

    region = close_to_float(Calls(forward, linear=nn.Linear(4, 4)), X, X + 1)
    assert "add_0.output" in region.points
    assert "tanh_0.input0" not in region.points


def test_alias_read_after_an_in_place_op_sees_the_written_values() -> None:
    """foundation 4: identity = x; x += y; use(identity)."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        x = self.linear(x)
        alias = x
        x += 3.0
        return torch.tanh(x) + torch.sigmoid(alias)

    region = close_to_float(Calls(forward, linear=nn.Linear(4, 4)), X)
    assert "sigmoid_0.input0" in region.points


def test_input_written_in_place_is_written_for_the_caller_too() -> None:
    """foundation 4: the operand that is written must stay the caller's tensor."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 1

    module, batch = Calls(forward), X.clone()
    region = calibrated(module, batch)
    batch = X.clone()
    out = module(batch)
    assert "mul_0.input0" in region.points
    torch.testing.assert_close(batch, 2 * X, atol=0.02, rtol=0)
    torch.testing.assert_close(out, 2 * X + 1, atol=0.05, rtol=0)


def test_tensor_read_by_a_quantizer_and_written_afterwards_trains() -> None:
    """foundation 4: backward must not look at values that were overwritten."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        y = self.linear(x)
        y[:, 0] = 0.0
        a = y + 1
        y[:, 1] = 0.5
        return a + (y + 2)

    close_to_float(Calls(forward, linear=nn.Linear(4, 4)), X)


def test_results_written_into_a_fresh_tensor() -> None:
    """foundation 4: out = zeros(); out[i] = f(x)."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        out = torch.zeros(3, 2)
        for k in range(3):
            out[k] = self.linear(x[k])
        return torch.tanh(out)

    region = close_to_float(Calls(forward, linear=nn.Linear(4, 2)), X)
    assert region.plan.by_name["tanh_0.input0"].reason.endswith("written in place by setitem_2")


def test_out_argument_is_written() -> None:
    def forward(self: Calls, x: Tensor) -> Tensor:
        out = torch.empty(3, 4)
        torch.add(x, 1.0, out=out)
        return torch.tanh(out)

    region = close_to_float(Calls(forward), X)
    assert [name for name in region.points if name.startswith("add_0")] == ["add_0.input0"]


def test_buffer_that_is_written_while_running_is_not_a_constant() -> None:
    """foundation 4: a memory or cache is data, not a weight."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        y = x @ self.bank
        self.bank[0] = x.mean(0)
        return y

    module = Calls(forward, bank=torch.randn(4, 4))
    region = insert(module, (X,))
    assert "matmul_0.weight" not in region.points
    assert "written while running" in region.plan.by_name["matmul_0.input1"].reason


def test_weight_of_spectral_norm_is_a_weight() -> None:
    """A8: its power iteration writes buffers in train mode, but from the weight alone: that is no activation."""
    module = nn.Sequential(nn.Linear(4, 4), torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2)))
    region = insert(module, (X,))
    assert {name for name in region.points if name.startswith("1.")} == {"1.linear_0.weight"}
    assert region.points["1.linear_0.weight"].axis == 0


# -- opaque producers


def _twice(x: Tensor) -> Tensor:
    return x * 2 + 1


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    scripted = torch.jit.script(_twice)


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x + x.sum() * 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


@pytest.mark.parametrize("function", [scripted, Custom.apply, lambda x: torch.from_numpy(x.detach().numpy() * 2)])
def test_opaque_result_is_quantized_at_its_consumer(function: Callable[[Tensor], Tensor]) -> None:
    """foundation 4, design 3: script functions, custom autograd functions, other libraries."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        return self.last(function(self.first(x)))

    region = close_to_float(Calls(forward, first=nn.Linear(4, 4), last=nn.Linear(4, 2)), X)
    assert region.plan.by_name["last.input0"].reason.endswith("produced by code that cannot be traced")
    assert [op.kind for op in region.graph.ops if op.kind in ("mul", "add", "sum")] == []


def test_ops_inside_a_custom_function_are_left_alone() -> None:
    """design 3: its internals are seen by the mode, but belong to one opaque op."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        return Custom.apply(x) * 3  # type: ignore[no-untyped-call]

    region = close_to_float(Calls(forward), X)
    assert [op.name for op in region.graph.ops] == ["mul_0"]


def test_function_transforms_stay_float_with_a_reason() -> None:
    """foundation 4, design 3: vmap."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        return self.linear(torch.vmap(lambda row: row.mul(2).tanh())(x))

    region = close_to_float(Calls(forward, linear=nn.Linear(4, 2)), X)
    floats = {op.name: op.reason for op in region.plan.ops if op.status == "float"}
    assert {"mul_0", "tanh_0"} <= floats.keys()
    assert all("function transform" in reason for reason in floats.values())
    assert "linear.input0" in region.points


@pytest.mark.parametrize("layout", ["sparse", "csr", "nested", "jagged"])
def test_sparse_and_nested_tensors_stay_float_with_a_reason(layout: str) -> None:
    """foundation 4: they have no grid, and most of their functions are missing."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        y = self.first(x)
        if layout in ("sparse", "csr"):
            adjacency = torch.eye(3).to_sparse() if layout == "sparse" else torch.eye(3).to_sparse_csr()
            return self.last(adjacency @ y)
        options = {"layout": torch.jagged} if layout == "jagged" else {}
        nested = torch.nested.as_nested_tensor([y[:1], y[1:]], **options)
        return self.last(torch.cat(list(torch.relu(nested).unbind())))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(nested tensors|Sparse CSR).*")
        region = close_to_float(Calls(forward, first=nn.Linear(4, 4), last=nn.Linear(4, 2)), X)
    reasons = {op.name: op.reason for op in region.plan.ops if op.status == "float"}
    assert any("sparse or nested" in reason for reason in reasons.values())
    assert {"first.weight", "last.weight"} <= set(region.points)
    assert any(point.op == "last" or point.op.startswith("cat") for point in region.plan.points if not point.is_weight)


@pytest.mark.parametrize("bag", [False, True])
def test_embedding_that_rescales_its_table_does_so_to_the_weight_itself(bag: bool) -> None:
    """``max_norm`` writes into the weight: no quantized value may get there, and training goes on."""
    make = nn.EmbeddingBag if bag else nn.Embedding
    module = nn.Sequential(make(6, 3, max_norm=1.0), nn.Linear(3, 2))
    tokens = torch.tensor([[0, 2], [1, 1]])
    reference = copy.deepcopy(module)
    insert(module, (tokens,)).remove()
    assert torch.equal(module[0].weight, reference[0].weight)
    calibrated(module, tokens)
    for run in (module, reference):
        run.train()
        run(tokens).square().sum().backward()
        run[0].weight.data.mul_(3)
        run(tokens)
    torch.testing.assert_close(module[0].weight, reference[0].weight, rtol=1e-6, atol=0)  # rescaled once or twice more
    assert module[0].weight.grad is not None


# -- constants


def dim_t() -> Tensor:
    i = torch.arange(8)
    return 10000 ** (2 * (i // 2) / 8)


def test_constant_subgraph_stays_exact_and_has_one_input_point_where_it_joins_data() -> None:
    """foundation 4, B7: dim_t and a sine-cosine position embedding made in forward."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        angles = x[:, :1] / dim_t()
        position = torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), 2).flatten(1)
        grid = torch.linspace(0, 1, 8).outer(torch.ones(8)).sin().mean(0)
        return position + grid

    region = calibrated(Calls(forward), X)
    constant = {op.name for op in region.plan.ops if op.status == "constant"}
    assert {"arange_0", "floor_divide_0", "rpow_0", "linspace_0", "outer_0"} <= constant
    assert not any(name.rpartition(".")[0] in constant for name in region.points)
    seen: dict[str, Tensor] = {}
    with region.tap(lambda name, value, _: seen.update({name: value})):
        region.target(X)
    assert torch.equal(seen["div_1.input1"], dim_t())
    assert "add_0.input1" in region.points


@pytest.mark.parametrize("where", ["buffer", "attribute", "global", "parameter"])
def test_constant_tensors_wherever_they_live(where: str) -> None:
    """foundation 4."""
    tensor = torch.randn(4)

    def forward(self: Calls, x: Tensor) -> Tensor:
        constant = tensor if where == "global" else self.constant if where != "attribute" else self.__dict__["plain"]
        return x * (constant * 2)

    module = Calls(forward, constant=nn.Parameter(tensor) if where == "parameter" else tensor.clone())
    module.__dict__["plain"] = tensor.clone()
    region = insert(module, (X,))
    status = region.plan.status
    assert (status["mul_0"].status, status["mul_1"].status) == ("constant", "quantized")
    assert list(region.points) == ["mul_1.input0", "mul_1.input1", "mul_1.output"]


def test_table_kept_from_the_first_forward_is_a_constant() -> None:
    """foundation 4: a lazily made rotary table is made by traced ops once, and met as a plain tensor later."""

    def forward(self: Calls, x: Tensor) -> Tensor:
        if "table" not in self.__dict__:
            self.__dict__["table"] = torch.arange(4.0).cos()
        return x * self.__dict__["table"]

    region = insert(Calls(forward), batches=[X, X + 1])
    assert region.plan.status["mul_0"].status == "quantized"
    assert {s.kind for o in region.graph.by_name["mul_0"].operands for s in o.sources} == {"input", "op", "constant"}


def test_state_kept_from_an_earlier_forward_is_data() -> None:
    def forward(self: Calls, x: Tensor) -> Tensor:
        memory = self.__dict__.get("memory", x)
        self.__dict__["memory"] = torch.tanh(x)
        return memory @ self.weight

    region = insert(Calls(forward, weight=nn.Parameter(torch.randn(4, 2))), batches=[X, X + 1])
    assert "kept from an earlier forward" in region.plan.by_name["matmul_0.input0"].reason


def test_single_constants_need_no_quantizer() -> None:
    def forward(self: Calls, x: Tensor) -> Tensor:
        return x * self.gain + torch.tensor(0.5)

    region = insert(Calls(forward, gain=nn.Parameter(torch.tensor(2.0))), (X,))
    assert list(region.points) == ["mul_0.input0", "mul_0.output", "add_0.output"]
    assert "single constant" in region.plan.float_points["mul_0.input1"]


# -- additive masks

LENGTHS = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "-inf": lambda m: torch.zeros(3, 4).masked_fill(m, float("-inf")),
    "finfo.min": lambda m: torch.zeros(3, 4).masked_fill(m, torch.finfo(torch.float32).min),
    "(1 - m) * -1e9": lambda m: (1.0 - (~m).float()) * -1e9,
    "(m - 1) * 1e9": lambda m: ((~m).float() - 1.0) * 1e9,
    "where": lambda m: torch.where(m, -1e9, 0.0),
    "where tensor": lambda m: torch.where(m, torch.tensor(float("-inf")), torch.zeros(3, 4)),
    "full": lambda m: torch.full((3, 4), float("-inf")) * m if not m.any() else torch.full((3, 4), -1e9) * m,
    "two values": lambda m: torch.zeros(3, 4).masked_fill(m, -100.0),
    "triu": lambda m: torch.full((4, 4), float("-inf")).triu(1)[:3],
    "log": lambda m: ((~m).float() + 1e-45).log(),
}


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("given", ["made in forward", "input", "buffer"])
def test_additive_mask_does_not_widen_a_scale_and_is_kept_exactly(make: Callable[[Tensor], Tensor], given: str) -> None:
    """foundation 4, design 4."""

    def forward(self: Calls, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.linear(x)
        additive = {"made in forward": lambda: make(mask), "input": lambda: mask, "buffer": lambda: self.mask}[given]()
        masked = scores + additive
        self.__dict__["seen"] = masked.detach()
        return masked.softmax(-1)

    module = Calls(forward, linear=nn.Linear(4, 4), mask=make(LENGTHS))
    mask = LENGTHS if given == "made in forward" else make(LENGTHS)
    region = calibrated(module, X, mask)
    for name, fake_quant in region.points.items():
        assert float(fake_quant.scale.max()) < 0.1, name
    out = module(X, mask)
    expected = make(LENGTHS)
    blocked = expected < -50
    assert blocked.any()
    assert torch.equal(module.__dict__["seen"][blocked] <= -50, torch.ones(int(blocked.sum()), dtype=torch.bool))
    if torch.isinf(expected).any():
        assert torch.isinf(module.__dict__["seen"][blocked]).all()
    assert (out[blocked] == 0).all()
    assert region.plan.status["add_0"].reason.startswith("mask") or region.plan.status["add_1"].reason.startswith(
        "mask"
    )


PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x - 1e9 * m": lambda x, m: x - 1e9 * m,
    "x -= 1e30 * m": lambda x, m: x.sub_(1e30 * m),
    "x - (1 - n) * 1e4": lambda x, m: x - (1 - (1 - m)) * 1e4,
}


@pytest.mark.parametrize("write", PENALTIES.values(), ids=PENALTIES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_mask_that_is_subtracted_does_not_widen_a_scale(
    write: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    """foundation 4, design 4: XLNet and models ported from TensorFlow."""

    def forward(self: Calls, x: Tensor, mask: Tensor) -> Tensor:
        return write(self.linear(x), mask.float()).softmax(-1)

    region = close_to_float(Calls(forward, linear=nn.Linear(4, 4)), X, LENGTHS.to(dtype))
    out = region.target(X, LENGTHS.to(dtype))
    assert (out[LENGTHS] == 0).all()
    assert all(float(f.scale.max()) < 0.1 for f in region.points.values())


def test_penalty_given_as_an_input_is_a_mask() -> None:
    region = close_to_float(Calls(lambda self, x, m: (x - m).softmax(-1)), X, LENGTHS * 1e9)
    assert list(region.points) == ["softmax_0.output"]


def test_scores_filled_by_masked_fill_or_where_stay_on_their_grid() -> None:
    """foundation 4: -inf passes through data movement, softmax reads it exactly."""

    def forward(self: Calls, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.linear(x)
        filled = scores.masked_fill(mask, float("-inf"))
        chosen = torch.where(mask, float("-inf"), scores)
        return filled.softmax(-1) + chosen.softmax(-1)

    region = calibrated(Calls(forward, linear=nn.Linear(4, 4)), X, LENGTHS)
    out = region.target(X, LENGTHS)
    assert (out[LENGTHS] == 0).all()
    assert all(float(f.scale.max()) < 0.1 for f in region.points.values())


def test_product_that_a_mask_is_added_to_has_quantized_operands() -> None:
    """nn.MultiheadAttention with weights and padding calls baddbmm(mask, q, k): only its result holds the mask."""

    def forward(self: Calls, q: Tensor, k: Tensor) -> Tensor:
        return torch.baddbmm(self.mask, q, k.mT).softmax(-1)

    mask = torch.zeros(1, 3).masked_fill(torch.tensor([[False, False, True]]), float("-inf"))
    region = close_to_float(Calls(forward, mask=mask), X[None], X[None].flip(1))
    assert {"baddbmm_0.input1", "baddbmm_0.input2"} <= set(region.points)
    assert region.plan.float_points["baddbmm_0.output"].startswith("mask")
    assert region.plan.status["baddbmm_0"].status == "quantized"


@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product_attention_with_masks(causal: bool) -> None:
    """foundation 4."""
    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).tril() == 0, float("-inf"))

    def forward(self: Calls, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, None if causal else mask, is_causal=causal)

    x = torch.randn(2, 4, 8)
    region = close_to_float(Calls(forward, qkv=nn.Linear(8, 24)), x, rtol=5e-3)
    assert [n for n in region.points if n.startswith("scaled")] == ["scaled_dot_product_attention_0.output"]


def test_padding_and_causal_masks_of_the_transformer_encoder() -> None:
    """foundation 4: blocked positions have no influence, as in float."""
    module = Transformer().eval()
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    region = calibrated(module, x, padding, True)
    with torch.no_grad():
        out = module(x, padding, True)
        changed = x.clone()
        changed[1, 3:] += 1.0
        changed[0, 4] += 1.0
        again = module(changed, padding, True)
    assert torch.equal(out[1, :3], again[1, :3])
    assert torch.equal(out[0, :4], again[0, :4])
    assert region.unplanned == {}


def test_data_with_large_negative_values_is_not_taken_for_a_mask() -> None:
    """Spread-out values are data, however large."""
    x = torch.linspace(-1e6, 1e3, 12).reshape(3, 4)
    graph = trace(Calls(lambda self, x: x + 1), [x])
    assert not graph.ops[0].mask
    graph = trace(Calls(lambda self, x: (1 - x) - -x), [x])
    assert not any(op.mask for op in graph.ops)


# -- joins


def test_binary_maximum_reads_both_operands() -> None:
    region = insert(Calls(lambda self, x, y: torch.max(torch.tanh(x), y)), (X, X))
    assert region.plan.status["maximum_0"].status == "quantized"
    assert "maximum_0.input1" in region.points


def test_second_result_of_meshgrid_comes_from_the_second_tensor() -> None:
    def forward(self: Calls, x: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(torch.tanh(x[0]), x[1], indexing="ij")
        return torch.sigmoid(rows) + torch.cos(columns)

    region = insert(Calls(forward), (X,))
    assert "sigmoid_0.input0" not in region.points
    assert region.plan.by_name["cos_0.input0"].reason.endswith("input 0")


def test_join_of_equal_scales_needs_no_quantizer_and_of_different_ones_does() -> None:
    def forward(self: Calls, x: Tensor) -> Tensor:
        y, z = torch.tanh(x), torch.sigmoid(x)
        return torch.cat([torch.cat([y, y.flip(0)]), z]) + torch.where(x > 0, y, 0.0).repeat(3, 1)

    region = insert(Calls(forward), (X,))
    assert region.plan.status["cat_0"].status == "passes"
    assert region.plan.status["where_0"].status == "passes"
    assert "cat_1.output" in region.points


def test_scatter_joins_two_scales() -> None:
    def forward(self: Calls, x: Tensor) -> Tensor:
        y, z = torch.tanh(x), torch.exp(x)
        return y.scatter(0, torch.zeros(1, 4, dtype=torch.int64), z) + 1

    region = insert(Calls(forward), (X,))
    assert "scatter_0.output" in region.points
