"""What is read of the tables and the plan of a run: the fields that a comparison uses, and which values they may have.

The files hold more, and files of other versions hold other things beside these.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

from lightning_qat.quantization.config_values import Scheme
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.numerics.dtypes import QuantizedDtypeName
from lightning_qat.quantization.numerics.observers import ObserverName
from lightning_qat.quantization.numerics.percentile import PERCENTILE
from lightning_qat.quantization.reading.checks import AT_LEAST_ONE, AT_LEAST_ZERO, POSITIVE, one_of

_Scale = Annotated[float, POSITIVE]


@dataclass(frozen=True)
class StoredRow:
    """One row of a sensitivity table or a layer comparison.

    Args:
        point: name of the point; empty for a tensor that is none.
        region: path of its region.
        quant_dtype: its dtype.
        score: its sensitivity.
        standard_error: of the score.
        own_SQNR: signal to noise ratio of its own error, in dB.
    """

    point: str | None
    region: str | None = None
    quant_dtype: str | None = None
    score: float | None = None
    standard_error: Annotated[float, AT_LEAST_ZERO] | None = None
    own_SQNR: float | None = None


NUMBERS = tuple(f.name for f in dataclasses.fields(StoredRow) if "float" in str(f.type))
"""The fields that a csv file holds as words of digits."""


@dataclass(frozen=True)
class StoredPoint:
    """One point of ``quant_plan.json``; the fields are those of the file.

    Raises:
        ConfigurationError: a zero point is no code of the type.
    """

    name: str
    dtype: Annotated[str, one_of(QuantizedDtypeName)]
    quant_min: int
    quant_max: int
    scheme: Annotated[str, one_of(Scheme)] | None = None
    axis: int | None = None
    split_sizes: list[Annotated[int, AT_LEAST_ONE]] | None = None
    observer: Annotated[str, one_of(ObserverName)] | None = None
    percentile: Annotated[float, PERCENTILE] | None = None
    fixed_scale: _Scale | None = None
    scale: list[_Scale] | _Scale | None = None
    zero_point: list[int] | int | None = None

    def __post_init__(self) -> None:
        for code in self.zero_point if isinstance(self.zero_point, list) else [self.zero_point]:
            if code is not None and not self.quant_min <= code <= self.quant_max:
                raise ConfigurationError(
                    f"the zero point {code} is none of the codes {self.quant_min} to {self.quant_max}."
                )


@dataclass(frozen=True)
class StoredPlan:
    """``quant_plan.json``.

    Args:
        format_version: of the file.
        regions: each with its points and more, by path of the target.
    """

    format_version: Annotated[int, one_of([1])]
    regions: dict[str, dict[str, Any]]
