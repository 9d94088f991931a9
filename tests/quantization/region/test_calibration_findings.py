"""What calibration finds is said once for each cause."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.quantization.region.calibration import CalibrationPass, CalibrationResult, calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.quantization.functions.test_op_spellings import Calls

X = torch.linspace(0.5, 2.0, 12).reshape(3, 4)


def _log(self: nn.Module, x: Tensor) -> Tensor:
    """Of negative numbers: NaN from there on; the branch beside it stays finite."""
    y = torch.log(self.get_submodule("first")(x))
    return self.get_submodule("last")(torch.tanh(y)) + torch.sigmoid(x)


def _region(forward: Callable[..., Tensor], **modules: nn.Module) -> Region:
    return insert(Calls(forward, **modules), (X,))


def _is_not_finite(region: Region, x: Tensor) -> list[str]:
    """The points that see NaN in the float model, by watching them."""
    seen: dict[str, bool] = {}
    with region.state("quantize"), region.tap(lambda name, value, _: seen.update({name: bool(value.isnan().any())})):
        for point in region.points.values():
            point.enabled = False
        region.target(x)
    for point in region.points.values():
        point.enabled = True
    return [name for name, bad in seen.items() if bad]


def test_nan_is_one_message_with_the_op_that_made_it_and_the_points_behind_it() -> None:
    first = nn.Linear(4, 4)
    nn.init.eye_(first.weight), nn.init.zeros_(first.bias)
    region = _region(_log, first=first, last=nn.Linear(4, 4))
    result = calibrate(region, [X, -X])
    (message,) = result.messages
    assert {f.point for f in result.findings} == set(_is_not_finite(region, -X))
    assert {(f.kind, f.batch, f.origin) for f in result.findings} == {("nan", 1, "log_0.output")}
    assert message.startswith("log_0.output is NaN in calibration batch 1")
    assert re.search(r"test_calibration_findings.py:\d+\): the float model computes it here", message)
    assert message.endswith(
        f"The same at {len(result.findings) - 1} more points behind it: tanh_0.output, add_0.output."
    )


def test_nan_in_the_data_is_one_message_for_all_that_read_them() -> None:
    region = _region(lambda self, x: torch.sigmoid(x) + torch.tanh(x * 2.0))
    (message,) = calibrate(region, [X.clone().fill_(torch.nan)]).messages
    assert "it comes from input 0" in message


def test_nan_in_a_weight_names_the_parameter() -> None:
    fc = nn.Linear(4, 2)
    fc.weight.data[0] = torch.nan
    region = _region(lambda self, x: torch.tanh(self.get_submodule("fc")(x)), fc=fc)
    (message,) = calibrate(region, [X]).messages
    assert "fc.weight is NaN in calibration batch 0" in message
    assert "it comes from parameter fc.weight" in message


def test_two_causes_are_two_messages_the_earlier_batch_first() -> None:
    region = _region(lambda self, x: torch.cat([torch.log(x[:, :2]), torch.sqrt(x[:, 2:])], 1).tanh())
    second, first = X.clone(), X.clone()
    first[:, 3] = -1.0
    second[:, 0] = -1.0
    result = calibrate(region, [X, first, second])
    assert [m.partition(" ")[0] for m in result.messages] == ["sqrt_0.output", "log_0.output"]
    assert [("in calibration batch 1" in m, "in calibration batch 2" in m) for m in result.messages] == [
        (True, False),
        (False, True),
    ]


def test_infinities_are_followed_in_the_same_way() -> None:
    region = _region(lambda self, x: torch.relu(torch.tanh(x).reciprocal() * 2.0))
    result = calibrate(region, [torch.zeros(3, 4)])
    inf = [m for m in result.messages if "infinite" in m]
    assert len(inf) == 1
    assert inf[0].startswith("reciprocal_0.output is infinite in calibration batch 0")


def test_what_only_another_rank_saw_is_said_too() -> None:
    """Ranks add up their statistics before the scales are derived; here that sum is written by hand."""
    region = _region(lambda self, x: torch.tanh(x))
    with CalibrationPass({"": region}) as calibration, torch.no_grad():
        region.target(X)
        calibration.batch_done()
    region.points["tanh_0.input0"].observe(X.clone().fill_(torch.nan))
    (message,) = calibration.finish().messages
    assert "is NaN in a calibration batch of another rank" in message


def test_a_branch_that_the_data_do_not_take_is_one_message() -> None:
    region = insert(
        Calls(lambda self, x: torch.tanh(torch.sigmoid(x * 2.0) + 1.0) if x.sum() > 0 else x.sin()),
        batches=[X, -X],
    )
    result = calibrate(region, [-X])
    (message,) = [m for m in result.messages if "never reached" in m]
    unreached = [f.point for f in result.findings if f.kind == "no data"]
    assert len(unreached) > 2
    assert message.startswith(f"{unreached[0]} was never reached")
    assert f"The same at {len(unreached) - 1} more points: {unreached[1]}" in message


def test_frozen_points_are_not_blamed_for_an_earlier_calibration() -> None:
    region = _region(lambda self, x: torch.tanh(x))
    bad = X.clone()
    bad[0, 0] = torch.nan
    assert calibrate(region, [X, bad]).findings
    region.freeze("*")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibrate(region, [X]).findings == ()


@pytest.mark.parametrize("count", [0, 1])
def test_messages_of_nothing_and_of_one(count: int) -> None:
    region = _region(lambda self, x: torch.tanh(x))
    result: CalibrationResult = calibrate(region, [X if count == 0 else torch.zeros(3, 4)])
    assert [m.partition(" ")[0] for m in result.messages] == ["tanh_0.input0"][:count]
