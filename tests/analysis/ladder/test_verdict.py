"""The verdict of the whole ladder, from planted numbers (C3 to C6)."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.fingerprint.fingerprint_differences import compare_fingerprints, compare_stages
from lightning_qat.analysis.fingerprint.tensor_summary import TensorSummary
from lightning_qat.analysis.ladder.measurements import Finetune, Ladder, Measurement, OffComparison
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.verdict import judge
from lightning_qat.reporting.console import console_text
from lightning_qat.reporting.files import write_json

FLOAT = Measurement({"val_acc": 0.98, "val_loss": 0.06}, {"val_acc": 0.004, "val_loss": 0.02})
HERE = Fingerprint(
    weights={"conv": "1f"},
    metrics={"val_acc": 0.98},
    losses={"train_loss (batch norm in eval)": 0.05},
    standard_errors={"val_acc": 0.01},
    agreement={"train": {"model=1": 0.99}, "validate": {"model=1": 0.98}},
    batches=8,
)


def finetune(val_acc: float, **kwargs: Any) -> Finetune:
    return Finetune(Measurement({"val_acc": val_acc, "val_loss": 0.06}), 50, **({"changed_parameters": ()} | kwargs))


def trained(val_acc: float, **kwargs: Any) -> Finetune:
    return finetune(val_acc, **({"changed_parameters": ("w",), "learning_rates": (0.1, 0.1)} | kwargs))


def judged(reference: Any = HERE, here: Fingerprint | None = HERE, flag: str = "", **kwargs: Any) -> PipelineResult:
    """A healthy ladder but for what is given."""
    healthy: dict[str, Any] = {
        "float_model": FLOAT,
        "off": OffComparison(20),
        "batch_norm_fixed": finetune(0.98),
        "batch_norm_moving": finetune(0.979),
        "calibrated": Measurement({"val_acc": 0.97}, {"val_acc": 0.005}),
        "quantized": finetune(0.969),
        "float_finetune": trained(0.975),
        "qat": trained(0.974),
        "points": ("conv.output (int8, 3 dB)",),
        "total_steps": 1000,
    }
    return judge(Ladder(**(healthy | kwargs)), reference, here, flag=flag)


def test_cost_that_breaks_while_the_scores_hold_is_said_in_the_healthy_verdict() -> None:
    """C3: the table says that it breaks; the sentence may not say that everything holds and leave it at that."""
    overconfident = Finetune(Measurement({"val_acc": 0.974, "val_loss": 0.6}), 50, changed_parameters=("w",))
    result = judged(qat=overconfident)
    assert [(row.rung, row.metric) for row in result.rows if row.status == "breaks"] == [(6, "val_loss")]
    assert result.verdict == "healthy"
    assert "A cost rises on rung 6 (val_loss 0.06 -> 0.6), but the scores hold" in result.note
    assert "A cost rises" not in judged().note


EFFORT = ("val_seconds", "samples_per_sec", "epoch", "gpu_mem_gb", "lr")


@pytest.mark.parametrize("name", EFFORT)
@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_what_a_run_takes_is_never_judged(name: str, factor: float) -> None:
    """C3: validation also logs how long it took, and quantized it takes ten times as long: the run is healthy.

    Siblings: on every rung, and against the float run. The numbers are in the table all the same.
    """

    def with_effort(values: Measurement, effort: float) -> Measurement:
        return Measurement({**values.metrics, name: effort}, values.standard_errors)

    def after(value: Finetune, effort: float) -> Finetune:
        return dataclasses.replace(value, after=with_effort(value.after, effort))

    stages: dict[str, Any] = {"batch_norm_fixed": finetune(0.98), "batch_norm_moving": finetune(0.979)}
    stages |= {"quantized": finetune(0.969), "float_finetune": trained(0.975), "qat": trained(0.974)}
    stages = {stage: after(value, factor) for stage, value in stages.items()}
    stages["float_model"] = with_effort(FLOAT, 1.0)
    stages["calibrated"] = with_effort(Measurement({"val_acc": 0.97}, {"val_acc": 0.005}), factor)
    reference = dataclasses.replace(HERE, metrics={**HERE.metrics, name: factor})
    here = dataclasses.replace(HERE, metrics={**HERE.metrics, name: 1.0})
    result = judged(reference, here, **stages)
    assert (result.verdict, result.note) == ("healthy", judged().note)
    assert {row.status for row in result.rows if row.metric == name} == {"noted"}
    only = {
        stage: dataclasses.replace(value, after=Measurement({name: factor}))
        for stage, value in stages.items()
        if stage in ("batch_norm_fixed", "qat")
    }
    nothing = judged(None, None, **{**dict.fromkeys(stages), **only, "float_model": Measurement({name: 1.0})})
    assert nothing.verdict == "cannot tell"


def two_tasks(mae: float, name: str = "val_mae") -> Measurement:
    return Measurement({"val_acc": 0.98, "val_loss": 0.06, name: mae}, {"val_acc": 0.004, name: 0.01 * mae})


def measured(metrics: Measurement) -> Finetune:
    return Finetune(metrics, 50, changed_parameters=("w",), learning_rates=(0.1, 0.1))


@pytest.mark.parametrize(
    ("rung", "verdict"),
    [("calibrated", "quantization error"), ("qat", "quantization error"), ("float_finetune", "hyperparameters")],
)
@pytest.mark.parametrize(
    ("metric", "before", "after", "holds"),
    [
        ("val_mae", 3.6, 7.2, False),
        ("val_angle_error", 3.6, 7.2, False),
        ("test/wer", 0.3, 0.6, False),
        ("val_mae", 3.6, 3.7, True),
        ("val_error", 0.02, 0.025, True),
        ("val_depth_loss", 3.6, 7.2, True),
        ("val_mae", 0.0, 0.001, True),
    ],
)
def test_every_task_holds_its_own_tolerance(
    rung: str, verdict: str, metric: str, before: float, after: float, holds: bool
) -> None:
    """A map of -99 for what is missing doubles the error of one task, and the accuracy of the other holds.

    Siblings: errors in units, angles, error rates of another task; on every rung that is compared with the float model.
    Not meant: the loss of an overconfident classifier, and a rate that is one minus a score.
    """
    good, bad = two_tasks(before, metric), two_tasks(after, metric)
    stages: dict[str, Any] = {"float_model": good, "calibrated": good}
    stages |= {name: Finetune(good, 50) for name in ("batch_norm_fixed", "batch_norm_moving", "quantized")}
    stages |= {name: measured(good) for name in ("float_finetune", "qat")}
    stages[rung] = bad if rung == "calibrated" else measured(bad)
    if rung == "calibrated":
        stages["qat"] = measured(bad)  # training does not mend it
    result = judged(**stages)
    assert result.verdict == ("healthy" if holds else verdict), result.note
    assert holds or f"{metric} {before:.4g} -> {after:.4g}" in result.note


def test_error_that_training_improves_is_no_sign_of_a_bad_float_model() -> None:
    """Without a reference, the accuracy decides whether a few batches make the float model far better."""
    good = two_tasks(3.6)
    stages: dict[str, Any] = {"float_model": good, "calibrated": good, "qat": measured(good)}
    stages |= {name: Finetune(good, 50) for name in ("batch_norm_fixed", "batch_norm_moving", "quantized")}
    assert judged(None, None, **stages, float_finetune=measured(two_tasks(1.8))).verdict == "healthy"


@pytest.mark.parametrize(
    ("broken", "verdict", "rung"),
    [
        ({}, "healthy", None),
        ({"off": OffComparison(20, ("conv",))}, "pipeline misaligned", 1),
        ({"batch_norm_fixed": finetune(0.5)}, "pipeline misaligned", 2),
        ({"batch_norm_moving": finetune(0.5)}, "pipeline misaligned", 3),
        ({"quantized": finetune(0.5), "qat": trained(0.5)}, "quantization error", 4),
        ({"calibrated": Measurement({"val_acc": 0.3}), "qat": trained(0.5)}, "quantization error", 4),
        ({"float_finetune": trained(0.1), "qat": trained(0.1)}, "hyperparameters", 5),
        ({"float_finetune": trained(0.975, train_loss=math.nan)}, "hyperparameters", 5),
        ({"qat": trained(0.1)}, "quantization error", 6),
        ({"qat": trained(0.97, train_loss=math.inf)}, "quantization error", 6),
    ],
)
def test_first_rung_that_breaks_gives_the_verdict(broken: dict[str, Any], verdict: str, rung: int | None) -> None:
    """Design 9."""
    result = judged(**broken)
    assert (result.verdict, result.rung) == (verdict, rung), result.note
    if rung is not None:
        assert result.note.startswith(f"{verdict} (rung {rung}, ")


@given(st.sets(st.sampled_from([2, 3, 5, 6])))
def test_lowest_broken_rung_decides_whatever_breaks_above(broken: set[int]) -> None:
    """Each rung changes one thing: what breaks above follows."""
    fields = {2: "batch_norm_fixed", 3: "batch_norm_moving", 5: "float_finetune", 6: "qat"}
    make = {2: finetune, 3: finetune, 5: trained, 6: trained}
    changed: dict[str, Any] = {fields[n]: make[n](0.1) for n in broken}
    result = judged(**changed)
    assert result.rung == (min(broken) if broken else None)


def test_what_training_wins_back_is_no_collapse() -> None:
    """C6: calibration that loses the accuracy is the starting point of QAT, not its end."""
    result = judged(calibrated=Measurement({"val_acc": 0.3}), quantized=finetune(0.2))
    assert result.verdict == "healthy"
    assert "QAT wins it back" in result.note
    assert "conv.output" in result.note


def test_score_that_training_wins_back_is_not_called_a_cost() -> None:
    """C6: only the quantized model at learning rate 0 falls, and QAT mends it."""
    result = judged(quantized=finetune(0.2))
    assert result.verdict == "healthy"
    assert "A cost rises" not in result.note


def test_quantization_error_names_the_worst_points_and_the_next_step() -> None:
    """F."""
    result = judged(qat=trained(0.1))
    assert "Worst points: conv.output (int8, 3 dB)" in result.note
    assert "SensitivityAnalysis()" in result.note


@pytest.mark.parametrize(
    "broken",
    [
        {"float_model": Measurement({"val_acc": math.nan})},
        {"off": OffComparison(20, ("gradient of a",))},
        {"batch_norm_fixed": finetune(0.1)},
        {"batch_norm_fixed": finetune(0.98, changed_parameters=("w",))},
        {"batch_norm_fixed": finetune(0.98, train_loss=math.nan)},
        {"batch_norm_moving": finetune(0.1)},
        {"quantized": finetune(0.1), "qat": trained(0.1)},
        {"quantized": finetune(0.1, train_loss=math.inf), "qat": trained(0.1)},
        {"float_finetune": trained(0.1)},
        {"qat": trained(0.1)},
        {"calibrated": Measurement({"val_acc": 0.1}), "qat": trained(0.1)},
    ],
)
@pytest.mark.parametrize("reference", [HERE, {"val_acc": 0.98, "train_loss": 0.05}])
def test_the_note_is_what_is_found_and_then_what_to_do(broken: dict[str, Any], reference: Any) -> None:
    """Every sentence of a rung tells the two apart: a page shows the one and says the other in one place."""
    check_parts(judged(reference, HERE if reference is HERE else None, **broken))


def test_the_note_on_a_float_model_that_is_not_the_float_run_s_has_these_parts_too() -> None:
    check_parts(judged({"val_acc": 0.98}, None, float_model=Measurement({"val_acc": 0.6}, {"val_acc": 0.004})))


def check_parts(result: PipelineResult) -> None:
    assert result.is_bad
    lead, _, said = result.note.partition("): ")
    assert lead.startswith(f"{result.verdict} (rung {result.rung}, ")
    assert f"{said} ".startswith(f"{result.finding} {result.next_step} ")
    assert result.next_step
    verbs = "Look|Compare|Raise|Keep|Set|See|Make|Mend|Report|Quantization is not the cause|Data, labels and loss"
    assert re.match(verbs, result.next_step), result.next_step
    assert not re.search(rf"\. ({verbs}) ", result.finding), result.finding


def test_without_a_reference_labels_and_loss_may_be_to_blame() -> None:
    """Design 9: it says so, and prints the command that would tell."""
    result = judged(reference=None, here=None, float_finetune=trained(0.1))
    assert result.verdict == "cannot tell"
    assert "python -m lightning_qat fingerprint" in result.note
    own_answers = judged(reference=None, float_finetune=trained(0.1))
    assert own_answers.verdict == "hyperparameters"


def test_labels_that_the_model_contradicts_are_convicted_without_a_reference() -> None:
    """C5."""
    wrong = dataclasses.replace(HERE, agreement={"train": {"model=1": 0.1}, "validate": {"model=1": 0.98}})
    result = judged(reference=None, here=wrong, float_finetune=trained(0.1))
    assert result.verdict == "pipeline misaligned"
    assert "do labels and inputs belong together" in result.cause


def test_rising_loss_and_falling_score_are_hyperparameters_before_the_collapse() -> None:
    """C3: a paired test on the same batches; one of the two alone is no verdict."""
    flat, rising = tuple([0.1, 0.12] * 20), tuple([0.3, 0.33] * 20)
    moving = finetune(0.979, losses=flat)
    both = judged(batch_norm_moving=moving, float_finetune=trained(0.93, losses=rising))
    assert (both.verdict, both.rung) == ("hyperparameters", 5)
    assert "raises the training loss on the same batches (0.11 -> 0.315)" in both.note
    assert judged(batch_norm_moving=moving, float_finetune=trained(0.93, losses=flat)).verdict == "healthy"
    assert judged(batch_norm_moving=moving, float_finetune=trained(0.979, losses=rising)).verdict == "healthy"


def test_clipping_that_leaves_nothing_is_a_hyperparameter() -> None:
    """C3: nothing collapses, as nothing moves; small steps alone, or clipping that does no harm, are no verdict."""
    nothing = trained(0.98, gradient_kept=1e-9, step_size=1e-9)
    assert judged(float_finetune=nothing).verdict == "hyperparameters"
    assert "Raise gradient_clip_val" in judged(float_finetune=nothing).note
    assert judged(float_finetune=trained(0.98, gradient_kept=1e-9, step_size=1e-3)).verdict == "healthy"
    assert judged(float_finetune=trained(0.98, gradient_kept=1.0, step_size=1e-9)).verdict == "healthy"


def test_training_that_moves_nothing_is_no_verdict() -> None:
    result = judged(float_finetune=finetune(0.98))
    assert result.verdict == "cannot tell"


def test_flag_without_a_broken_rung_asks_for_a_longer_look() -> None:
    """C1."""
    result = judged(flag="weights oscillate")
    assert result.verdict == "cannot tell"
    assert "(weights oscillate)" in result.note
    assert "PipelineCheck(batches=500)" in result.note


def test_other_loss_of_the_same_model_is_rung_2_with_its_cause() -> None:
    """C5: smaller is as suspicious as larger."""
    for loss, words in ((0.2, "scaled by 4?"), (0.0125, "divided by 4, or a term missing"), (0.02, "a term missing")):
        here = dataclasses.replace(HERE, losses={"train_loss (batch norm in eval)": loss})
        result = judged(here=here)
        assert (result.verdict, result.rung) == ("pipeline misaligned", 2)
        assert words in result.cause


def test_same_samples_must_give_the_same_metric() -> None:
    """C5, rung 0: what other samples would change is no excuse then."""
    summary = TensorSummary("0", "float32", (1,), 8, (0.5,), (1.0,), (0.1,), (0.0,), (1.0,))
    known, same = (dataclasses.replace(HERE, data={"validate": (summary,)}) for _ in range(2))
    lower = dataclasses.replace(same, metrics={"val_acc": 0.965})
    assert judged(reference=known, here=lower).rung == 0
    other = dataclasses.replace(lower, data={"validate": (dataclasses.replace(summary, mean=(0.52,)),)})
    assert judged(reference=known, here=other).verdict == "healthy"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"agreement": {"train": {"model=1": 0.1}}}, "labels (train, 1): 10% are what the model answers (model)"),
        ({"random_evaluation": True}, "another random layer, active in evaluation?"),
        ({"swapped": ["conv"]}, "the weights of conv are replaced while validation runs"),
        ({"modes": {"train in evaluation": ["drop"]}}, "in train mode while evaluating, only here: drop"),
        ({"settings": {"gradient_clip_val": 1e-6}}, "gradients are clipped to less than a tenth"),
        ({"modes": {"eval": ["bn"]}}, "in eval mode while training, only here: bn"),
    ],
)
def test_strong_differences_are_spelled(change: dict[str, Any], words: str) -> None:
    """C5; and the float run's own habits are no difference."""
    known = dataclasses.replace(HERE, settings={"gradient_clip_val": 1.0} if "settings" in change else {})
    here = dataclasses.replace(HERE, **change)
    (row,) = compare_fingerprints(known, here).strong
    assert words in row.what
    assert compare_fingerprints(here, here).rows == ()


