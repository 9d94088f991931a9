"""The histogram of a point's codes, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_qat.analysis.statistics.point_statistics import PointStatistics
from lightning_qat.analysis.statistics.statistics import layer_statistics
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.region.insertion import insert


def quantized(dtype: str, scale: float = 0.1) -> FakeQuantize:
    region = insert(
        nn.Sequential(nn.Linear(4, 4)),
        (torch.zeros(2, 4),),
        qconfig={"activation": {"dtype": dtype, "observer": "minmax"}},
        overrides=[{"match": "*.input0", "activation": {"fixed_scale": scale}}],
    )
    return region.points["0.input0"]


@pytest.mark.parametrize("dtype", ["int2", "int4", "int8", "uint8", "int16"])
def test_counts_are_those_of_numpy_and_add_up_over_batches_and_ranks(dtype: str) -> None:
    fake_quant = quantized(dtype)
    width = 2.5 * 0.1 * (fake_quant.quant_max - fake_quant.quant_min)
    values = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * width / 6
    parts = [PointStatistics.of(fake_quant) for _ in values]
    for part, batch in zip(parts, values, strict=True):
        part.update(batch, fake_quant(batch), fake_quant)
    sent = [PointStatistics.from_tensors(*part.to_tensors(), part.channels, part.levels) for part in parts]
    found = parts[0]
    for other in sent[1:]:
        found.merge(other)
    codes = np.rint(values.double().numpy() / np.float64(np.float32(0.1))).reshape(-1)
    inside = codes[(codes >= fake_quant.quant_min) & (codes <= fake_quant.quant_max)]
    edges = fake_quant.quant_min + found.bin_width * np.arange(len(found.bins) + 1) - 0.5
    assert found.bins.tolist() == np.histogram(inside, edges)[0].tolist()
    assert found.above == (codes > fake_quant.quant_max).sum()
    assert found.clipped - found.above == (codes < fake_quant.quant_min).sum()
    assert len(found.bins) <= 32


def test_values_that_are_not_finite_are_in_no_bin() -> None:
    fake_quant = quantized("int8")
    batch = torch.tensor([0.0, float("nan"), float("inf"), -float("inf"), 100.0, -100.0, 1.0])
    found = PointStatistics.of(fake_quant)
    found.update(batch, fake_quant(batch), fake_quant)
    assert (found.bins.sum(), found.above, found.clipped) == (2.0, 1.0, 2.0)


def test_result_has_one_histogram_for_each_point_that_was_quantized() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    net = Net()
    region = insert(net, (x,))
    assert layer_statistics(region, [x]).histograms == ()
    with region.state("observe"):
        net(x)
    region.compute_scales("minmax")
    result = layer_statistics(region, [x])
    assert [one.point for one in result.histograms] == [row.point for row in result.rows]
    for one, row in zip(result.histograms, result.rows, strict=True):
        assert sum(one.counts) + one.below + one.above == row.count
