"""Calls of torch functions to test the rows of the function table against: what does torch really do?"""

# ruff: noqa: B008  (defaults bind the variables of loops)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GENERATOR = torch.Generator().manual_seed(0)


def _random(low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=_GENERATOR) * (high - low) + low


X, X2, X3 = (_random(-1.0, 1.0, 2, 3, 4) for _ in range(3))
POSITIVE = _random(0.5, 2.0, 2, 3, 4)
UNIT = _random(0.1, 0.9, 2, 3, 4)
ABOVE = _random(1.2, 3.0, 2, 3, 4)
IMAGE = _random(-1.0, 1.0, 2, 4, 6, 6)
VOLUME = _random(-1.0, 1.0, 1, 2, 4, 4, 4)
MATRIX, MATRIX2 = _random(-1.0, 1.0, 3, 4), _random(-1.0, 1.0, 3, 4)
VECTOR, VECTOR2 = _random(-1.0, 1.0, 4), _random(-1.0, 1.0, 4)
INDEX = torch.tensor([2, 0])
GATHER = torch.tensor([[[1, 0], [3, 3], [2, 1]], [[0, 2], [1, 1], [3, 0]]])
ROWS = torch.tensor([[0, 1, 0, 1], [2, 2, 1, 0]])
MASK = X > 0.2
W1 = _random(-1.0, 1.0, 5, 3, 2)
W2 = _random(-1.0, 1.0, 4, 2, 3, 3)
W3 = _random(-1.0, 1.0, 3, 2, 2, 2, 2)
B4 = _random(-1.0, 1.0, 4)


@dataclass(frozen=True)
class Sample:
    """One call: ``function(*inputs)`` meets the torch function ``kind``."""

    kind: str
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]


SAMPLES: list[Sample] = []


def _add(kind: str, function: Callable[..., Any], *inputs: Tensor) -> None:
    SAMPLES.append(Sample(kind, function, inputs))


def _named(names: str, *inputs: Tensor, options: tuple[Any, ...] = ()) -> None:
    """Add functions that are found under their own name and take the inputs and options."""
    for name in names.split():
        owner = next(o for o in (F, torch, torch.special, torch._C._nn, Tensor) if hasattr(o, name))
        function: Callable[..., Any] = getattr(owner, name)
        _add(name, lambda *tensors, function=function: function(*tensors, *options), *inputs)


def _methods(names: str, tensor: Tensor, *options: Any) -> None:
    for name in names.split():
        _add(name, lambda x, name=name: getattr(x, name)(*options), tensor)


# -- quantize: elementwise

_named("relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish sigmoid hardsigmoid hardswish hardshrink", X * 2)
_named("softshrink softplus logsigmoid softsign tanhshrink rrelu abs neg square exp exp2 expm1 sin cos sinh", X * 2)
_named("cosh tanh asinh atan sinc deg2rad rad2deg erf erfc ndtr log_ndtr tan", X)
_named("asin acos atanh", X * 0.9)
_named("sqrt rsqrt reciprocal log log2 log10 log1p entr", POSITIVE)
_named("acosh", ABOVE)
_named("logit", UNIT)
_named("softmin softmax log_softmax glu", X, options=(-1,))
_add("gumbel_softmax", lambda x: F.gumbel_softmax(x, dim=-1), X)
_named("add sub rsub mul maximum minimum fmax fmin atan2 hypot copysign logaddexp logaddexp2 cross kron", MATRIX[:, :3],
       MATRIX2[:, :3])  # fmt: skip
_named("div pow xlogy xlog1py float_power", POSITIVE, POSITIVE.flip(0))
_add("rdiv", lambda x: 1 / x, POSITIVE)
_add("rpow", lambda x: 2**x, X)
_add("ldexp", lambda x: torch.ldexp(x, torch.tensor([1, 2, 0, -1])), X)
_named("addcmul lerp", X, X2, UNIT)
_named("addcdiv", X, X2, POSITIVE)
_named("clamp hardtanh", X, options=(-0.5, 0.5))
_add("clamp", lambda x, low: x.clamp(low, low + 0.8), X, X2 - 1)
_named("clamp_min clamp_max", X, options=(0.1,))
_named("threshold", X, options=(0.1, 0.3))
_add("threshold", lambda x: F.threshold(x, 0.1, 0.3), X)
_add("prelu", lambda x: F.prelu(x, torch.tensor(0.2)), X)

