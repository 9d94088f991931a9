"""Sensitivity of models whose gradients or output shapes are not what they seem (B1, B2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.analysis import metrics
from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult
from lightning_qat.quantization.errors import ConfigurationError
from tests.analysis.sensitivity.test_sensitivity_sketch import assert_close, region_of

Forward = Callable[["Three", Tensor], Tensor]


class Three(nn.Module):
    """Three linear layers, put together by a function."""

    def __init__(self, put_together: Forward) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.put_together = put_together

    def forward(self, x: Tensor) -> Tensor:
        return self.put_together(self, x)


class Tripled(torch.autograd.Function):
    """With the derivative it has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * gradient


class Reversed(torch.autograd.Function):
    """Gradient reversal: not the derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -10 * gradient


def written_in_part(m: Three, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, 0] = 0.5
    return m.b(y) + 2 * y


def in_place_with_two_names(m: Three, x: Tensor) -> Tensor:
    y = m.a(x)
    z = F.relu(y, inplace=True)
    return m.b(z) + y


def opaque_with_three_readers(m: Three, x: Tensor) -> Tensor:
    y = Tripled.apply(m.a(x))
    return m.b(y) + 3 * m.c(y) + y


@pytest.mark.parametrize("forward", [written_in_part, in_place_with_two_names, opaque_with_three_readers])
def test_point_of_one_reader_is_not_blamed_for_what_others_read(forward: Forward) -> None:
    """B2: the gradient of a tensor is that of all its readers; a point at the operand of one is about this one."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    assert_close(region_of(Three(forward), x), x)


def test_backward_of_custom_functions_is_named() -> None:
    """Nobody can see whether a custom backward is the derivative: the estimate must not look certain."""

    def forward(m: Three, x: Tensor) -> Tensor:
        return m.b(Reversed.apply(m.a(x))) + Tripled.apply(m.c(x))

    x = torch.randn(16, 8)
    result = sensitivity(region_of(Three(forward), x), [x], method="sketch", confirm=0)
    assert result.custom_backward == ("Reversed", "Tripled")
    assert "estimates take the backward of Reversed, Tripled for the derivative" in result.note
    plain = sensitivity(region_of(Three(lambda m, x: m.c(m.a(x))), x), [x], method="sketch", confirm=0)
    assert plain.custom_backward == ()


def selected(m: Three, x: Tensor) -> Tensor:
    """Rows that a score selects, as boxes are."""
    y = m.a(x)
    return y[y[:, 0] > 0]


def selecting() -> tuple[Three, Tensor]:
    torch.manual_seed(0)
    return Three(selected), torch.randn(256, 8)


@pytest.mark.parametrize("metric", ["L1", "MSE", "Cosine"])
def test_output_that_changes_its_shape_is_measured_with_zeros_for_what_is_missing(
    metric: metrics.MetricName,
) -> None:
    """B2: against the output written out; no row comes first without a measured reason."""
    model, x = selecting()
    region = region_of(model, x, "int4")
    result = sensitivity(region, [x], metric=metric, method="isolation")
    assert "a.weight" in result.reshaped
    assert f"with {', '.join(result.reshaped[:3])} quantized the output has another shape" in result.note
    row = next(row for row in result.rows if row.point == "a.weight")
    with torch.no_grad():
        weight = region.points["a.weight"](model.a.weight)
        base, analy = F.linear(x, model.a.weight, model.a.bias), F.linear(x, weight, model.a.bias)
    base, analy = base[base[:, 0] > 0].double(), analy[analy[:, 0] > 0].double()
    elements, rows = base.numel(), max(len(base), len(analy))
    assert len(base) != len(analy)
    base, analy = (torch.cat([t, t.new_zeros(rows - len(t), 8)]) for t in (base, analy))
    expected = {
        "L1": (base - analy).abs().sum() / elements,
        "MSE": (base - analy).square().sum() / elements,
        "Cosine": F.cosine_similarity(base.flatten(), analy.flatten(), dim=0),
    }
    assert row.value == pytest.approx(float(expected[metric]), rel=1e-5)
    assert row.score == pytest.approx(float(expected["MSE"].sqrt()), rel=1e-5)


