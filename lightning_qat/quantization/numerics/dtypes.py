"""The quantized integer types by name: their width, sign and range."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from lightning_qat.quantization.errors import ConfigurationError, unknown_choice

# fmt: off
QuantizedDtypeName = Literal[
    "int2", "int3", "int4", "int5", "int6", "int7", "int8", "int9",
    "int10", "int11", "int12", "int13", "int14", "int15", "int16",
    "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "uint8", "uint9",
    "uint10", "uint11", "uint12", "uint13", "uint14", "uint15", "uint16",
]
# fmt: on
DtypeName = Literal[QuantizedDtypeName, "float32"]
ONNX_TYPES = ("int8", "uint8", "int16", "uint16", "int4", "uint4")
"""Quantized types of ONNX, opset 21."""


@dataclass(frozen=True)
class QuantDtype:
    """An integer type of 2 to 16 bits.

    All its codes are exact in float32, in which the fake-quantization is computed.

    Args:
        name: ``int2`` ... ``int16`` or ``uint2`` ... ``uint16``.
        bits: Number of bits.
        signed: Whether the codes are in two's complement.

    Example:
        >>> QuantDtype("int8", bits=8, signed=True).quant_min
        -128
    """

    name: str
    bits: int
    signed: bool

    @property
    def quant_min(self) -> int:
        """The smallest code of the full range (int8: -128)."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def quant_max(self) -> int:
        """The largest code of the full range (int8: 127)."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


def is_float(name: str) -> bool:
    """Tell whether ``name`` is ``float32``, the type of a tensor that is not quantized.

    Example:
        >>> is_float("float32"), is_float("int8")
        (True, False)
    """
    return name == "float32"


@cache
def quant_dtype(name: str) -> QuantDtype:
    """Look up a quantized type by its name.

    Args:
        name: ``int2`` ... ``int16`` or ``uint2`` ... ``uint16``.

    Raises:
        ConfigurationError: If there is no such type, or it is ``float32``, which means "not quantized".

    Example:
        >>> quant_dtype("uint4")
        QuantDtype(name='uint4', bits=4, signed=False)
    """
    if is_float(name):
        raise ConfigurationError(
            "float32 is not a quantized type: it means that the tensor is left as it is and has no scale. "
            "Write an integer type here, such as 'int8' or 'int16'."
        )
    if name not in get_args(QuantizedDtypeName):
        raise unknown_choice("dtype", name, get_args(DtypeName))
    signed = not name.startswith("u")
    return QuantDtype(name=name, bits=int(name.removeprefix("u").removeprefix("int")), signed=signed)