def test_clipping_that_the_float_run_did_without_is_not_called_less_than_a_tenth() -> None:
    """C5: a value of 1 is usual, and nothing says how long the gradients are."""
    known, here = (dataclasses.replace(HERE, settings={"gradient_clip_val": value}) for value in (None, 1.0))
    (row,) = compare_fingerprints(known, here).rows
    assert (row.suspicion, row.what) == ("possible", "settings gradient_clip_val: None -> 1.0")


def test_what_differs_alike_in_many_modules_is_one_row() -> None:
    """C5."""
    norms = {f"bn{i}": {"momentum": 0.1} for i in range(50)}
    known = dataclasses.replace(HERE, batch_norm=norms)
    here = dataclasses.replace(HERE, batch_norm={name: {"momentum": 0.01} for name in norms})
    (row,) = compare_fingerprints(known, here).rows
    assert row.what == "batch norm bn0, bn1, bn2 and 47 more: momentum 0.1 -> 0.01"
    assert compare_fingerprints(known, here).note == "one difference, which alone explains no collapse"


def test_other_numbers_of_parameter_groups_are_a_difference() -> None:
    known, here = (
        dataclasses.replace(HERE, optimizers=[{"class": "SGD", "groups": [{"lr": 0.1}] * count}]) for count in (2, 1)
    )
    (row,) = compare_fingerprints(known, here).rows
    assert row.what == "2 -> 1 optimizer groups"


