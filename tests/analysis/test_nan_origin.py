"""The op that made the first NaN is named, and none that only hands it on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.analysis.nan_origin import first_bad_point, first_nan_op
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from tests.quantization.functions.test_op_spellings import Calls

X = torch.linspace(0.5, 2.0, 12).reshape(3, 4)


def _filled(self: nn.Module, x: Tensor) -> Tensor:
    """Memory that is written before it is read, then the logarithm of what may be negative."""
    y = torch.empty(2, 3, 4)
    y[0], y[1] = x, x
    return torch.tanh(torch.log(y))


def test_memory_that_is_not_written_yet_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under deterministic algorithms torch fills it with NaN."""
    region = insert(Calls(_filled), (X,))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert first_nan_op(region, lambda: region.target(X)).startswith("No op of the region made it")
        assert re.match(
            r"The first op that made one is log_0 at .*\.py:\d+", first_nan_op(region, lambda: region.target(-X))
        )
    finally:
        torch.use_deterministic_algorithms(False)


def _divided(self: nn.Module, x: Tensor) -> Tensor:
    """An additive mask, infinite on purpose, then a division by what may be zero."""
    mask = torch.zeros(4).masked_fill(torch.arange(4) > 2, -math.inf)
    weights = torch.softmax(x + mask, dim=1)
    return torch.tanh(weights / x[:, :1])


def test_first_point_that_receives_an_infinity_is_named() -> None:
    """C1: not the mask, and not the op after it."""
    region = insert(Calls(_divided), (X,))
    calibrate(region, [X])
    broken = X.clone()
    broken[1, 0] = 0.0
    with region.state("quantize"):
        assert first_bad_point({"": region}, lambda: region.target(X)) is None
        found = first_bad_point({"net": region}, lambda: region.target(broken))
    assert found is not None
    assert re.fullmatch(r"net:div_0\.output \(.*test_nan_origin\.py:\d+\)", found), found


def _in_place(self: nn.Module, x: Tensor) -> Tensor:
    y = x * 2
    y.log_()
    return y + 1


def _assigned(self: nn.Module, x: Tensor) -> Tensor:
    y = x * 2
    y[0] = math.nan
    return y + 1


@pytest.mark.parametrize(("forward", "op"), [(_in_place, "log_0"), (_assigned, "setitem_0")])
def test_op_that_writes_nan_in_place_is_named(forward: Callable[[nn.Module, Tensor], Tensor], op: str) -> None:
    """Its operand holds NaN afterwards, and did not before."""
    region = insert(Calls(forward), (X,))
    assert first_nan_op(region, lambda: region.target(-X)).startswith(f"The first op that made one is {op} at ")