# -- quantize: products

_add("conv1d", lambda x: F.conv1d(x, W1), X)
_add("conv2d", lambda x: F.conv2d(x, W2, B4, stride=2, padding=1, dilation=2, groups=2), IMAGE)
_add("conv3d", lambda x: F.conv3d(x, W3), VOLUME)
_add("conv_transpose1d", lambda x: F.conv_transpose1d(x, W1), X[:, :1].expand(2, 5, 4))
_add("conv_transpose2d", lambda x: F.conv_transpose2d(x, W2, stride=2, groups=2, output_padding=1), IMAGE)
_add("conv_transpose3d", lambda x: F.conv_transpose3d(x, W3), VOLUME[:, :1].expand(1, 3, 4, 4, 4))
_add("convolution", lambda x: torch.convolution(x, W2, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 2), IMAGE)
_add("convolution", lambda x: torch.convolution(x, W2, None, [1, 1], [0, 0], [1, 1], True, [0, 0], 2), IMAGE)
_add("conv_tbc", lambda x: torch.conv_tbc(x, W1.permute(2, 1, 0).contiguous(), torch.zeros(5)), X.transpose(1, 2))
_add("linear", lambda x: F.linear(x, MATRIX), X2)
_add("bilinear", lambda x, y: F.bilinear(x, y, W1.reshape(1, 5, 6)[:, :4, :4].contiguous()), MATRIX, MATRIX2)
_named("matmul bmm", X, X2.mT.contiguous())
_add("rmatmul", lambda x, y: y.__rmatmul__(x), MATRIX, MATRIX2.T.contiguous())
_named("mv", MATRIX, VECTOR)
_named("dot vdot inner outer", VECTOR, VECTOR2)
_add("vecdot", torch.linalg.vecdot, X, X2)
_add("einsum", lambda x, y: torch.einsum("bij,bkj->bik", x, y), X, X2)
_add("tensordot", lambda x, y: torch.tensordot(x, y, dims=([2], [2])), X, X2)
_add("chain_matmul", lambda x, y: torch.linalg.multi_dot([x, y, x]), MATRIX, MATRIX2.T.contiguous())
_named("addmm", MATRIX[:, :3], MATRIX, MATRIX2.T.contiguous())
_named("baddbmm", X[..., :3], X, X2.mT.contiguous())
_named("addbmm", X[0, :, :3], X, X2.mT.contiguous())
_named("addmv", VECTOR[:3], MATRIX, VECTOR2)
_named("addr", MATRIX, VECTOR[:3], VECTOR2)
_add("embedding", lambda i, w: F.embedding(i, w), ROWS, MATRIX)
_add("embedding", lambda i, w: torch.embedding(w, i), ROWS, MATRIX)
_add("embedding_bag", lambda i, w: F.embedding_bag(i, w, mode="sum"), ROWS, MATRIX)
_add("embedding_bag", lambda i, w: F.embedding_bag(i, MATRIX, per_sample_weights=w, mode="sum"), ROWS, MATRIX[:2])
_add("scaled_dot_product_attention", F.scaled_dot_product_attention, X, X2, X3)

# -- quantize: recurrent layers

for _layer in (nn.LSTM, nn.GRU, nn.RNN):
    torch.manual_seed(0)
    _options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    _kind = {nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: "rnn_tanh"}[_layer]
    _add(_kind, lambda x, layer=_layer(4, 5, **_options).requires_grad_(False): layer(x)[0], X)  # type: ignore[misc]