def test_confirmed_points_and_merged_tables_name_what_changes_the_shape() -> None:
    model, x = selecting()
    result = sensitivity(region_of(model, x, "int4"), [x], method="sketch", confirm=9)
    assert "a.weight" in result.reshaped
    assert all(math.isfinite(row.score) for row in result.rows)
    assert SensitivityResult.merged({"head": result}).reshaped == tuple(f"head: {name}" for name in result.reshaped)


def test_metric_of_the_user_sees_both_shapes_or_the_error_says_what_to_do() -> None:
    model, x = selecting()
    region = region_of(model, x, "int4")

    def missing(base: Tensor, analy: Tensor) -> float:
        return float(abs(len(base) - len(analy)))

    def largest(base: Tensor, analy: Tensor) -> Tensor:
        return (base - analy).abs().max()

    values = {row.point: row.value for row in sensitivity(region, [x], metric=missing, method="isolation").rows}
    assert values["a.weight"] != 0
    with pytest.raises(ConfigurationError, match=r"quantizing a\..* changes the shape of the whole output.*largest"):
        sensitivity(region, [x], metric=largest, method="isolation")


def test_confirmation_of_a_long_loop_is_bounded() -> None:
    """A loop whose rounds are ops of their own has thousands of points, and a tenth of them is too much."""

    def loop(m: Three, x: Tensor) -> Tensor:
        for _ in range(40):
            x = m.a(x).tanh() + x
        return x

    x = torch.randn(4, 8)
    region = region_of(Three(loop), x)
    result = sensitivity(region, [x], method="sketch", max_points=5)
    assert result.points > 80
    assert sum(row.exact for row in result.rows) == 5
    assert sum(row.exact for row in sensitivity(region, [x], method="sketch", max_points=5, confirm=7).rows) == 7


def test_wrong_numbers_are_told_what_may_be_written() -> None:
    x = torch.randn(4, 8)
    region = region_of(Three(lambda m, x: m.a(x)), x)
    for wrong, text in (
        ({"probes": 0}, "probes must be at least 1, not 0"),
        ({"top_k": 0}, "top_k must be at least 1, or None for a tenth of the points, not 0"),
        ({"max_points": 0}, "max_points must be at least 1, or None for all, not 0"),
    ):
        with pytest.raises(ConfigurationError, match=text):
            sensitivity(region, [x], **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("jump", "op"),
    [
        (lambda y: y % 1.0, "remainder_0"),
        (lambda y: torch.fmod(y, 1.0), "fmod_0"),
        (lambda y: torch.div(y, 0.5, rounding_mode="floor") * y, "div_0"),
        (lambda y: torch.isclose(y, torch.zeros(1), atol=0.1) * y, "isclose_0"),
        (lambda y: y.to(torch.int64) * y, "to_0"),
        (lambda y: y.gather(1, torch.cummax(y, 1)[1]), "cummax_0"),
        (lambda y: torch.bernoulli(y.sigmoid()) * y, "bernoulli_0"),
        (lambda y: F.one_hot(y.argmax(1), 8) * y, "argmax_0"),
    ],
    ids=["remainder", "fmod", "div", "isclose", "to", "cummax", "bernoulli", "argmax"],
)
def test_every_op_whose_result_jumps_is_named(jump: Callable[[Tensor], Tensor], op: str) -> None:
    """The estimate holds what an op makes of values as an index, a comparison or a step: the table says so."""
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    result = sensitivity(region_of(Three(lambda m, x: jump(m.a(x))), x), [x], method="sketch", confirm=0)
    assert [name.partition(" at ")[0] for name in result.held] == [op]


@pytest.mark.parametrize(
    "smooth",
    [
        lambda y: y.topk(3, 1)[0],
        lambda y: y.amax(1) + y.max(1)[0],
        lambda y: torch.fft.rfft(y).abs(),
        lambda y: y.sort(1)[0],
        lambda y: y / 0.5 + torch.zeros_like(y, dtype=torch.int64),
    ],
    ids=["topk", "max", "fft", "sort", "zeros"],
)
def test_ops_whose_indices_nobody_reads_are_not_named(smooth: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(16, 8)
    result = sensitivity(region_of(Three(lambda m, x: smooth(m.a(x))), x), [x], method="sketch", confirm=0)
    assert result.held == ()
