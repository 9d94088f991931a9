"""Floating-point operations of each op, from the shapes seen while tracing.

A multiplication and an addition count as two, as in ``torch.utils.flop_counter``. Beside matrix products, every op
counts one operation per element of its result; data movement counts none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.tracing.op_graph import Op, Operand

_CONVOLUTIONS = frozenset(["conv1d", "conv2d", "conv3d"])
_TRANSPOSED = frozenset(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])
_RECURRENT = frozenset(f"{kind}{cell}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell"))
_WITH_ADDEND = frozenset(["addmm", "addmv", "baddbmm", "addbmm"])
_CONTRACTIONS = frozenset(["tensordot", "outer", "inner", "dot", "chain_matmul"])


def op_flops(op: Op) -> int:
    """Count the operations of one op, for the batch it was traced with.

    Convolutions, matrix products, attention and recurrent layers are exact, biases and elementwise parts left out.
    ``einsum`` of more than two operands is counted from left to right, although torch may find a cheaper order;
    ``chain_matmul``
    is a rough estimate.

    Args:
        op: an op of a traced graph; all its calls in one forward are counted.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.tracing.tracer import trace
        >>> graph = trace(torch.nn.Linear(8, 4), [torch.ones(16, 8)])
        >>> op_flops(graph.ops[0]) == 2 * 16 * 8 * 4
        True
    """
    if op.role in ("pass", "create") or not op.outputs:
        return 0
    output = math.prod(op.outputs[0][1])
    return max(1, op.calls) * (_product_flops(op, output) if is_product(op) else output)


def is_product(op: Op) -> bool:
    """Whether an op multiplies and accumulates: a matrix product, a convolution, attention or a recurrent layer."""
    return op.gemm or op.kind in _RECURRENT or op.kind == "scaled_dot_product_attention"


def einsum_flops(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """Count the operations of an ``einsum`` whose operands are contracted from left to right.

    Args:
        equation: as given to ``torch.einsum``; the result may be left out, and ``...`` may occur.
        shapes: shapes of the operands.

    Example:
        >>> einsum_flops("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]) == 2 * 2 * 3 * 4 * 5
        True
    """
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = [_labels(term, len(shape)) for term, shape in zip(inputs.split(","), shapes, strict=True)]
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for label, size in zip(term, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))  # a broadcast dimension of size 1 fits any
    if "->" in equation:
        kept = {label for label in sizes if label in output or (len(label) > 1 and "..." in output)}
    else:
        kept = {label for label in sizes if sum(label in term for term in terms) == 1 or len(label) > 1}
    total, known = 0, set(terms[0])
    for index, term in enumerate(terms[1:], 1):
        product = known | set(term)
        total += 2 * math.prod(sizes[label] for label in product)
        known = product & (kept | {label for later in terms[index + 1 :] for label in later})
    return total or math.prod(sizes.values())


def _labels(term: str, dimensions: int) -> list[str]:
    """Return one label per dimension; those of ``...`` are numbered from the right, as they broadcast."""
    before, dots, after = term.partition("...")
    hidden = dimensions - len(before) - len(after) if dots else 0
    return [*before, *(f"...{hidden - i}" for i in range(hidden)), *after]


def _product_flops(op: Op, output: int) -> int:
    floats = [operand.shape for operand in op.operands if operand.is_float]
    weight = next((operand.shape for operand in op.operands if operand.role == "weight"), None)
    if op.kind in _CONVOLUTIONS and weight:
        return 2 * output * math.prod(weight[1:])
    if op.kind in _TRANSPOSED and weight:
        return 2 * math.prod(floats[0]) * math.prod(weight[1:])
    if op.kind == "scaled_dot_product_attention":
        query, key, value = floats[:3]
        return 2 * math.prod(query) * key[-2] + 2 * math.prod(query[:-1]) * key[-2] * value[-1]
    if op.kind in _RECURRENT:
        weights = [math.prod(o.shape) for o in op.operands if o.is_float and _is_recurrent_weight(o)]
        return 2 * sum(weights) * (output // op.outputs[0][1][-1])
    if op.kind in _WITH_ADDEND:
        return 2 * output * floats[1][-1] * (floats[1][0] if op.kind == "addbmm" else 1)
    if op.kind == "einsum" and "equation" in op.options:
        return einsum_flops(op.options["equation"], floats)
    if op.kind == "bilinear" and weight:
        return 2 * output * weight[1] * (weight[2] + 1)
    if op.kind in _CONTRACTIONS or op.kind == "einsum":
        return 2 * math.isqrt(math.prod(map(math.prod, floats[:2])) * output)
    contracted = weight[-1] if weight and op.kind == "linear" else floats[1 if op.kind == "rmatmul" else 0][-1]
    return 2 * output * contracted


def _is_recurrent_weight(operand: Operand) -> bool:
    return operand.role == "weight" or (len(operand.shape) == 2 and operand.sources[0].kind == "parameter")


def flops_shares(region: Region) -> dict[str, float]:
    """Map each op to the share of the region's operations that it and the ops it is fused with take."""
    flops = {op.name: op_flops(op) for op in region.graph.ops}
    total = sum(flops.values()) or 1
    shares = {name: count / total for name, count in flops.items()}
    for group in region.plan.fusions:
        together = sum(flops[name] for name in group.ops) / total
        shares |= dict.fromkeys(group.ops, together)
    return shares