_add("rnn_relu", lambda x, layer=nn.RNN(4, 5, nonlinearity="relu").requires_grad_(False): layer(x)[0], X)
_add("lstm_cell", lambda x, layer=nn.LSTMCell(4, 5).requires_grad_(False): layer(x)[0], MATRIX)
_add("gru_cell", lambda x, layer=nn.GRUCell(4, 5).requires_grad_(False): layer(x), MATRIX)
_add("rnn_tanh_cell", lambda x, layer=nn.RNNCell(4, 5).requires_grad_(False): layer(x), MATRIX)
_add("rnn_relu_cell", lambda x, layer=nn.RNNCell(4, 5, nonlinearity="relu").requires_grad_(False): layer(x), MATRIX)

# -- quantize: normalization, pooling, reductions, distances, sampling

_add("batch_norm", lambda x: F.batch_norm(x, B4 * 0.1, B4.abs() + 0.5, B4 + 1, B4), IMAGE)
_add("native_batch_norm", lambda x: torch.native_batch_norm(x, B4, B4, B4, B4.abs() + 1, False, 0.1, 1e-5)[0], IMAGE)
_add("_native_batch_norm_legit",
     lambda x: torch._native_batch_norm_legit(x, B4, B4, B4, B4.abs() + 1, False, 0.1, 1e-5)[0], IMAGE)  # fmt: skip
_add("instance_norm", lambda x: F.instance_norm(x), IMAGE)
_add("layer_norm", lambda x: F.layer_norm(x, (4,)), X)
_add("native_layer_norm", lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5)[0], X)
_add("group_norm", lambda x: F.group_norm(x, 2), IMAGE)
_add("native_group_norm", lambda x: torch.native_group_norm(x, None, None, 2, 4, 36, 2, 1e-5)[0], IMAGE)
_add("rms_norm", lambda x: F.rms_norm(x, (4,)), X)
_add("_fused_rms_norm", lambda x: torch._fused_rms_norm(x, (4,), None, 1e-5)[0], X)
_add("normalize", lambda x: F.normalize(x, dim=-1), X)
_add("local_response_norm", lambda x: F.local_response_norm(x, 3), IMAGE)
_add("renorm", lambda x: torch.renorm(x, 2, 0, 0.5), X)
for _dim, _tensor in ((1, X), (2, IMAGE), (3, VOLUME)):
    for _pool in ("avg_pool", "adaptive_avg_pool"):
        _add(f"{_pool}{_dim}d", lambda x, f=getattr(F, f"{_pool}{_dim}d"): f(x, 2), _tensor)
    _add(f"lp_pool{_dim}d", lambda x, f=getattr(F, f"lp_pool{_dim}d"): f(x, 2.0, 2), _tensor.abs() + 0.1)
_named("mean nanmean sum nansum std var logsumexp", X, options=(-1,))
_named("mean sum norm var diff", X)
_add("quantile", lambda x: torch.quantile(x, 0.3, -1), X)
_add("nanquantile", lambda x: torch.nanquantile(x, 0.3, -1), X)
_add("sum_to_size", lambda x: x.sum_to_size(2, 1, 4), X)
_named("prod cumsum cumprod logcumsumexp", POSITIVE, options=(-1,))
_named("trace", MATRIX)
_add("std_mean", lambda x: torch.std_mean(x, -1)[0], X)
_add("var_mean", lambda x: torch.var_mean(x, -1)[0], X)
_add("norm", lambda x: torch.linalg.norm(x), MATRIX)
_add("norm", lambda x: torch.linalg.vector_norm(x, dim=-1), X)
_add("norm", lambda x: torch.linalg.matrix_norm(x), X)
_add("norm_except_dim", lambda x: torch.norm_except_dim(x, 2, 0), X)
_add("segment_reduce", lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([1, 1])), X)
_named("trapezoid cumulative_trapezoid", X)
_named("dist cdist pairwise_distance cosine_similarity", X, X2)
_named("pdist", MATRIX)
_add("index_add", lambda x, y: x.index_add(1, INDEX, y), X, X2[:, :2])
_add("scatter_add", lambda x, y: x.scatter_add(2, GATHER, y), X, X2)
_add("scatter_reduce", lambda x, y: x.scatter_reduce(2, GATHER, y, "sum"), X, X2)
_add("index_reduce", lambda x, y: x.index_reduce(1, INDEX, y, "prod"), X, X2[:, :2])
_add("fold", lambda x: F.fold(x, (4, 5), (2, 2)), _random(-1, 1, 1, 8, 12))
_add("interpolate", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), IMAGE)
_add("interpolate", lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True), IMAGE)
_add("upsample_linear1d", lambda x: torch._C._nn.upsample_linear1d(x, (8,), False), X)
_add("upsample_trilinear3d", lambda x: torch._C._nn.upsample_trilinear3d(x, (8, 8, 8), False), VOLUME)
for _name in ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
              "_upsample_lanczos2d_aa"):  # fmt: skip
    if hasattr(torch._C._nn, _name):
        _add(_name, lambda x, f=getattr(torch._C._nn, _name): f(x, (9, 9), False), IMAGE)
