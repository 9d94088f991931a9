"""The function table: one row per torch function says whether it is quantized, moves, creates, or stays float.

* Rows of functions that are quantized, move data or create tensors are here. Rows of functions that stay float are in
  ``float_functions.py``, each with its reason.
* To make a function stay float (``silu``), move its name from its row here to a row with a reason there. To do so in
  one model only, write an override: ``{op_type: silu, activation: {dtype: float32}}``.
* A new torch function gets a row here or there; the tests say which is missing.
* One row covers every form of a function; ``canonical_kinds.py`` gives all forms one name (the kind).
  ``function_lookup.py`` finds the row of a called function and refines it by the options of the call.
  ``torch_functions.md`` shows the whole table; ``make tables`` writes it.
"""

from __future__ import annotations

from lightning_qat.quantization.functions.float_functions import FLOAT_FUNCTIONS
from lightning_qat.quantization.functions.op_spec import OpSpec, rows

# -- matrix products: a wide accumulator, and weights where an operand is a parameter

_CONV = ("input", "weight", "bias")
_PRODUCTS: dict[str, OpSpec] = {
    **rows(
        "quantize",
        "conv1d conv2d conv3d convolution linear",
        gemm=True,
        parameters=_CONV,
        operands=("input",),
        weights=("weight",),
        weight_axis=0,
    ),
    **rows(
        "quantize",
        "conv_transpose1d conv_transpose2d conv_transpose3d",
        gemm=True,
        parameters=_CONV,
        operands=("input",),
        weights=("weight",),
        weight_axis=1,
    ),
    **rows(
        "quantize",
        "conv_tbc",
        gemm=True,
        parameters=_CONV,
        operands=("input",),
        weights=("weight",),
        weight_axis=2,
    ),
    **rows(
        "quantize",
        "bilinear",
        gemm=True,
        parameters=("input1", "input2", "weight", "bias"),
        operands=("input1", "input2"),
        weights=("weight",),
        weight_axis=0,
    ),
    **rows("quantize", "matmul rmatmul bmm mv dot vdot vecdot inner outer einsum tensordot chain_matmul", gemm=True),
    **rows("quantize", "addmm baddbmm addbmm addmv addr", gemm=True),
    **rows("quantize", "embedding", parameters=("input", "weight"), operands=("input",), weights=("weight",)),
    **rows(
        "quantize",
        "embedding_bag",
        parameters=("input", "weight"),
        operands=("input", "per_sample_weights"),
        weights=("weight",),
    ),
}

# -- recurrent layers: one call for all steps, quantized at its boundary. On a GPU, cuDNN then copies the fake-quantized
#    weights into one block at every call, which torch warns of.

_GATES = "gates and cell state inside the fused call stay float; final states are quantized where they are read"
_CELL = "gates inside the fused call and the cell state stay float"
_CELL_PARAMETERS = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
_RECURRENT: dict[str, OpSpec] = {
    **rows(
        "quantize",
        "lstm gru rnn_tanh rnn_relu",
        parameters=("input", "hx", "params"),
        operands=("input", "hx", "hx.0"),  # hx.1 is the cell state of an LSTM: an accumulator
        weights=("params",),
        weight_axis=0,
        reason=_GATES,
    ),
    **rows(
        "quantize",
        "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
        parameters=_CELL_PARAMETERS,
        operands=("input", "hx", "hx.0"),
        weights=("w_ih", "w_hh"),
        weight_axis=0,
        reason=_CELL,
    ),
}

# -- elementwise: integer arithmetic of two tensors, a look-up table for one

