"""Look up how a torch function is treated: quantized, moved, or left in float for a reason.

The rows are in ``function_table.py`` and ``float_functions.py``. This module finds the row of a function and refines it
by the options of a call. ``torch_functions.md`` shows the whole table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_qat.quantization.functions.canonical_kinds import canonical_kind
from lightning_qat.quantization.functions.function_table import SOMETIMES_QUANTIZED, TABLE
from lightning_qat.quantization.functions.mask_values import is_mask_fill
from lightning_qat.quantization.functions.op_spec import OpSpec


def spec_of(func: Callable[..., Any]) -> OpSpec:
    """Return the row of a function. A function without a row gets role ``float`` and a reason that says so.

    Example:
        >>> import torch
        >>> spec_of(torch.add).role, spec_of(torch.floor).role
        ('quantize', 'float')
        >>> spec_of(torch.floor).reason
        'jumps: an input error of one step can move the result by a whole unit'
    """
    kind = canonical_kind(func)
    spec = TABLE.get(kind)
    if spec is not None:
        return spec
    if kind.startswith("_"):
        return OpSpec(kind, "float", reason=f"{kind} is a private function of torch")
    return OpSpec(kind, "float", reason=f"{kind} is unknown to this release")


def known_kinds() -> frozenset[str]:
    """Return all canonical kinds that have a row."""
    return frozenset(TABLE)


def is_interceptable(spec: OpSpec) -> bool:
    """Whether the op can carry quantizers, so that interception has to identify it at run time."""
    return spec.role in ("quantize", "join", "composite") or spec.kind in SOMETIMES_QUANTIZED


def specialise(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
    """Refine a row by the arguments of a call: the role of an op can depend on its options.

    Only a row for which :func:`is_interceptable` is true can become an op with quantizers; other ops are not identified
    at run time.
    """
    refine = _OPTIONS.get(spec.kind)
    return spec if refine is None else refine(spec, args, kwargs)


PARALLEL = frozenset(["broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d"])
"""Data movement whose n-th result depends on the n-th tensor only."""

RANDOM = frozenset(
    name
    for names in (
        "rand randn rand_like randn_like uniform normal_ bernoulli_ exponential log_normal cauchy geometric random",
        "normal bernoulli binomial poisson",
    )
    for name in names.split()
)
"""Ops that draw random numbers."""

STATISTICS = frozenset(["batch_norm", "instance_norm", "native_batch_norm", "_native_batch_norm_legit"])
"""Ops that write running statistics into buffers; these are parameters of the op, not data."""


_Refinement = Callable[[OpSpec, tuple[Any, ...], dict[str, Any]], OpSpec]


def _fills(position: int, name: str) -> _Refinement:
    """Data movement with a fill: zero is on every grid, a mask value is on none, any other value needs a quantizer."""

    def refine(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
        value = _argument(args, kwargs, position, name, 0)
        if isinstance(value, Tensor) and value.is_floating_point() and not _is_constant_fill(value):
            return OpSpec(spec.kind, "join")
        return OpSpec(spec.kind, "quantize") if _is_plain_fill(value) else spec

    return refine


def _sums_if(position: int, name: str, sums: Callable[[Any], bool]) -> _Refinement:
    """Writing values next to others is a join; adding or multiplying them is arithmetic."""

    def refine(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
        return OpSpec(spec.kind, "quantize") if sums(_argument(args, kwargs, position, name, None)) else spec

    return refine


def _passes_if(position: int, name: str, default: Any, values: tuple[Any, ...]) -> _Refinement:
    """Resampling by the nearest neighbour picks values."""

    def refine(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
        return OpSpec(spec.kind, "pass") if _argument(args, kwargs, position, name, default) in values else spec

    return refine


def _where(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
    values = [_argument(args, kwargs, i, name, 0) for i, name in ((0, "input"), (1, "input"), (2, "other"))]
    return OpSpec(spec.kind, "quantize") if any(map(_is_plain_fill, values)) else spec


def _scatter(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
    value = _argument(args, kwargs, 3, "value", kwargs.get("src", 0))
    sums = _argument(args, kwargs, 4, "reduce", None) is not None
    return OpSpec(spec.kind, "quantize") if sums or _is_plain_fill(value) else spec


def _binary_extremum(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
    binary = isinstance(_argument(args, kwargs, 1, "other", None), Tensor)
    return OpSpec(f"{spec.kind}imum", "quantize") if binary else spec


def _nan_to_num(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
    values = [_argument(args, kwargs, i, name, None) for i, name in ((1, "nan"), (2, "posinf"), (3, "neginf"))]
    return OpSpec(spec.kind, "quantize") if any(map(_is_plain_fill, values)) else spec


def _rounded_division(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
    if kwargs.get("rounding_mode") is None:
        return spec
    return OpSpec(spec.kind, "float", reason=TABLE["floor_divide"].reason)


def _table_first(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
    """``torch.embedding(weight, indices)`` has the order of ``F.embedding(indices, weight)`` reversed."""
    if not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
        return spec
    reversed_order = tuple(reversed(spec.parameters))
    return OpSpec(spec.kind, spec.role, reversed_order, spec.operands, spec.weights)


def _convolution(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
    if not _argument(args, kwargs, 6, "transposed", False):
        return spec
    return OpSpec(spec.kind, spec.role, spec.parameters, spec.operands, spec.weights, 1, spec.gemm)


def _packed(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
    """Packed sequences have their batch sizes as the second argument."""
    if len(args) < 4 or not isinstance(args[3], (list, tuple)):
        return spec
    parameters = ("input", "batch_sizes", "hx", "params")
    return OpSpec(spec.kind, spec.role, parameters, spec.operands, spec.weights, spec.weight_axis, reason=spec.reason)


def _of_tensor(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
    """``torch.as_tensor(x)`` of a tensor is that tensor."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    return OpSpec(spec.kind, "pass") if isinstance(first, Tensor) else spec