GRID = _random(-0.9, 0.9, 2, 3, 3, 2)
_add("grid_sample", lambda x, g: F.grid_sample(x, g, align_corners=False), IMAGE, GRID)
_add("grid_sampler", lambda x, g: torch.grid_sampler(x, g, 0, 0, False), IMAGE, GRID)
_add("grid_sampler_2d", lambda x, g: torch.grid_sampler_2d(x, g, 0, 0, False), IMAGE, GRID)
_add(
    "grid_sampler_3d", lambda x, g: torch.grid_sampler_3d(x, g, 0, 0, False), VOLUME, _random(-0.9, 0.9, 1, 2, 2, 2, 3)
)
_add("affine_grid", lambda x: F.affine_grid(x, [2, 3, 4, 4], align_corners=False), X[:, :2, :3])
_add("affine_grid_generator", lambda x: torch.affine_grid_generator(x, [2, 3, 4, 4], False), X[:, :2, :3])

# -- quantize: options that compute where others move

_add("pad", lambda x: F.pad(x, (1, 1), value=0.7), X)
_add("constant_pad_nd", lambda x: torch.constant_pad_nd(x, (1, 1), 0.7), X)
_add("masked_fill", lambda x: x.masked_fill(MASK, 0.7), X)
_add("index_fill", lambda x: x.index_fill(1, INDEX, 0.7), X)
_add("where", lambda x: torch.where(MASK, x, 0.7), X)
_add("scatter", lambda x, y: x.scatter(2, GATHER, y, reduce="add"), X, X2)
_add("scatter", lambda x: x.scatter(2, GATHER, 0.7), X)
_add("index_put", lambda x, y: x.index_put((INDEX.clamp(max=1),), y, True), X, X2)
_add("put", lambda x, y: torch.put(x, torch.tensor([1, 1]), y, True), X, VECTOR[:2])
_add("nan_to_num", lambda x: x.nan_to_num(0.5), X)
_add("max", lambda x, y: torch.max(x, y), X, X2)
_add("min", lambda x, y: torch.min(x, y), X, X2)
_add("pad_sequence", lambda x, y: nn.utils.rnn.pad_sequence([x[0], y[0, :2]], padding_value=0.7), X, X2)

# -- join

_add("cat", lambda x, y: torch.cat([x, y]), X, X2)
_add("stack", lambda x, y: torch.stack([x, y]), X, X2)
for _name in ("hstack", "vstack", "dstack", "column_stack"):
    _add(_name, lambda x, y, f=getattr(torch, _name): f([x, y]), MATRIX, MATRIX2)