_FIRST = {"parameters": ("input",), "operands": ("input",)}
_ELEMENTWISE: dict[str, OpSpec] = {
    **rows("quantize", "add sub rsub mul div rdiv addcmul addcdiv lerp maximum minimum fmax fmin"),
    **rows("quantize", "pow rpow float_power atan2 hypot copysign ldexp logaddexp logaddexp2 xlogy xlog1py cross kron"),
    **rows("quantize", "clamp clamp_min clamp_max"),  # the bounds may be tensors
    **rows("quantize", "abs neg square sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p logit", **_FIRST),
    **rows("quantize", "sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh sinc deg2rad rad2deg", **_FIRST),
    **rows("quantize", "erf erfc ndtr log_ndtr entr", **_FIRST),
    **rows("quantize", "relu relu6 hardtanh leaky_relu rrelu elu selu celu gelu silu mish sigmoid", **_FIRST),
    **rows("quantize", "hardsigmoid hardswish hardshrink softshrink softplus logsigmoid softsign tanhshrink", **_FIRST),
    **rows("quantize", "threshold glu", **_FIRST),
    **rows("quantize", "prelu", parameters=("input", "weight"), operands=("input",)),
    **rows("quantize", "softmax log_softmax softmin", **_FIRST),
    **rows("quantize", "gumbel_softmax", parameters=("logits",), operands=("logits",)),
}

# -- normalization, pooling, reductions, distances, sampling

_NORM = ("input", "running_mean", "running_var", "weight", "bias")
_REDUCTIONS: dict[str, OpSpec] = {
    **rows("quantize", "batch_norm instance_norm", parameters=_NORM, operands=("input",)),
    **rows("quantize", "layer_norm group_norm rms_norm normalize local_response_norm renorm", **_FIRST),
    **rows("quantize", "native_batch_norm _native_batch_norm_legit native_layer_norm native_group_norm", **_FIRST),
    **rows("quantize", "_fused_rms_norm", **_FIRST),
    **rows("quantize", "avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d lp_pool3d", **_FIRST),
    **rows("quantize", "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d", **_FIRST),
    **rows("quantize", "mean nanmean sum nansum sum_to_size prod cumsum cumprod std var trace diff", **_FIRST),
    **rows(
        "quantize", "std_mean var_mean", **_FIRST, reason="the mean, its second result, is quantized where it is read"
    ),
    **rows("quantize", "norm norm_except_dim logsumexp logcumsumexp quantile nanquantile segment_reduce", **_FIRST),
    **rows("quantize", "trapezoid cumulative_trapezoid"),
    **rows("quantize", "dist cdist pdist pairwise_distance cosine_similarity"),
    **rows("quantize", "index_add scatter_add scatter_reduce index_reduce"),
    **rows("quantize", "fold interpolate", **_FIRST),
    **rows("quantize", "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d", **_FIRST),
    **rows("quantize", "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa", **_FIRST),
    **rows(
        "quantize",
        "grid_sample grid_sampler grid_sampler_2d grid_sampler_3d",
        parameters=("input", "grid"),
        operands=("input", "grid"),
    ),
    **rows("quantize", "affine_grid affine_grid_generator", parameters=("theta",), operands=("theta",)),
    **rows(
        "quantize",
        "scaled_dot_product_attention",
        parameters=("query", "key", "value", "attn_mask"),
        operands=("query", "key", "value"),
        reason="scores and softmax inside the fused call stay float",
    ),
    **rows("composite", "multi_head_attention_forward"),
}

# -- several tensors in one: a quantizer only where their scales differ

_JOINS: dict[str, OpSpec] = {
    **rows("join", "cat stack hstack vstack dstack column_stack block_diag cartesian_prod pad_sequence"),
    **rows("join", "where copy put scatter index_put masked_scatter index_copy slice_scatter select_scatter"),
    **rows("join", "diagonal_scatter as_strided_scatter flatten_dense_tensors"),
}

# -- data movement: the values stay on the grid they are on