def _reads_a_tensor(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSpec:
    """``x.fill_(y)`` and ``x.new_tensor(y)`` copy the value of a tensor."""
    if not any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values())):
        return spec
    return OpSpec(spec.kind, "float", reason="takes its value from a tensor")


def _is_plain_fill(value: object) -> bool:
    """Whether a scalar is neither zero, which every grid holds, nor the fill of a mask."""
    return isinstance(value, (int, float)) and value != 0 and not is_mask_fill(value)


def _is_constant_fill(value: Tensor) -> bool:
    """Whether a tensor is one number that is zero or the fill of a mask."""
    if value.numel() != 1 or value.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    number = float(value.detach())
    return number == 0 or is_mask_fill(number)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    if name in kwargs:
        return kwargs[name]
    return args[position] if len(args) > position else default


_OPTIONS: dict[str, _Refinement] = {
    "pad": _fills(3, "value"),
    "constant_pad_nd": _fills(2, "value"),
    "masked_fill": _fills(2, "value"),
    "index_fill": _fills(3, "value"),
    "fill_diagonal": _fills(1, "fill_value"),
    "_pad_packed_sequence": _fills(3, "padding_value"),
    "pad_sequence": _sums_if(2, "padding_value", _is_plain_fill),
    "put": _sums_if(3, "accumulate", bool),
    "index_put": _sums_if(3, "accumulate", bool),
    "scatter": _scatter,
    "where": _where,
    "max": _binary_extremum,
    "min": _binary_extremum,
    "nan_to_num": _nan_to_num,
    "div": _rounded_division,
    "interpolate": _passes_if(3, "mode", "nearest", ("nearest", "nearest-exact")),
    "grid_sample": _passes_if(2, "mode", "bilinear", ("nearest",)),
    "grid_sampler": _passes_if(2, "interpolation_mode", 0, (1,)),
    "grid_sampler_2d": _passes_if(2, "interpolation_mode", 0, (1,)),
    "grid_sampler_3d": _passes_if(2, "interpolation_mode", 0, (1,)),
    "embedding": _table_first,
    "embedding_bag": _table_first,
    "convolution": _convolution,
    "lstm": _packed,
    "gru": _packed,
    "rnn_tanh": _packed,
    "rnn_relu": _packed,
    "tensor": _of_tensor,
    "as_tensor": _of_tensor,
    "asarray": _of_tensor,
    "fill": _reads_a_tensor,
    "new_tensor": _reads_a_tensor,
}
