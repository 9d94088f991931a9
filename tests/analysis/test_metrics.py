"""The comparison metrics (B3) against the source's golden numbers, numpy, scipy and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import spatial, special
from torch.nn import functional as F

from lightning_qat.analysis import metrics
from lightning_qat.analysis.metrics import QuantizationError, error_sums, metric_of_sums
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.fake_quantize import fake_quantize

SHAPES = [(7,), (3, 5), (2, 4, 3), (2, 3, 4, 5)]


def pair(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    base = torch.randn(shape)
    return base, base + 0.1 * torch.randn(shape)


def test_golden_numbers_of_the_worked_example() -> None:
    """B3: row 1296 of the source, the divisor dim_t at int16."""
    index = torch.arange(128, dtype=torch.float32)
    dim_t = 10000 ** (2 * torch.div(index, 2, rounding_mode="floor") / 128)
    quantized = fake_quantize(dim_t, 8659.5107422 / 32767, 0, -32768, 32767)
    assert metrics.atol(dim_t, quantized) == pytest.approx(0.1328125, rel=1e-5)
    assert metrics.rtol(dim_t, quantized) == pytest.approx(0.0845878, rel=1e-5)
    assert metrics.mse(dim_t, quantized) == pytest.approx(0.0058058, rel=5e-4)
    assert metrics.l1(dim_t, quantized) == pytest.approx(0.0670551, rel=5e-4)
    assert metrics.sqnr(dim_t, quantized) == pytest.approx(89.0683746, rel=5e-4)
    assert metrics.cosine(dim_t, quantized) == pytest.approx(0.9999999, abs=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_metrics_equal_independent_implementations(shape: tuple[int, ...]) -> None:
    """B3: definitions, against numpy, scipy and torch."""
    base, analy = pair(shape)
    b, a = base.double().numpy(), analy.double().numpy()
    assert metrics.l1(base, analy) == pytest.approx(np.mean(np.abs(b - a)), rel=1e-12)
    assert metrics.mse(base, analy) == pytest.approx(F.mse_loss(analy.double(), base.double()).item(), rel=1e-12)
    assert metrics.cosine(base, analy) == pytest.approx(1 - spatial.distance.cosine(b.ravel(), a.ravel()), rel=1e-12)
    expected = 20 * math.log10(np.linalg.norm(b.ravel()) / np.linalg.norm((b - a).ravel()))
    assert metrics.sqnr(base, analy) == pytest.approx(expected, rel=1e-12)
    assert metrics.atol(base, analy) == pytest.approx(np.max(np.abs(b - a)), rel=1e-12)
    assert metrics.rtol(base, analy) == pytest.approx(np.max(np.abs(b - a) / np.abs(b)), rel=1e-12)
    axis = 1 if len(shape) > 2 else -1
    expected = np.mean(special.rel_entr(special.softmax(b, axis=axis), special.softmax(a, axis=axis)))
    assert metrics.kl(base, analy) == pytest.approx(expected, rel=1e-9)


def test_kl_equals_torchs_kl_div() -> None:
    """B3: KL."""
    base, analy = pair((4, 6))
    expected = F.kl_div(
        analy.double().log_softmax(-1), base.double().log_softmax(-1), log_target=True, reduction="none"
    ).mean()
    assert metrics.kl(base, analy) == pytest.approx(expected.item(), rel=1e-10)


def test_values_where_a_definition_divides_by_zero() -> None:
    """B3."""
    zero, one = torch.zeros(3), torch.ones(3)
    assert metrics.sqnr(one, one) == math.inf
    assert metrics.sqnr(zero, zero) == math.inf
    assert metrics.sqnr(zero, one) == -math.inf
    assert metrics.cosine(zero, zero) == 1.0
    assert metrics.cosine(zero, one) == 0.0
    assert metrics.rtol(zero, zero) == 0.0
    assert metrics.rtol(zero, one) == math.inf
    for name in ("L1", "MSE", "Cosine", "SQNR", "KL"):
        assert metric_of_sums(name, error_sums(torch.empty(0), torch.empty(0), with_kl=True)).isnan()  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 40), metric=st.sampled_from(["L1", "MSE", "Cosine", "SQNR", "KL"]))
def test_sums_of_parts_give_the_metric_of_the_whole(cut: int, metric: str) -> None:
    """B2: several batches and ranks."""
    generator = torch.Generator().manual_seed(cut)
    base = torch.randn(40, 3, generator=generator)
    analy = base + torch.randn(40, 3, generator=generator)
    parts = error_sums(base[:cut], analy[:cut], True) + error_sums(base[cut:], analy[cut:], True)
    whole = metric_of_sums(metric, error_sums(base, analy, True))  # type: ignore[arg-type]
    assert metric_of_sums(metric, parts) == pytest.approx(whole.item(), rel=1e-12)  # type: ignore[arg-type]


def test_metric_class_accumulates_and_resets() -> None:
    """B2, B3."""
    base, analy = pair((10, 4))
    error = QuantizationError("KL")
    error.update(base[:3], analy[:3])
    error.update(base[3:], analy[3:])
    assert error.compute() == pytest.approx(metrics.kl(base, analy).item(), rel=1e-12)
    error.reset()
    error.update(base, base)
    assert error.compute() == 0


def test_wrong_names_and_shapes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="unknown metric 'cosine': did you mean 'Cosine'"):
        QuantizationError("cosine")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"shapes \(2,\) and \(3,\)"):
        metrics.mse(torch.ones(2), torch.ones(3))