_MOVES: dict[str, OpSpec] = {
    **rows("pass", "view reshape permute transpose t adjoint flatten unflatten ravel unsqueeze squeeze contiguous"),
    **rows(
        "pass", "clone deepcopy detach alias slice to float double half bfloat16 type type_as cuda cpu xpu mtia ipu"
    ),
    **rows(
        "pass", "expand expand_as broadcast_to repeat repeat_interleave tile roll flip fliplr flipud rot90 reversed"
    ),
    **rows("pass", "narrow select getitem index_select gather take take_along_dim masked_select diagonal diag"),
    **rows("pass", "diag_embed diagflat combinations movedim as_strided view_as reshape_as slice_inverse"),
    **rows("pass", "split split_with_sizes tensor_split chunk unbind iter hsplit vsplit dsplit"),
    **rows("pass", "unsafe_chunk unsafe_split unsafe_split_with_sizes unflatten_dense_tensors"),
    **rows("pass", "T mT H mH data real imag view_as_real resolve_conj resolve_neg conj conj_physical positive _base"),
    **rows(
        "pass", "broadcast_tensors meshgrid atleast_1d atleast_2d atleast_3d requires_grad_ share_memory pin_memory"
    ),
    **rows("pass", "pixel_shuffle pixel_unshuffle channel_shuffle unfold tril triu fft_fftshift fft_ifftshift"),
    **rows("pass", "alias_copy as_strided_copy detach_copy diagonal_copy expand_copy narrow_copy permute_copy"),
    **rows("pass", "select_copy slice_copy split_copy split_with_sizes_copy squeeze_copy t_copy transpose_copy"),
    **rows("pass", "unbind_copy unfold_copy unsqueeze_copy view_copy view_as_real_copy _reshape_alias_copy"),
    **rows("pass", "_fw_primal_copy _make_dual_copy _conj_copy _lazy_clone _autocast_to_full_precision"),
    **rows("pass", "_autocast_to_reduced_precision _pack_padded_sequence"),
    # Selection by value: every result is one of the inputs
    **rows("pass", "amax amin aminmax cummax cummin topk sort msort kthvalue median nanmedian mode"),
    **rows("pass", "unique unique_consecutive max_unpool1d max_unpool2d max_unpool3d"),
    **rows("pass", "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    **rows("pass", "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices"),
    **rows("pass", "adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices"),
    **rows("pass", "adaptive_max_pool3d_with_indices fractional_max_pool2d fractional_max_pool3d"),
    **rows("pass", "fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices"),
    **rows("pass", "upsample_nearest1d upsample_nearest2d upsample_nearest3d"),
    **rows("pass", "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d"),
    **rows("pass", "reflection_pad1d reflection_pad2d reflection_pad3d"),
    **rows("pass", "replication_pad1d replication_pad2d replication_pad3d"),
    # Dropout is nothing in inference; what it scales in training is noise on purpose
    **rows("pass", "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout"),
    **rows("pass", "native_dropout"),
    # Written in place: quantized where the tensor is read
    **rows("pass", "setitem set_property"),
}

# -- data movement that fills with a value, or selects; some options make it a computation (see specialise)

_SOMETIMES: dict[str, OpSpec] = {
    **rows("pass", "pad constant_pad_nd masked_fill index_fill fill_diagonal nan_to_num _pad_packed_sequence max min"),
}

# -- tensors made of nothing

_CREATE: dict[str, OpSpec] = {
    **rows("create", "zeros ones empty full arange range linspace logspace eye tensor scalar_tensor as_tensor asarray"),
    **rows("create", "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones"),
    **rows("create", "new_empty new_empty_strided new_full new_tensor new empty_strided empty_permuted"),
    **rows("create", "rand randn randint randperm tril_indices triu_indices fft_fftfreq fft_rfftfreq"),
    **rows("create", "bartlett_window blackman_window hamming_window hann_window kaiser_window"),
    **rows("create", "zero fill uniform normal_ bernoulli_ exponential log_normal cauchy geometric random"),
    **rows("create", "constant dirac kaiming_normal kaiming_uniform orthogonal xavier_normal xavier_uniform"),
}

TABLE: dict[str, OpSpec] = {
    **FLOAT_FUNCTIONS,
    **_PRODUCTS,
    **_RECURRENT,
    **_ELEMENTWISE,
    **_REDUCTIONS,
    **_JOINS,
    **_MOVES,
    **_SOMETIMES,
    **_CREATE,
}

FLOAT_INSIDE = frozenset([*_RECURRENT, "scaled_dot_product_attention"])
"""Kinds that compute in float between quantized operands and a quantized result."""

SOMETIMES_QUANTIZED = frozenset(_SOMETIMES)
"""Kinds of data movement that some options turn into a computation, so that they are identified at run time."""