_add("block_diag", torch.block_diag, MATRIX, MATRIX2)
_add("cartesian_prod", torch.cartesian_prod, VECTOR, VECTOR2)
_add("where", lambda x, y: torch.where(MASK, x, y), X, X2)
_add("where", lambda x, y: x.where(MASK, y), X, X2)
_add("copy", lambda x, y: x.clone().copy_(y), X, X2)
_add("put", lambda x, y: torch.put(x, torch.tensor([1, 2]), y), X, VECTOR[:2])
_add("scatter", lambda x, y: x.scatter(2, GATHER, y), X, X2)
_add("index_put", lambda x, y: x.index_put((torch.tensor([1, 0]),), y), X, X2)
_add("index_put", lambda x, y: torch.index_put(x, (torch.tensor([1]),), y[0]), X, X2)
_add("masked_scatter", lambda x, y: x.masked_scatter(MASK, y), X, X2)
_add("masked_fill", lambda x, y: x.masked_fill(MASK, y[0, 0, 0]), X, X2)
_add("index_copy", lambda x, y: x.index_copy(1, INDEX, y), X, X2[:, :2])
_add("slice_scatter", lambda x, y: x.slice_scatter(y, 1, 0, 1), X, X2[:, :1])
_add("select_scatter", lambda x, y: x.select_scatter(y, 1, 0), X, X2[:, 0])
_add("diagonal_scatter", lambda x, y: x.diagonal_scatter(y), MATRIX, VECTOR[:3])
_add("as_strided_scatter", lambda x, y: x.as_strided_scatter(y, (4,), (1,)), MATRIX, VECTOR)
_add("pad_sequence", lambda x, y: nn.utils.rnn.pad_sequence([x[0], y[0, :2]]), X, X2)
_add("flatten_dense_tensors", lambda x, y: torch._C._nn.flatten_dense_tensors([x, y]), X, X2)

# -- pass

_methods("contiguous clone detach ravel squeeze cpu half bfloat16 float double", X)
for _name in ("data", "T", "mT", "H", "mH", "real"):
    _add(_name, lambda x, name=_name: getattr(x, name), MATRIX)
