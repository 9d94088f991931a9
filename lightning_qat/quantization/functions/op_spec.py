"""One row of the function table: the role of a torch function and the facts about its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["quantize", "join", "pass", "create", "float", "composite"]
"""How planning treats an op.

``quantize``: operands and result are quantized. ``join``: brings several tensors together (``cat``); needs a quantizer
only where their scales differ. ``pass``: moves or selects values, which stay on the grid of the input. ``create``:
makes a tensor whose values do not depend on its inputs. ``float``: has no integer implementation here, or returns
nothing to quantize. ``composite``: is decomposed into the torch functions it is made of.
"""

NO_FLOAT_RESULT = "returns no floating-point tensor"
"""The reason of functions with nothing to quantize: indices, sizes, attributes."""

TRUE_OR_FALSE = "returns true or false, in place as 1 or 0"
"""The reason of comparisons; ``x.eq_(y)`` writes them into a floating-point tensor."""


@dataclass(frozen=True)
class OpSpec:
    """One row of the function table.

    Args:
        kind: the canonical name (``conv2d``, ``add``).
        role: see :data:`Role`.
        parameters: names of the positional parameters, as far as they are needed to tell operands apart. The tensors of
            a list or tuple ``hx`` are ``hx.0``, ``hx.1``.
        operands: which of ``parameters`` are quantized data; ``None`` means every floating-point tensor is.
        weights: the parameters that hold the weights of a GEMM, an embedding or a recurrent layer. In a list of
            parameters the matrices are weights and the vectors biases.
        weight_axis: channel axis of the weights.
        gemm: the op is a matrix product with a wide accumulator (conv, linear, matmul).
        reason: why a function of role ``float`` stays float; for other roles, what stays float inside the op.
    """

    kind: str
    role: Role
    parameters: tuple[str, ...] = ()
    operands: tuple[str, ...] | None = None
    weights: tuple[str, ...] = ()
    weight_axis: int | None = None
    gemm: bool = False
    reason: str = ""


def rows(role: Role, kinds: str, **fields: object) -> dict[str, OpSpec]:
    """Return one row for each of the kinds, which are separated by spaces.

    Example:
        >>> list(rows("pass", "view reshape"))
        ['view', 'reshape']
    """
    return {kind: OpSpec(kind, role, **fields) for kind in kinds.split()}  # type: ignore[arg-type]
