"""Which torch function is what: quantized, passed through, or left in float because of a reason.

The table is keyed by the *canonical kind* of a function, so that one row covers every spelling of it: ``x + y``,
``torch.add``, ``Tensor.add_``, ``x += y`` and ``1 + x`` are all ``add``. Functions without a row run in float, and the
plan says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Role = Literal["quantize", "join", "pass", "create", "float", "composite"]
"""What planning does with an op.

``quantize``: operands and result are quantized. ``join``: brings several tensors together (``cat``); needs a quantizer
only where their scales differ. ``pass``: moves or selects values, which stay on the grid of the input. ``create``:
makes a tensor whose values do not depend on its inputs. ``float``: has no integer implementation here. ``composite``:
is decomposed into the torch functions it is made of.
"""


@dataclass(frozen=True)
class OpSpec:
    """One row of the table.

    Args:
        kind: the canonical name (``conv2d``, ``add``).
        role: see :data:`Role`.
        parameters: names of the positional parameters, as far as they are needed to tell operands apart.
        operands: which of ``parameters`` are quantized data; ``None`` means every floating-point tensor is.
        weight: the parameter that holds the weight of a GEMM or an embedding.
        weight_axis: channel axis of that weight.
        gemm: the op is a matrix product with a wide accumulator (conv, linear, matmul).
        reason: for ``float``: why.
    """

    kind: str
    role: Role
    parameters: tuple[str, ...] = ()
    operands: tuple[str, ...] | None = None
    weight: str | None = None
    weight_axis: int | None = None
    gemm: bool = False
    reason: str = ""


def canonical_kind(func: Callable[..., Any]) -> str:
    """Return the name all spellings of a torch function share.

    Example:
        >>> import torch
        >>> [canonical_kind(f) for f in (torch.add, torch.Tensor.add_, torch.Tensor.__radd__, torch.Tensor.__iadd__)]
        ['add', 'add', 'add', 'add']
        >>> canonical_kind(torch.Tensor.mT.__get__)
        'mT'
    """
    name = getattr(func, "__name__", None) or type(func).__name__
    if name == "__get__":  # a property such as Tensor.mT: the descriptor knows its name
        return str(getattr(getattr(func, "__self__", None), "__name__", "property"))
    if name == "__set__":
        return "set_property"
    if name.startswith("__") and name.endswith("__"):
        bare = name[2:-2]
        for prefix in ("r", "i"):
            if bare.startswith(prefix) and bare[1:] in _OPERATORS:
                reflected = prefix == "r" and bare[1:] in _NOT_COMMUTATIVE
                return ("r" if reflected else "") + _OPERATORS[bare[1:]]
        return _OPERATORS.get(bare, bare)
    bare = name[:-1] if name.endswith("_") else name
    bare = bare.removeprefix("_") if bare in ("_softmax", "_log_softmax") else bare
    return _ALIASES.get(bare, bare)


def spec_of(func: Callable[..., Any]) -> OpSpec:
    """Return the row of ``func``; functions without one get role ``float`` and a reason that says so."""
    kind = canonical_kind(func)
    spec = _TABLE.get(kind)
    if spec is not None:
        return spec
    return OpSpec(kind, "float", reason=f"{kind} has no quantized form here")


def specialise(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
    """Refine a row by the values of a call: what an op does to the grid can depend on its options.

    Only rows that :func:`is_interceptable` can become ops with quantizers; the others are not identified at run time.
    """
    if spec.kind == "interpolate" and _argument(args, kwargs, 3, "mode", "nearest") in ("nearest", "nearest-exact"):
        return OpSpec(spec.kind, "pass")
    if spec.kind == "grid_sample" and _argument(args, kwargs, 2, "mode", "bilinear") == "nearest":
        return OpSpec(spec.kind, "pass")
    if spec.kind == "pad" and _is_plain_fill(_argument(args, kwargs, 3, "value", 0)):
        return OpSpec(spec.kind, "quantize")
    if spec.kind in ("max", "min") and isinstance(_argument(args, kwargs, 1, "other", None), Tensor):
        return OpSpec(f"{spec.kind}imum", "quantize")
    if spec.kind == "where" and any(_is_plain_fill(_argument(args, kwargs, i, n, 0)) for i, n in _WHERE_VALUES):
        return OpSpec(spec.kind, "quantize")
    if spec.kind in ("masked_fill", "index_fill"):
        value = _argument(args, kwargs, 2 if spec.kind == "masked_fill" else 3, "value", None)
        if _is_plain_fill(value):
            return OpSpec(spec.kind, "quantize")
    return spec


MASK_FILL = -1e4
"""Fills at or below this value (``-1e4``, ``-1e9``, ``finfo.min``, ``-inf``) mean "never attend here"."""


def is_mask_fill(value: object) -> bool:
    """Whether a scalar is the fill of an additive mask rather than data."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value <= MASK_FILL


def is_interceptable(spec: OpSpec) -> bool:
    """Whether the op can carry quantizers, so that interception has to identify it at run time."""
    return spec.role in ("quantize", "join", "composite") or spec.kind in _SOMETIMES_QUANTIZED


def _is_plain_fill(value: object) -> bool:
    """Whether a scalar is neither zero, which every grid holds, nor the fill of a mask."""
    return isinstance(value, (int, float)) and value != 0 and not is_mask_fill(value)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    if name in kwargs:
        return kwargs[name]
    return args[position] if len(args) > position else default


