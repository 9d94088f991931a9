"""The table of quantized types (foundation 2)."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.numerics.dtypes import DtypeName, QuantizedDtypeName, is_float, quant_dtype


@pytest.mark.parametrize("name", ["int8", "int16", "uint8", "uint16"])
def test_range_equals_that_of_numpys_type(name: str) -> None:
    info = np.iinfo(name)
    assert (quant_dtype(name).quant_min, quant_dtype(name).quant_max) == (info.min, info.max)


@pytest.mark.parametrize("name", get_args(QuantizedDtypeName))
def test_every_type_has_as_many_codes_as_its_bits_allow(name: str) -> None:
    dtype = quant_dtype(name)
    assert dtype.quant_max - dtype.quant_min + 1 == 2**dtype.bits
    assert (dtype.quant_min < 0) == dtype.signed == name.startswith("int")


def test_types_are_all_widths_from_2_to_16_and_float32() -> None:
    expected = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 17)}
    assert set(get_args(QuantizedDtypeName)) == expected
    assert set(get_args(DtypeName)) == expected | {"float32"}


def test_unknown_name_is_an_error_with_near_names() -> None:
    with pytest.raises(ConfigurationError, match=r"'int18'.*did you mean.*'int1"):
        quant_dtype("int18")


def test_float32_is_an_error_that_says_it_is_not_quantized() -> None:
    assert is_float("float32")
    with pytest.raises(ConfigurationError, match="float32 is not a quantized type"):
        quant_dtype("float32")