def test_metric_that_alone_differs_is_computed_in_another_way() -> None:
    both = dataclasses.replace(HERE, metrics={"val_acc": 0.98, "val_loss": 0.1})
    wrong = dataclasses.replace(HERE, metrics={"val_acc": 0.1, "val_loss": 0.1})
    (row,) = compare_fingerprints(both, wrong).strong
    assert "while val_loss is the same: computed from another output" in row.what


def test_training_inputs_are_compared_with_validation_inputs() -> None:
    """C5 without a reference."""
    normal = TensorSummary("model.0", "float32", (1,), 64, (0.0,), (1.0,), (0.01,), (-0.8,), (1.8,))
    raw = dataclasses.replace(normal, mean=(4.9,), std=(6.0,), min=(0.0,), max=(16.0,))
    here = Fingerprint(model_inputs={"train": (raw,), "validate": (normal,)})
    assert "normalization missing here?" in compare_stages(here).strong[0].what
    assert compare_stages(Fingerprint(model_inputs={"train": (normal,), "validate": (normal,)})).rows == ()


def test_result_is_whole_in_json_and_fits_the_terminal(tmp_path: Path) -> None:
    here = dataclasses.replace(HERE, losses={"train_loss (batch norm in eval)": 0.2}, weights={"conv": "2e"})
    result = judged(here=here, batch_norm_moving=finetune(0.1, moved_buffers={"bn.running_mean": 0.9}))
    data = json.loads(write_json(result, tmp_path / "check.json").read_text())
    assert data["rung"] == 2
    assert data["differences"]["rows"][0]["part"] == "weights"
    for width in (80, 120):
        text = console_text(result, width)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        assert "Pipeline differences" in text


