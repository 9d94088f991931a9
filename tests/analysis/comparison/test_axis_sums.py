"""Sums along axes equal numpy's over the same values, whatever axes are asked for and however the tensor is cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_qat.analysis.comparison import axis_sums
from lightning_qat.analysis.comparison.axis_sums import SumsByAxis, sums_along


def by_numpy(value: Tensor, quantized: Tensor, axis: int) -> tuple[np.ndarray, np.ndarray]:
    x, q = value.double().numpy(), quantized.double().numpy()
    finite = np.isfinite(x) & np.isfinite(q)
    x, q = np.where(finite, x, 0.0), np.where(finite, q, 0.0)
    inverse = np.zeros_like(x)
    np.divide(1.0, x * x, out=inverse, where=x != 0)
    others = tuple(a for a in range(x.ndim) if a != axis)
    parts = [finite.astype(float), x, x * x, q - x, (q - x) ** 2, inverse]
    return np.stack([p.sum(others) for p in parts]), np.stack([np.abs(x).max(others), np.abs(q).max(others)])


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((7,), (0,)),
        ((6, 5), (0, 1)),
        ((6, 5), (1,)),
        ((3, 4, 5), (0, 1, 2)),
        ((3, 4, 5), (2, 0)),
        ((2, 3, 4, 5), (1, 3)),
        ((2, 3, 4, 5), (1,)),
        ((2, 3, 4, 5), (3, 2, 1)),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_sums_equal_numpy(
    shape: tuple[int, ...], axes: Sequence[int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(axis_sums, "CHUNK", chunk)
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4
    value.view(-1)[0], value.view(-1)[-1] = float("nan"), 0.0
    quantized = value.round()
    found = sums_along(value, quantized, axes)
    assert sorted(found) == sorted(axes)
    for axis, sums in found.items():
        expected, maxima = by_numpy(value, quantized, axis)
        np.testing.assert_allclose(sums.sums.numpy(), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(sums.maxima.numpy(), maxima)


def test_sums_over_batches_are_those_of_all_of_them_at_once() -> None:
    value = torch.randn(9, 3, 4, generator=torch.Generator().manual_seed(1))
    whole, merged = SumsByAxis(), SumsByAxis()
    whole.add(value, value.round(), [1, 2])
    for part in value.split(4):
        merged.add(part, part.round(), [1, 2])
    assert merged.known.keys() == whole.known.keys() == {1, 2}
    for axis, sums in whole.known.items():
        torch.testing.assert_close(merged.known[axis].sums, sums.sums)
        torch.testing.assert_close(merged.known[axis].maxima, sums.maxima)


def test_an_axis_that_follows_the_data_is_given_up() -> None:
    sums = SumsByAxis()
    for length in (3, 4, 3):
        value = torch.ones(2, length)
        sums.add(value, value, [0, 1])
    assert list(sums.known) == [0]
