"""Hyperparameters that keep training from moving the model, from planted numbers.

Number 4 of what the field met. Where calibration has lost something they are to blame; where it has not, the run is
healthy, and the first sentence says what differs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.fingerprint.training_plan import TrainingPlan, planned
from lightning_qat.analysis.ladder.measurements import Measurement
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from tests.analysis.ladder.test_verdict import HERE, judged, trained

PLAN = TrainingPlan(
    steps=1000,
    samples=64.0,
    updates=(0.04,),
    kept=1.0,
    base_rates=(0.01,),
    rates=(0.01,),
    first_rates=(0.01,),
    rate_shares=(0.5,),
    decays=(0.01,),
    horizon=10.0,
)
SETTINGS = {"batch_size": 64, "accumulate_grad_batches": 1, "gradient_clip_val": 1.0, "world_size": 1}
FLOAT_RUN = dataclasses.replace(
    HERE, plan=PLAN, settings=SETTINGS, untrained=[], weights={"conv": "1f", "head": "2e"}, schedulers=[]
)
USUAL = dataclasses.replace(PLAN, updates=(0.003,), base_rates=(0.001,), rates=(0.001,), first_rates=(0.001,))
LOST: dict[str, Any] = {"calibrated": Measurement({"val_acc": 0.6}, {"val_acc": 0.02}), "qat": trained(0.62)}
SLIGHT: dict[str, Any] = {"calibrated": Measurement({"val_acc": 0.92}, {"val_acc": 0.02}), "qat": trained(0.93)}


def run(plan: dict[str, Any], reference: Any = FLOAT_RUN, results: Any = None, **kwargs: Any) -> PipelineResult:
    here = dataclasses.replace(FLOAT_RUN, plan=dataclasses.replace(USUAL, **plan), **kwargs)
    return judged(reference, here, **(results or {}))


SIZES = {"conv.weight": 400, "conv.bias": 5, "head.weight": 500, "head.bias": 10}
CLIPPED = {"updates": (1e-5,), "kept": 1e-6}, {"settings": SETTINGS | {"gradient_clip_val": 1e-7}}
KINDS = {
    "clipping": (*CLIPPED, "gradient_clip_val 1e-07 leaves 1e-06 of the gradient"),
    "learning rate": ({"updates": (1e-5,), "rates": (1e-6,)}, {}, "highest learning rate is 1e-06 (float run: 0.01)"),
    "accumulation": (
        {"samples": 2048.0, "steps": 31},
        {"settings": SETTINGS | {"accumulate_grad_batches": 32}},
        "a step takes 2048 samples (float run: 64), so that 31 steps are planned: accumulate_grad_batches 1 -> 32",
    ),
    "schedule": (
        {"rate_shares": (0.01,)},
        {"schedulers": [{"class": "StepLR", "interval": "step", "frequency": 1}]},
        "the schedule leaves 1.0% of the highest learning rate, on average over the 1000 planned steps: StepLR per "
        "step (float run: no scheduler)",
    ),
    "momentum": ({"horizon": 1000.0}, {}, "momentum averages over 1e+03 steps (float run: 10), and 1000 are planned"),
    "weight decay": ({"decays": (0.6,)}, {}, "weight decay takes 60% of the weights"),
    "warm-up": ({"first_rates": (0.01,), "rates": (0.01,)}, {}, "begins at 0.01, 10 times the learning rate"),
    "frozen": ({}, {"untrained": ["head.weight"], "sizes": SIZES}, "does not update head.weight here, and did"),
    "batches of one": ({"samples": 1.0, "steps": 64000}, {}, "a step takes 1 sample (float run: 64)"),
}


@pytest.mark.parametrize("results", [LOST, SLIGHT], ids=["collapsed", "fallen"])
@pytest.mark.parametrize("kind", KINDS)
def test_hyperparameters_are_to_blame_where_training_cannot_win_back(kind: str, results: dict[str, Any]) -> None:
    plan, kwargs, words = KINDS[kind]
    result = run(plan, results=results, **kwargs)
    assert (result.verdict, result.rung) == ("hyperparameters", 5), result.note
    assert words in result.note
    assert words in result.cause
    assert "can hardly win it back" in result.note
    assert result.is_bad


@pytest.mark.parametrize("kind", KINDS)
def test_good_calibration_stays_healthy_and_the_first_sentence_names_the_setting(kind: str) -> None:
    """int8, and an accuracy that QAT has won back by half or more."""
    plan, kwargs, words = KINDS[kind]
    won_back = {"calibrated": LOST["calibrated"], "qat": trained(0.96)}
    for results in ({}, won_back):
        result = run(plan, results=results, **kwargs)
        assert result.verdict == "healthy"
        assert result.note.startswith("healthy, but ")
        first = result.note.partition("very rung")[0]
        assert words in first, result.note


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"updates": (0.0008,), "rates": (0.0002,)},  # a fiftieth of the learning rate
        {"rate_shares": (0.25,)},
        {"samples": 256.0},
        {"samples": 256.0, "updates": (0.012,)},
        {"rate_shares": (1.0,), "samples": 16.0},
        {"updates": (0.0, 0.003), "rate_shares": (0.0, 0.5), "rates": (0.0, 0.001)},  # more groups, one of them later
        {"updates": ()},
        {"steps": 0},
        {"samples": None},
    ],
)
def test_usual_hyperparameters_leave_quantization_error_to_quantization(plan: dict[str, Any]) -> None:
    """A tenth to a fiftieth of the learning rate, a cosine, accumulation of four: what lost is not theirs."""
    assert run(plan).note.startswith("healthy: ")
    assert run(plan, results=LOST).verdict == "quantization error"
    assert run(plan, results=SLIGHT).verdict == "healthy"


def test_calibration_on_other_data_is_blamed_first() -> None:
    """Its scales are wrong whatever training could do."""
    plan, kwargs, _ = KINDS["clipping"]
    result = run(plan, results=LOST | {"calibration": "the calibration data are not the training data."}, **kwargs)
    assert result.verdict == "quantization error"


def test_small_gain_of_a_setting_is_not_blamed_where_the_float_run_had_it() -> None:
    """Frozen parts, momentum and accumulation of the float run are its own."""
    same = dataclasses.replace(
        FLOAT_RUN, untrained=["conv.weight"], plan=dataclasses.replace(PLAN, horizon=500.0, samples=2048.0)
    )
    plan = {"horizon": 500.0, "samples": 2048.0}
    assert run(plan, same, untrained=["conv.weight"]).note.startswith("healthy: ")
    only_here = run({}, untrained=["adapter.weight"])  # what the float run did not have cannot have been trained there
    assert only_here.note.startswith("healthy: ")


@pytest.mark.parametrize("results", [LOST, SLIGHT], ids=["collapsed", "fallen"])
@pytest.mark.parametrize(
    ("frozen", "before", "sizes", "is_blamed"),
    [
        (["head.bias"], [], SIZES, False),
        (["head.bias", "conv.bias"], [], SIZES, False),
        (["conv.weight"], [], SIZES, False),  # 400 of 915
        (["conv.weight", "conv.bias"], [], SIZES | {"adapter.weight": 9000}, False),
        (["head.weight"], [], SIZES, True),
        (["head.weight"], [], SIZES | {"adapter.weight": 9000}, True),  # the float run had no adapter
        (["conv.weight"], ["head.weight"], SIZES, True),  # 400 of the 415 that the float run updated
        (["conv.bias"], ["head.weight"], SIZES, False),
        (["head.weight"], [], None, False),  # a file of an earlier release
    ],
)
def test_frozen_part_is_blamed_only_if_it_holds_half_of_what_the_float_run_updated(
    frozen: list[str],
    before: list[str],
    sizes: dict[str, int] | None,
    is_blamed: bool,
    results: dict[str, Any],
) -> None:
    """One frozen bias, and clipped inputs: what calibration has lost is quantization error.

    Siblings: several small parts, less than half of the weights, parts that only this run has, and unknown sizes.
    A run that is healthy otherwise names the frozen part in any case.
    """
    reference = dataclasses.replace(FLOAT_RUN, untrained=before)
    here: dict[str, Any] = {"untrained": [*before, *frozen], "sizes": sizes}
    usual = run({}, results=results)
    result = run({}, reference, results, **here)
    assert result.verdict == ("hyperparameters" if is_blamed else usual.verdict), result.note
    assert usual.verdict != "hyperparameters"
    words = f"training does not update {', '.join(frozen)} here, and did in the float run"
    assert (words in result.cause) is is_blamed
    assert run({}, reference, **here).note.startswith(f"healthy, but {words}")


def test_frozen_bias_does_not_hide_another_setting() -> None:
    plan, kwargs, words = KINDS["clipping"]
    result = run(plan, results=LOST, **kwargs, untrained=["head.bias"], sizes=SIZES)
    assert (result.verdict, words in result.cause) == ("hyperparameters", True)
    assert "head.bias" not in result.note


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"rate_shares": (0.01,)}, "the schedule leaves 1.0%"),
        ({"updates": (1e-9,), "kept": 1e-8}, "1000 steps in one direction would move the weights by 5e-07"),
        ({"horizon": 1000.0}, "momentum averages over 1e+03 steps"),
        ({"first_rates": (0.01,)}, "10 times the learning rate"),
    ],
)
def test_without_a_reference_what_stands_out_alone_is_named(plan: dict[str, Any], words: str) -> None:
    result = run(plan, None)
    assert result.note.startswith("healthy, but ")
    assert words in result.note.partition("very rung")[0]
    # it may be as it was in the float run, and a bad scale is not mended by training either
    assert run(plan, None, LOST).verdict == "quantization error"


def test_numbers_of_both_trainings_are_evidence() -> None:
    rows = {row.metric: row for row in run({}).rows if row.rung == 5 and row.status == "noted"}
    assert (rows["update per step, group 0"].expected, rows["update per step, group 0"].value) == (0.04, 0.003)
    assert (rows["samples per step"].expected, rows["mean of highest lr, group 0"].value) == (64.0, 0.5)
    fractions = [row for name, row in rows.items() if name.startswith(("update", "mean", "gradient"))]
    assert all(row.note.startswith(("relative change", "mean learning rate", "fraction")) for row in fractions)
    assert not any(row.metric == "gradient kept" for row in judged(HERE, HERE).rows)


def test_a_fingerprint_without_a_plan_is_not_compared() -> None:
    older = dataclasses.replace(FLOAT_RUN, plan=None, modules=None, untrained=None)
    assert run({"rate_shares": (0.2,), "updates": (1e-4,)}, older).note.startswith("healthy: ")


def test_plan_sums_up_the_rates() -> None:
    """Weight decay is that of (1 - lr * decay) to the power of the steps."""
    plan = planned(100, [[0.1] * 50 + [0.0] * 50, [0.0] * 100], [0.02, 0.0])
    assert (plan.rates, plan.rate_shares, plan.first_rates) == ((0.1, 0.0), (0.5, 0.0), (0.1, 0.0))
    assert plan.decays == pytest.approx((1 - (1 - 0.1 * 0.02) ** 50, 0.0), rel=1e-2)
    assert Fingerprint(plan=plan).plan is plan