_add("reversed", reversed, X)
_named("alias_copy detach_copy positive conj conj_physical resolve_conj resolve_neg", X)
_methods("requires_grad_", X)
_add("alias", torch.ops.aten.alias, X)
_add("slice", lambda x: torch.ops.aten.slice(x, 1, 0, 2), X)
_methods("flatten t adjoint fliplr flipud msort rot90 tril triu diag diagonal", MATRIX)
_named("combinations", VECTOR)
_methods("view reshape", X, -1)
_methods("unsqueeze unbind cummax cummin topk sort median nanmedian mode amax amin max min", X, 1)
_methods("kthvalue", X, 2)
_methods("aminmax unique unique_consecutive max min median nanmedian mode amax amin sort", X)
_methods("permute", X, 2, 0, 1)
_methods("transpose movedim", X, 0, 1)
_methods("unflatten", X, 2, (2, 2))
_methods("to type", X, torch.float64)
_methods("type_as view_as reshape_as expand_as", X, X2.clone())
_methods("expand broadcast_to", X[:, :1], (2, 3, 4))
_methods("repeat tile", X, (2, 1, 1))
_methods("repeat_interleave roll", X, 2)
_methods("flip", X, 0)
_methods("narrow narrow_copy", X, 1, 0, 2)
_methods("select", X, 1, 0)
_methods("index_select", X, 1, INDEX)
_methods("gather", X, 2, GATHER)
_methods("take_along_dim", X, GATHER, 2)
_methods("take", X, INDEX)
_methods("masked_select", X, MASK)
_add("getitem", lambda x: x[:, 1:], X)
_add("getitem", lambda x: x[MASK], X)
_add("getitem", lambda x: x[:, INDEX, None], X)
_methods("split unsafe_split chunk unsafe_chunk hsplit vsplit tensor_split dsplit", X[..., :2].repeat(2, 1, 1), 1)
_named("split_copy", X, options=(1,))
_methods("split_with_sizes unsafe_split_with_sizes", X, [1, 1])
_add("unflatten_dense_tensors", lambda x: torch._C._nn.unflatten_dense_tensors(x, [MATRIX]), _random(-1, 1, 12))
_add("imag", lambda x: torch.imag(torch.complex(x, x)), X)
_add("view_as_real", lambda x: torch.view_as_real(torch.complex(x, x)), X)
_add("view_as_real_copy", lambda x: torch.view_as_real_copy(torch.complex(x, x)), X)
_named("diag_embed atleast_1d atleast_2d atleast_3d", X)
_named("diagflat", VECTOR)
_add("_base", lambda x: x.view(-1)._base, X.clone())
_add("deepcopy", lambda x: x.__deepcopy__({}), X)
_add("as_strided", lambda x: x.as_strided((2, 2), (1, 2)), X)
_add("as_strided_copy", lambda x: torch.as_strided_copy(x, (2, 2), (1, 2)), X)
_add("broadcast_tensors", torch.broadcast_tensors, MATRIX, VECTOR)
_add("meshgrid", lambda x, y: torch.meshgrid(x, y, indexing="ij"), VECTOR, VECTOR2)
_add("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), IMAGE)
_add("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), IMAGE)
_add("channel_shuffle", lambda x: torch.channel_shuffle(x, 2), IMAGE)
_add("channel_shuffle", lambda x: torch.native_channel_shuffle(x, 2), IMAGE)
_add("unfold", lambda x: F.unfold(x, 3, padding=1), IMAGE)
_add("unfold", lambda x: x.unfold(1, 2, 1), X)
_add("fft_fftshift", torch.fft.fftshift, X)
_add("fft_ifftshift", torch.fft.ifftshift, X)
_named("diagonal_copy t_copy", MATRIX)
_named("expand_copy", X[:, :1], options=((2, 3, 4),))
_named("permute_copy", X, options=((2, 0, 1),))
_named("select_copy transpose_copy", X, options=(0, 1))
_named("slice_copy unbind_copy unsqueeze_copy squeeze_copy", X, options=(0,))
_named("split_with_sizes_copy", X, options=([1, 1],))
_named("view_copy", X, options=((-1,),))
_named("unfold_copy", X, options=(1, 2, 1))
_named("_reshape_alias_copy", X, options=((24,), (1,)))
_add("_pack_padded_sequence", lambda x: torch._VF._pack_padded_sequence(x, torch.tensor([3, 2]), True)[0], X)
_add("_pad_packed_sequence", lambda x: torch._VF._pad_packed_sequence(x, torch.tensor([2, 1]), True, 0.0, 2)[0], MATRIX)
for _dim, _tensor in ((1, X), (2, IMAGE), (3, VOLUME)):
    for _pool in ("max_pool", "adaptive_max_pool"):
        _name = f"{_pool}{_dim}d"
        _add(_name, lambda x, f=getattr(F, _name): f(x, 2), _tensor)
        _add(f"{_name}_with_indices", lambda x, f=getattr(F, f"{_name}_with_indices"): f(x, 2)[0], _tensor)
    _add(f"max_unpool{_dim}d", lambda x, f=getattr(F, f"max_unpool{_dim}d"), pool=getattr(F, f"max_pool{_dim}d"):
         f(*pool(x, 2, return_indices=True), 2), _tensor)  # fmt: skip
for _name, _tensor in (("fractional_max_pool2d", IMAGE), ("fractional_max_pool3d", VOLUME)):
    _add(_name, lambda x, f=getattr(F, _name): f(x, 2, output_size=2), _tensor)
    _add(f"{_name}_with_indices", lambda x, f=getattr(F, f"{_name}_with_indices"): f(x, 2, output_size=2)[0], _tensor)
_add("interpolate", lambda x: F.interpolate(x, scale_factor=2), IMAGE)
_add("interpolate", lambda x: F.interpolate(x, size=9, mode="nearest-exact"), IMAGE)
_add("grid_sample", lambda x, g: F.grid_sample(x, g, mode="nearest", align_corners=False), IMAGE, GRID)
_add("grid_sampler", lambda x, g: torch.grid_sampler(x, g, 1, 0, False), IMAGE, GRID)
for _exact in ("upsample_nearest", "_upsample_nearest_exact"):
    for _dim, _tensor in ((1, X), (2, IMAGE), (3, VOLUME)):
        _name = f"{_exact}{_dim}d"
        _add(_name, lambda x, f=getattr(torch._C._nn, _name), d=_dim: f(x, (8,) * d), _tensor)
for _name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"):
    _add(_name, lambda x, f=getattr(F, _name): f(x, 0.5, False), VOLUME if "3d" in _name else X)
_add("feature_dropout", lambda x: torch.feature_dropout(x, 0.5, False), X)
_add("native_dropout", lambda x: torch.native_dropout(x, 0.5, False)[0], X)
for _name in ("reflection_pad", "replication_pad"):
    for _dim, _tensor in ((1, X), (2, IMAGE), (3, VOLUME)):
        _pad = getattr(torch._C._nn, f"{_name}{_dim}d")
        _add(f"{_name}{_dim}d", lambda x, f=_pad, d=_dim: f(x, (1, 1) * d), _tensor)
_add("pad", lambda x: F.pad(x, (1, 1)), X)
_add("pad", lambda x: F.pad(x, (1, 1), mode="reflect"), X)
_add("pad", lambda x: F.pad(x, (1, 1), mode="circular"), X)
_add("constant_pad_nd", lambda x: torch.constant_pad_nd(x, (1, 1)), X)
_add("masked_fill", lambda x: x.masked_fill(MASK, 0.0), X)
_add("index_fill", lambda x: x.index_fill(1, INDEX, 0.0), X)
_add("fill_diagonal", lambda x: x.clone().fill_diagonal_(0.0), MATRIX)
_add("nan_to_num", lambda x: x.nan_to_num(), X)
_add("as_tensor", torch.as_tensor, X)
_add("asarray", torch.asarray, X)
_add("tensor", lambda x: x.new_tensor([1.0]) + torch.scalar_tensor(1.0) + torch.tensor([1.0]), X)

# -- create

_methods("new_zeros new_ones", X, 3)
_methods("new_full", X, (3,), 2.0)
_methods("new_tensor", X, [1.0, 2.0])
_named("zeros_like ones_like rand_like randn_like", X)
_add("full_like", lambda x: torch.full_like(x, 3.0), X)
_add("randint_like", lambda x: torch.randint_like(x, 5), X)
_add("zero", lambda x: x.clone().zero_(), X)
_add("fill", lambda x: x.clone().fill_(2.0), X)
for _name in ("uniform_", "normal_", "exponential_", "log_normal_", "cauchy_", "random_", "bernoulli_"):
    _kind = _name if _name in ("normal_", "bernoulli_") else _name[:-1]
    _add(_kind, lambda x, name=_name: getattr(x.clone(), name)(), X)
_add("geometric", lambda x: x.clone().geometric_(0.5), X)
for _name in ("zeros", "ones", "rand", "randn", "eye", "arange", "randperm", "bartlett_window",
              "blackman_window", "hamming_window", "hann_window", "kaiser_window"):  # fmt: skip
    _add(_name, lambda x, f=getattr(torch, _name): x[0, 0, 0] * 0 + f(3).float(), X)
_add("full", lambda x: torch.full((3,), 2.0), X)
_add("linspace", lambda x: torch.linspace(0, 1, 3), X)
_add("logspace", lambda x: torch.logspace(0, 1, 3), X)
_add("scalar_tensor", lambda x: torch.scalar_tensor(3.0), X)
_add("fft_fftfreq", lambda x: torch.fft.fftfreq(4), X)
_add("fft_rfftfreq", lambda x: torch.fft.rfftfreq(4), X)

NOT_SAMPLED = {
    "new_empty empty empty_like empty_strided empty_permuted new_empty_strided new": "holds whatever is in memory",
    "randint tril_indices triu_indices": "integers",
    "cuda xpu mtia ipu pin_memory share_memory": "needs a device or the operating system",
    "setitem set_property": "returns nothing",
    "multi_head_attention_forward": "decomposed; tested with the transformers of test_region.py",
    "constant dirac kaiming_normal kaiming_uniform orthogonal xavier_normal xavier_uniform": "calls the in-place fills",
    "_conj_copy _lazy_clone _make_dual_copy _fw_primal_copy slice_inverse": "called by torch itself only",
    "_autocast_to_full_precision _autocast_to_reduced_precision": "called by torch itself only",
    "iter range": "reaches no mode: iterating calls unbind",
}
"""Kinds that have a row but no sample, with the reason."""
