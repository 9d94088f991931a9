"""The operands that an op reads from outside its fused group."""

from __future__ import annotations

from collections.abc import Collection

from lightning_qat.quantization.tracing.op_graph import Op, Operand
from lightning_qat.quantization.tracing.tensor_origins import TensorOrigins

_WITH_ADDEND = frozenset(["addmm", "baddbmm", "addbmm", "addmv", "addr"])


def external_operands(op: Op, fused: Collection[str], origins: TensorOrigins) -> tuple[list[Operand], list[Operand]]:
    """Find the operands that could be quantized.

    Args:
        op: the reader.
        fused: names of the ops of its fused group, if it is in one.
        origins: finds where tensors were made.

    Returns:
        The inputs, and the weights (the constant operands of a GEMM).
    """
    inputs, weights = [], []
    for operand in op.operands:
        if operand.role == "weight" or (op.gemm and operand.role == "data" and origins.is_constant(operand)):
            if not origins.is_constant(operand):
                inputs.append(operand)  # a weight computed from data is an activation
            elif op.kind not in _WITH_ADDEND or operand.index != 0:  # a bias is kept in the accumulator's type
                weights.append(operand)
        elif operand.role == "data" and not (op.role == "join" and operand.written):
            inside = all(s.kind == "op" and s.name in fused for s in operand.sources)
            inputs += [] if inside else [operand]
    return inputs, weights
