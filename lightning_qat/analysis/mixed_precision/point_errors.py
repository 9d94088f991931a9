"""What quantizing points does to the output: one at one type, and all together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lightning_qat.quantization.numerics.dtypes import QuantizedDtypeName
from lightning_qat.quantization.planning.plan import ScaleRole
from lightning_qat.quantization.reading.checks import AT_LEAST_ZERO, FINITE, one_of

INFINITE_ERROR = 1e100
"""Stands for an error that is no finite number: sums and differences of it are still numbers."""


def finite_error(error: float) -> float:
    """Return an error that is a number: ``INFINITE_ERROR`` for one that is not finite, NaN too."""
    return error if error < INFINITE_ERROR else INFINITE_ERROR


def error_text(error: float) -> str:
    """Return an error as sentences have it.

    Example:
        >>> error_text(0.012345), error_text(3 * INFINITE_ERROR)
        ('0.0123', 'infinite')
    """
    return f"{error:.3g}" if error < INFINITE_ERROR else "infinite"


@dataclass(frozen=True)
class PointError:
    """What quantizing one point at one type, alone, does to the chosen output.

    Args:
        point: name of the point.
        op_name: its op.
        op_type: canonical torch function.
        role: ``weight`` or ``activation``.
        dtype: the type.
        mse: mean squared error of the output.
        standard_error: of an estimate; 0 for a measured value, None if unknown.
        exact: measured, not estimated.
    """

    point: str
    op_name: str
    op_type: str
    role: ScaleRole
    dtype: Annotated[str, one_of(QuantizedDtypeName)]
    mse: Annotated[float, FINITE, AT_LEAST_ZERO]
    standard_error: float | None
    exact: bool


@dataclass(frozen=True)
class Check:
    """The prediction beside a measurement with all points at one type.

    Args:
        dtype: the type.
        predicted: sum of the errors of all points.
        measured: error with all of them together.
    """

    dtype: str
    predicted: float
    measured: float
