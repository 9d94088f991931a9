"""The judgement of a training series (C1, C2), on series made by formulas."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_qat.analysis.convergence.convergence import ConvergenceResult, judge_convergence
from lightning_qat.analysis.convergence.point_history import PointHealth, PointHistory, health_of_points
from lightning_qat.analysis.convergence.training_series import ConvergenceRow, LossHistory, TrainingSeries
from lightning_qat.analysis.ladder.measurements import Measurement
from lightning_qat.analysis.statistics.statistics import StatisticsCollector
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert

GOOD = Measurement({"val_acc": 0.9}, {"val_acc": 0.01})
BAD = Measurement({"val_acc": 0.1})


def noisy(values: np.ndarray, seed: int = 0, noise: float = 0.1, correlation: float = 0.5) -> tuple[float, ...]:
    """Correlated noise of a given standard deviation on a line."""
    generator = np.random.default_rng(seed)
    rest = np.zeros(len(values))
    for i, shock in enumerate(generator.normal(size=len(values))):
        rest[i] = correlation * rest[i - 1] + math.sqrt(1 - correlation**2) * shock
    return tuple((values + noise * rest).tolist())


def series(losses: tuple[float, ...] = (), **fields: object) -> TrainingSeries:
    known = {"float_loss": (0.3, 0.01), "calibrated": GOOD, "float_model": GOOD}
    return TrainingSeries(losses=losses, **{**known, **fields})  # type: ignore[arg-type]


def over_epochs(*epochs: dict[str, PointHealth]) -> PointHistory:
    return functools.reduce(PointHistory.after, epochs, PointHistory())


def row(result: ConvergenceResult, check: str) -> ConvergenceRow:
    return next(r for r in result.rows if r.check == check)


STEPS = np.arange(300)
FALLING = np.linspace(1.0, 0.3, 300)
RISING = np.linspace(0.3, 2.0, 300)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "losses",
    [
        FALLING,
        np.full(300, 0.3),
        0.3 + np.exp(-np.arange(300) / 10),
        0.3 + 0.5 * np.exp(-((np.arange(300) / 40 - 1) ** 2)),
    ],
    ids=["falling", "flat at the float loss", "decaying", "a bump at the start"],
)
def test_healthy_series_are_silent(losses: np.ndarray, seed: int) -> None:
    """C1: no false alarm."""
    result = judge_convergence(series(noisy(losses, seed), metrics=GOOD))
    assert result.verdict == "healthy", result.note


@pytest.mark.parametrize("seed", range(20))
def test_rising_loss_is_divergence(seed: int) -> None:
    """C1."""
    result = judge_convergence(series(noisy(RISING, seed)))
    assert result.verdict == "diverging"
    assert "FloatFinetune" in result.note


def test_rising_loss_is_only_noted_while_the_metric_holds() -> None:
    result = judge_convergence(series(noisy(RISING), metrics=GOOD))
    assert result.verdict == "healthy"
    assert row(result, "loss trend").status == "noted"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_step_and_op(bad: float) -> None:
    """C1: with the first op."""
    result = judge_convergence(series((0.5, 0.6, bad), first_bad="layer.div_0.output (model.py:7)"))
    assert result.verdict == "not finite"
    assert "step 2 after 0.6" in result.note
    assert "layer.div_0.output (model.py:7)" in result.note


def test_step_of_a_long_run_is_counted_in_steps() -> None:
    """C1: a value of the series stands for several steps then."""
    history = LossHistory(capacity=8)
    for loss in [0.5] * 31 + [math.nan]:
        history.append(loss)
    assert history.stride > 1
    result = judge_convergence(TrainingSeries(losses=tuple(history.values), steps=history.steps))
    step = float(row(result, "finite loss").value or 0.0)
    assert 31 - history.stride <= step <= 31
    assert f"at step {step:g} after 0.5" in result.note


def test_what_calibration_has_lost_is_not_called_right() -> None:
    """C2: the advice against sweeping is for a calibration that was right."""
    result = judge_convergence(series(calibrated=Measurement({"val_acc": 0.6}), metrics=BAD))
    assert result.verdict == "metric collapsed"
    assert "Calibration alone had lost much already (val_acc 0.9 -> 0.6)" in result.note
    assert "Calibration was right" not in result.note


def test_collapsed_metric_advises_against_sweeping() -> None:
    """C1, C2: calibration 73.4, QAT 0."""
    calibrated = Measurement({"dynamic": 73.4, "static": 54.0}, {"dynamic": 0.5, "static": 0.5})
    result = judge_convergence(series(calibrated=calibrated, metrics=Measurement({"dynamic": 0.0, "static": 0.0})))
    assert result.verdict == "metric collapsed"
    assert "73.4 -> 0" in result.note
    assert "do not sweep learning rate" in result.note


@pytest.mark.parametrize("seed", range(10))
def test_loss_that_stays_where_it_was_above_the_float_loss_is_no_learning(seed: int) -> None:
    """C1: plateau above the float loss."""
    losses = noisy(np.full(300, 1.0), seed)
    missing = Measurement({"val_acc": 0.85})
    calibrated = replace(GOOD, metrics={"val_acc": 0.85})
    stuck = series(losses, calibrated=calibrated, metrics=missing)
    assert judge_convergence(stuck).verdict == "not learning"
    assert judge_convergence(replace(stuck, metrics=GOOD)).verdict == "healthy"  # the float metric is reached


def test_scale_that_doubled_and_lost_a_bit_is_drift() -> None:
    """C1: drifting or exploding scales."""
    first, last = {"a.output": PointHealth(0.0, 40.0)}, {"a.output": PointHealth(1.5, 30.0)}
    result = judge_convergence(series(points=over_epochs(first, last)))
    assert (result.verdict, row(result, "scales").names) == ("scales drift", ("a.output",))
    assert "factor of 2.5" in result.note
    same_resolution = {"a.output": PointHealth(1.5, 39.0)}
    assert judge_convergence(series(noisy(FALLING), points=over_epochs(first, same_resolution))).verdict == "healthy"


def test_growing_clipped_share_is_flagged_where_clipping_makes_the_error() -> None:
    """C1: growing clipped share."""
    first = {"a.output": PointHealth(0.0, 40.0, 0.001)}
    last = {"a.output": PointHealth(0.0, 20.0, 0.05, clips=True)}
    assert judge_convergence(series(points=over_epochs(first, last))).verdict == "clipping grows"
    rounding = {"a.output": PointHealth(0.0, 20.0, 0.05)}
    assert judge_convergence(series(noisy(FALLING), points=over_epochs(first, rounding))).verdict == "healthy"


@pytest.mark.parametrize(("clipped", "verdict"), [(3, "healthy"), (15, "healthy"), (16, "clipping grows")])
def test_a_few_clipped_values_are_no_growth(clipped: int, verdict: str) -> None:
    """C1: of small samples, one outlier clips some values where there were none, and its error is most of the error."""
    torch.manual_seed(0)
    scaled = nn.Sequential(nn.Linear(1, 1, bias=False))
    inside, outside = torch.linspace(-1, 1, 1152)[:, None], torch.linspace(-1, 1, 1152)[:, None]
    outside[:clipped] = 9.0
    region = insert(scaled, (inside,), qconfig={"activation": {"observer": "minmax"}})
    calibrate(region, [inside])
    points = []
    for values in (inside, outside):
        with torch.no_grad(), StatisticsCollector(region) as collector:
            scaled(values)
        points.append(health_of_points(collector.result(), {}, {}, {}))
    assert points[1]["0.input0"].clipped_share == clipped / 1152
    assert judge_convergence(series(noisy(FALLING), points=over_epochs(*points))).verdict == verdict


def test_codes_that_flip_back_and_forth_are_oscillation() -> None:
    """C1: oscillating weights, unless the float metric is reached or the flips die out."""
    epoch = {"a.weight": PointHealth(flip_rate=0.2, return_rate=0.9)}
    result = judge_convergence(series(points=over_epochs(*[epoch] * 5)))
    assert (result.verdict, row(result, "oscillation").names) == ("weights oscillate", ("a.weight",))
    dying = tuple({"a.weight": PointHealth(flip_rate=0.2 / 2**n, return_rate=0.9)} for n in range(8))
    assert judge_convergence(series(noisy(FALLING), points=over_epochs(*dying))).verdict == "healthy"
    excused = series(noisy(FALLING), points=over_epochs(*[epoch] * 5), metrics=GOOD)
    assert judge_convergence(excused).verdict == "healthy"


def test_history_of_the_points_is_bounded() -> None:
    """C1: the first epoch, the latest one, and 256 flip rates."""
    epochs = [{"a.weight": PointHealth(sqnr=float(n), flip_rate=n / 1000)} for n in range(1000)]
    history = over_epochs(*epochs)
    assert (history.first, history.latest, history.epochs) == (epochs[0], epochs[-1], 1000)
    assert history.flip_rates == tuple(n / 1000 for n in range(744, 1000))


def test_zero_gradients_are_named() -> None:
    """C1: dead gradients."""
    result = judge_convergence(series(noisy(FALLING), zero_gradients=("head.weight",)))
    assert (result.verdict, row(result, "gradients").names) == ("dead gradients", ("head.weight",))


def test_nothing_is_said_too_early() -> None:
    assert judge_convergence(TrainingSeries(losses=(5.0,) * 10)).verdict == "too early"


def test_every_flag_says_what_to_do_next() -> None:
    """C2."""
    sick = (
        series((math.nan,)),
        series(metrics=BAD),
        series(noisy(RISING)),
        series(zero_gradients=("a",)),
        series(points=over_epochs({"a": PointHealth(0.0, 40.0)}, {"a": PointHealth(9.0, 1.0)})),
    )
    for one in sick:
        result = judge_convergence(one)
        flagged = [r for r in result.rows if r.status == "flagged"]
        assert flagged
        assert all(r.next_step.endswith(".") and len(r.next_step) > 40 for r in flagged)


@pytest.mark.parametrize("steps", [10, 1000, 5000])
def test_loss_history_keeps_the_mean_in_bounded_memory(steps: int) -> None:
    generator = np.random.default_rng(0)
    losses = generator.normal(size=steps)
    history = LossHistory(capacity=64)
    for loss in losses:
        history.append(float(loss))
    assert history.steps == steps
    assert len(history.values) < 64
    whole = history.steps - history.steps % history.stride
    assert np.mean(history.values) == pytest.approx(losses[:whole].mean())


def test_loss_history_keeps_a_nan_at_once() -> None:
    history = LossHistory([1.0] * 8, stride=4)
    history.append(math.nan)
    assert math.isnan(history.values[-1])


def test_input_that_is_not_finite_comes_before_the_point_that_receives_it() -> None:
    """Number nine, the input: a wider type mends no data; the loss, the buffers and the metrics follow from it."""
    bad = {"bad_input": "batch 1 of epoch 0: 0 holds nan", "bad_buffers": ("bn.running_mean",), "bad_since": "batch 1"}
    result = judge_convergence(series((0.5, math.nan), first_bad="conv1.input0 (nets.py:16)", **bad))
    assert result.verdict == "not finite"
    assert (
        "First came the input that the loader delivers, batch 1 of epoch 0: 0 holds nan; then the buffers"
        in result.note
    )
    assert "clean them" in result.note
    assert "float32" not in result.note


def test_statistics_and_metrics_are_looked_at_where_the_loss_stays_finite() -> None:
    """Number nine, siblings: a script skips the loss, and the statistics of batch norm make every evaluation nan."""
    nan = Measurement({"val_acc": 0.1, "val_loss": math.nan})
    good = Measurement({"val_acc": 0.9, "val_loss": 0.3}, {"val_acc": 0.01})
    bad = {"bad_buffers": ("bn.running_mean", "bn.running_var"), "bad_since": "batch 1 of epoch 0"}
    result = judge_convergence(series((0.5,) * 8, metrics=nan, calibrated=good, **bad))
    assert result.verdict == "not finite"
    assert "val_loss of the evaluation is not finite" in result.note
    assert "bn.running_mean, bn.running_var are not finite, seen first at batch 1 of epoch 0" in result.note
    alone = judge_convergence(series((0.5,) * 8, metrics=nan, calibrated=good))
    assert alone.verdict == "not finite"


def test_bad_values_that_do_no_harm_are_only_noted() -> None:
    """No healthy run is called sick: a model without batch norm loses nothing by a batch that is skipped."""
    result = judge_convergence(series((0.3,) * 64, metrics=GOOD, bad_input="batch 1 of epoch 0: 0 holds nan"))
    assert result.verdict == "healthy"
    assert row(result, "finite loss").status == "noted"
    unknown = Measurement({"val_acc": 0.9, "val_auc": math.nan}, {"val_acc": 0.01})
    assert judge_convergence(series((0.3,) * 64, metrics=unknown, calibrated=unknown)).verdict == "healthy"


@pytest.mark.parametrize("losses", [(), noisy(FALLING), noisy(np.full(300, 0.3))], ids=["none", "falling", "flat"])
@pytest.mark.parametrize("metrics", [None, GOOD])
def test_every_check_says_why_it_holds_or_cannot_tell(losses: tuple[float, ...], metrics: Measurement | None) -> None:
    """A reader of the table has to see what `holds` is about: clipping that was there from the start is not."""
    clipped = {"a.output": PointHealth(0.4, 0.0, 0.0, True, 1.5)}
    points = over_epochs(clipped, clipped, clipped, clipped)
    result = judge_convergence(series(losses, metrics=metrics, evaluations=4, points=points))
    assert not result.is_bad
    assert all(found.evidence for found in result.rows), [found.check for found in result.rows if not found.evidence]
    clipping = row(result, "clipping")
    assert clipping.status == "holds"
    assert "from the start is not judged" in clipping.evidence


def test_a_healthy_verdict_is_about_training_and_not_about_the_target() -> None:
    lost = Measurement({"val_acc": 0.09}, {"val_acc": 0.01})
    result = judge_convergence(series(noisy(FALLING), calibrated=lost, metrics=Measurement({"val_acc": 0.5})))
    assert result.verdict == "healthy"
    assert "AccuracyTable(target=...)" in result.note
    assert row(result, "metric").evidence == "against the calibrated model: val_acc 0.09 -> 0.5."
    assert row(result, "plateau").evidence.endswith("It is no plateau: it has fallen.")
