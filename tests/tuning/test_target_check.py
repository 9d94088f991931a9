"""Targets: what passes, what has collapsed, and which make no sense."""

from __future__ import annotations

import math

import pytest

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.tuning.target_check import TargetCheck
from lightning_qat.tuning.tuning_settings import TuningSettings, read_target

FLOAT = {"val_acc": 0.9, "val_loss": 0.3, "mAP": 0.5}


def check(target: object = "1%", metrics: tuple[str, ...] = ()) -> TargetCheck:
    return TargetCheck(TuningSettings("train.py", (), target=target, metrics=metrics), FLOAT)  # type: ignore[arg-type]


def test_scores_count_and_all_of_them_must_hold() -> None:
    """D7: several tasks. 1 % of 0.9 and of 0.5."""
    assert check().targets == pytest.approx({"val_acc": 0.891, "mAP": 0.495})
    assert check().passes({"val_acc": 0.892, "mAP": 0.496, "val_loss": 99.0})
    assert not check().passes({"val_acc": 0.92, "mAP": 0.4})


def test_costs_count_where_they_are_named() -> None:
    assert check(metrics=("val_loss",)).targets == pytest.approx({"val_loss": 0.303})
    assert check({"val_loss": "10%"}).passes({"val_loss": 0.329})
    assert not check({"val_loss": "10%"}).passes({"val_loss": 0.331})


def test_named_metrics_all_count_costs_too() -> None:
    both = check("10%", ("val_acc", "val_loss"))
    assert both.targets == pytest.approx({"val_acc": 0.81, "val_loss": 0.33})
    assert not both.passes({"val_acc": 0.9, "val_loss": 3.0})


def test_shortfall_is_that_of_the_worst_metric_and_being_better_is_none() -> None:
    assert check().shortfall({"val_acc": 0.891, "mAP": 0.6}) == pytest.approx(1.0)
    assert check().shortfall({"val_acc": 0.95, "mAP": 0.6}) == 0.0
    assert check().shortfall({"val_acc": math.nan, "mAP": 0.6}) == math.inf
    assert check("10%", ("val_loss",)).shortfall({"val_loss": 0.36}) == pytest.approx(2.0)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_metric_that_is_no_number_or_not_there_misses(value: float) -> None:
    assert not check().passes({"val_acc": value, "mAP": 0.6})
    assert not check().passes({"mAP": 0.6})
    assert check().collapsed({"val_acc": value, "mAP": 0.6}) == ["val_acc"]


def test_collapsed_is_below_nine_tenths_of_float() -> None:
    assert check().collapsed({"val_acc": 0.82, "mAP": 0.5}) == []
    assert check().collapsed({"val_acc": 0.80, "mAP": 0.0}) == ["val_acc", "mAP"]
    assert check({"val_loss": "5%"}).collapsed({"val_loss": 0.32}) == []
    assert check({"val_loss": "5%"}).collapsed({"val_loss": 0.34}) == ["val_loss"]


@pytest.mark.parametrize(
    ("target", "metrics", "message"),
    [
        ("1%", ("val_accuracy",), r"'val_accuracy' is not logged\. Did you mean 'val_acc'\? Validation logs: val_acc"),
        ({"val_acc": 0.95}, (), r"the float model itself has val_acc 0\.9, and the target is 0\.95"),
        ("much", (), "write 1%"),
        ({"val_acc": "120%"}, (), "write the loss that is allowed"),
    ],
)
def test_targets_that_make_no_sense_are_one_error(target: object, metrics: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check(target, metrics)


def test_float_metrics_that_are_no_numbers_are_one_error() -> None:
    with pytest.raises(ConfigurationError, match="val_acc of the float model is nan"):
        TargetCheck(TuningSettings("train.py", ()), {"val_acc": math.nan})


def test_targets_of_the_command_line() -> None:
    assert read_target([]) == "1%"
    assert read_target(["0.95"]) == 0.95
    assert read_target(["val_acc=0.9", "mAP=2%"]) == {"val_acc": 0.9, "mAP": "2%"}
    with pytest.raises(ConfigurationError, match="write one for all scores"):
        read_target(["1%", "val_acc=2%"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"narrow": "int16", "wide": "int8"}, "write the narrow type first: int8,int16"),
        ({"narrow": "int8", "wide": "int8"}, "at least two types"),
        ({"skip": ("int8 QAT",)}, "unknown stage to skip 'int8 QAT'"),
    ],
)
def test_settings_that_make_no_sense_are_one_error(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TuningSettings("train.py", (), **settings)  # type: ignore[arg-type]
