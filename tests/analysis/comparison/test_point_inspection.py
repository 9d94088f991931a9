"""One point's tensors, compared with torch's own fake-quantization."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_qat.analysis.comparison.point_inspection import inspect_point
from lightning_qat.analysis.statistics.point_ranges import representable_range
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region

X = torch.linspace(-2.0, 2.0, 48).reshape(2, 1, 4, 6)


def calibrated(model: nn.Module) -> Region:
    region = insert(model, (X,), qconfig={"activation": {"observer": "minmax"}})
    calibrate(region, [X])
    return region


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(3, 2, 1))


def test_tensors_are_those_of_torchs_fake_quantize() -> None:
    region = calibrated(m := model())
    found = inspect_point(region, "0.input0", lambda: m(2 * X))
    (value,), (quantized,), (error,) = found.values, found.quantized, found.errors
    assert torch.equal(value, 2 * X)
    expected = torch.fake_quantize_per_tensor_affine(2 * X, found.scale.item(), 0, -128, 127)
    assert torch.equal(quantized, expected)
    assert torch.equal(error, expected - 2 * X)
    codes = (2 * X / found.scale).round()
    assert found.clipped_share == ((codes < -128) | (codes > 127)).double().mean().item()
    assert found.sqnr == pytest.approx((20 * (value.norm() / error.norm()).log10()).item(), rel=1e-4)
    assert (found.lowest, found.highest) == pytest.approx((-128 * found.scale.item(), 127 * found.scale.item()))
    assert found.statistics.clipping > found.statistics.rounding


def test_histogram_counts_every_finite_value() -> None:
    region = calibrated(m := model())
    x = X.clone()
    x[0, 0, 0, 0] = torch.nan
    before, after, edges = inspect_point(region, "0.input0", lambda: m(x)).histogram(10)
    assert before.sum() == after.sum() == X.numel() - 1
    assert edges[0] <= -2.0 * 43 / 47
    assert edges[-1] == pytest.approx(2.0)


def test_weight_is_per_channel_and_kept_once() -> None:
    region = calibrated(m := model())
    found = inspect_point(region, "0.weight", lambda: (m(X), m(X)))
    assert len(found.values) == 1
    assert found.axis == 0
    weight = m[0].weight.detach()
    expected = torch.fake_quantize_per_channel_affine(weight, found.scale, found.zero_point, 0, -127, 127)
    assert torch.equal(found.quantized[0], expected)


def test_several_forwards_give_several_tensors() -> None:
    region = calibrated(m := model())
    found = inspect_point(region, "0.input0", lambda: [m(k * X) for k in (1, 3)])
    assert [v.max().item() for v in found.values] == [2.0, 6.0]


def test_nothing_is_left_changed() -> None:
    region = calibrated(m := model().train())
    region.set_state("off")
    before = torch.get_rng_state()
    inspect_point(region, "0.input0", lambda: m(X))
    assert torch.equal(torch.get_rng_state(), before)
    assert m[2].training
    assert (region.current_state, region.switches.taps) == ("off", ())


def test_wrong_names_and_unreached_points_say_what_to_write() -> None:
    """Bad input: near names, or the points of the op."""
    region = calibrated(m := model())
    with pytest.raises(ConfigurationError, match=r"no point '0.wieght'.*Near names: 0.weight"):
        inspect_point(region, "0.wieght", lambda: m(X))
    with pytest.raises(ConfigurationError, match=r"no point '0'. The op has: 0.input0, 0.weight"):
        inspect_point(region, "0", lambda: m(X))
    with pytest.raises(ConfigurationError, match="was not reached"):
        inspect_point(region, "0.weight", lambda: None)
    fresh = insert(other := model(), (X,))
    with pytest.raises(ConfigurationError, match="has no scale yet: calibrate"):
        inspect_point(fresh, "0.weight", lambda: other(X))


@pytest.mark.parametrize(("dtype", "low", "high"), [("int8", -64.0, 63.5), ("int16", -16384.0, 16383.5)])
def test_representable_range_is_that_of_the_codes(dtype: str, low: float, high: float) -> None:
    assert representable_range(FakeQuantize(dtype, fixed_scale=0.5)) == (low, high)