_OPERATORS = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "div": "div",
    "truediv": "div",
    "matmul": "matmul",
    "pow": "pow",
    "mod": "remainder",
    "floordiv": "floor_divide",
    "neg": "neg",
    "abs": "abs",
    "getitem": "getitem",
    "setitem": "setitem",
}
_NOT_COMMUTATIVE = {"sub", "div", "truediv", "matmul", "pow", "mod", "floordiv"}
_ALIASES = {
    "subtract": "sub",
    "rsub": "rsub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "absolute": "abs",
    "concat": "cat",
    "concatenate": "cat",
    "mm": "matmul",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "clip": "clamp",
    "upsample": "interpolate",
    "upsample_nearest": "interpolate",
    "upsample_bilinear": "interpolate",
    "special_expit": "sigmoid",
}


def _rows(role: Role, kinds: str, **fields: Any) -> dict[str, OpSpec]:
    return {kind: OpSpec(kind, role, **fields) for kind in kinds.split()}


_GEMM = {"gemm": True, "parameters": ("input", "weight", "bias"), "operands": ("input",), "weight": "weight"}
_FIRST = {"parameters": ("input",), "operands": ("input",)}
_TABLE: dict[str, OpSpec] = {
    **_rows("quantize", "conv1d conv2d conv3d linear", **_GEMM, weight_axis=0),
    **_rows("quantize", "conv_transpose1d conv_transpose2d conv_transpose3d", **_GEMM, weight_axis=1),
    **_rows("quantize", "matmul rmatmul bmm mv dot inner outer einsum tensordot chain_matmul", gemm=True),
    **_rows("quantize", "addmm baddbmm addbmm addmv", gemm=True),
    **_rows("quantize", "embedding", parameters=("input", "weight"), operands=("input",), weight="weight"),
    **_rows("quantize", "add sub rsub mul div rdiv addcmul addcdiv lerp maximum minimum"),
    **_rows("quantize", "relu relu6 hardtanh leaky_relu rrelu elu selu celu gelu silu mish sigmoid tanh", **_FIRST),
    **_rows("quantize", "hardsigmoid hardswish softplus logsigmoid softsign tanhshrink threshold glu prelu", **_FIRST),
    **_rows("quantize", "softmax log_softmax softmin", **_FIRST),
    **_rows("quantize", "batch_norm layer_norm group_norm instance_norm rms_norm normalize", **_FIRST),
    **_rows("quantize", "avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d", **_FIRST),
    **_rows("quantize", "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d", **_FIRST),
    **_rows("quantize", "mean sum cumsum interpolate", **_FIRST),
    **_rows("quantize", "grid_sample", parameters=("input", "grid"), operands=("input", "grid")),
    **_rows("quantize", "exp log sqrt rsqrt pow rpow square reciprocal sin cos abs neg clamp"),
    **_rows(
        "quantize",
        "scaled_dot_product_attention",
        parameters=("query", "key", "value", "attn_mask"),
        operands=("query", "key", "value"),
    ),
    **_rows("composite", "multi_head_attention_forward"),
    **_rows("join", "cat stack hstack vstack dstack column_stack where copy"),
    **_rows("join", "scatter index_put masked_scatter index_copy slice_scatter select_scatter diagonal_scatter"),
    **_rows("quantize", "index_add scatter_add"),
    # Data movement: the values stay on the grid they are on.
    **_rows("pass", "view reshape permute transpose t adjoint flatten unflatten ravel unsqueeze squeeze contiguous"),
    **_rows("pass", "clone detach to float double half bfloat16 type type_as cuda cpu expand expand_as broadcast_to"),
    **_rows("pass", "repeat repeat_interleave tile roll flip fliplr flipud rot90 narrow select getitem index_select"),
    **_rows("pass", "gather take take_along_dim masked_select diagonal diag movedim as_strided view_as reshape_as"),
    **_rows(
        "pass", "split split_with_sizes tensor_split chunk unbind unsafe_chunk unsafe_split hsplit vsplit __iter__"
    ),
    **_rows("pass", "iter T mT H mH data real broadcast_tensors meshgrid atleast_1d atleast_2d atleast_3d"),
    **_rows("pass", "pad pixel_shuffle pixel_unshuffle channel_shuffle unfold masked_fill index_fill tril triu"),
    **_rows("pass", "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    **_rows("pass", "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices amax amin max min"),
    **_rows("pass", "topk sort kthvalue median dropout dropout1d dropout2d dropout3d alpha_dropout"),
    **_rows("pass", "feature_dropout feature_alpha_dropout requires_grad retain_grad alias view_as_real"),
    **_rows("pass", "setitem set_property"),
    **_rows("create", "zeros_like ones_like empty_like full_like rand_like randn_like randint_like"),
    **_rows("create", "new_zeros new_ones new_empty new_full new_tensor zeros ones empty full arange linspace eye"),
    **_rows("create", "rand randn tensor scalar_tensor as_tensor bernoulli uniform normal fill zero"),
    **_rows(
        "float",
        "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
        reason="the recurrent layer runs as one fused call whose steps cannot be quantized from outside",
    ),
    **_rows("float", "erf erfc floor ceil round trunc frac sign", reason="elementwise function without an int kernel"),
}
_SOMETIMES_QUANTIZED = {"pad", "masked_fill", "index_fill", "max", "min"}
_WHERE_VALUES = ((1, "input"), (2, "other"))

PARALLEL = frozenset(["broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d"])
"""Data movement whose n-th result is made of the n-th tensor only."""

STATISTICS = frozenset(["batch_norm", "instance_norm"])
"""Ops that write running statistics into buffers; these are parameters of the op, not data."""