def test_float_model_that_a_few_batches_improve_is_not_called_healthy() -> None:
    """C5: without a reference nothing else shows that weights or preprocessing are not those of the float run."""
    bad = {"float_model": Measurement({"val_acc": 0.24}, {"val_acc": 0.02}), "calibrated": None, "quantized": None}
    kept = {"batch_norm_fixed": finetune(0.24), "batch_norm_moving": finetune(0.24)}
    better = {"float_finetune": trained(0.9), "qat": trained(0.9)}
    result = judged(None, None, **(bad | kept | better))
    assert result.verdict == "cannot tell"
    assert "val_acc 0.24 -> 0.9" in result.note
    assert "init_from" in result.note
    assert judged(None, None, **(bad | kept | {"float_finetune": trained(0.25), "qat": trained(0.25)})).verdict == (
        "healthy"
    )
    known = judged({"val_acc": 0.24}, None, **(bad | kept | better))  # the float run was no better
    assert known.verdict == "healthy"


def test_averaged_weights_that_are_as_good_are_not_called_another_checkpoint() -> None:
    """Number ten: the fingerprint has the weights of training, the checkpoint their average; or of another epoch."""
    other = {"weights": {"conv": "2e"}}
    known = dataclasses.replace(HERE, standard_errors={"val_acc": 0.001})
    averaged, bad, unknown = (
        dataclasses.replace(known, metrics=metrics, **other) for metrics in ({"val_acc": 0.985}, {"val_acc": 0.8}, {})
    )
    (row,) = (row for row in compare_fingerprints(known, averaged).rows if row.part == "weights")
    assert (row.suspicion, "an average of the weights (EMA)" in row.what) == ("possible", True)
    assert "suspicious difference" not in judged(known, averaged).note
    for here in (bad, unknown):
        (row,) = (row for row in compare_fingerprints(known, here).rows if row.part == "weights")
        assert (row.suspicion, "another checkpoint?" in row.what) == ("strong", True)


def test_what_the_short_check_does_not_win_back_is_called_that() -> None:
    """A run trains longer than the check: its accuracy may be far better than what the check's steps reach."""
    result = judged(calibrated=Measurement({"val_acc": 0.3}), qat=trained(0.5))
    assert result.note.startswith("quantization error (rung 4, calibrated)")  # the rows that break are called so
    assert "50 batches of QAT's own training" in result.note
    assert "in this short check do not win it back (val_acc 0.98 -> 0.5)" in result.note
