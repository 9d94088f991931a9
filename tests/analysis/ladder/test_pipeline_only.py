"""The verdicts of ZeroLRFinetune and FloatFinetune, which judge some rungs, from planted numbers (C3, C4, C6)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from lightning_qat.analysis.ladder.measurements import Finetune, Ladder, Measurement
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.rows import PipelineRow
from lightning_qat.analysis.ladder.rungs import FLOAT_FINETUNE, FLOAT_MODEL, ZERO_LR_RUNGS, Verdict
from lightning_qat.analysis.ladder.verdict import judge
from lightning_qat.reporting.console import console_text

FLOAT = Measurement({"val_acc": 0.98, "val_loss": 0.06}, {"val_acc": 0.004, "val_loss": 0.02})
CALIBRATED = Measurement({"val_acc": 0.97, "val_loss": 0.07}, {"val_acc": 0.005, "val_loss": 0.02})
DRIFT = {"bn1.running_mean": 0.93, "bn1.running_var": 0.4}


def finetune(val_acc: float, val_loss: float = 0.06, **kwargs: Any) -> Finetune:
    return Finetune(Measurement({"val_acc": val_acc, "val_loss": val_loss}), 50, **kwargs)


def judge_zero_lr(ladder: Ladder, reference: Any = None) -> PipelineResult:
    """As ZeroLRFinetune judges."""
    return judge(ladder, reference, rungs=(FLOAT_MODEL, *ZERO_LR_RUNGS), pipeline_only=True)


def judge_float_finetune(
    float_model: Measurement, finetune: Finetune, zero_lr: Verdict | None = None
) -> PipelineResult:
    """As FloatFinetune judges."""
    ladder = Ladder(float_model, float_finetune=finetune)
    return judge(ladder, rungs=(FLOAT_FINETUNE,), pipeline_only=True, zero_lr=zero_lr)


def zero_lr(reference: Any = {"val_acc": 0.981}, **kwargs: Any) -> PipelineResult:  # noqa: B006
    """A healthy pipeline but for what is given."""
    healthy: dict[str, Any] = {
        "float_model": FLOAT,
        "batch_norm_fixed": finetune(0.98),
        "batch_norm_moving": finetune(0.979, moved_buffers={"bn1.running_mean": 0.04}),
        "calibrated": CALIBRATED,
        "quantized": finetune(0.969),
    }
    return judge_zero_lr(Ladder(**(healthy | kwargs)), reference)


def row(result: PipelineResult, rung: int, metric: str) -> PipelineRow:
    return next(r for r in result.rows if r.rung == rung and r.metric == metric)


def test_everything_holds_is_healthy_and_says_what_to_run_next() -> None:
    """C4."""
    result = zero_lr()
    assert result.verdict == "healthy"
    assert not result.is_bad
    assert "FloatFinetune() tests the hyperparameters" in result.note
    assert "reference" not in result.note


def test_tolerance_is_three_standard_errors() -> None:
    """C4: from the noise of the evaluation, not from a constant."""
    assert row(zero_lr(), 2, "val_acc").tolerance == pytest.approx(3 * 0.004)
    just = zero_lr(batch_norm_fixed=finetune(0.98 - 0.0119))
    beyond = zero_lr(batch_norm_fixed=finetune(0.98 - 0.0121))
    assert (row(just, 2, "val_acc").status, row(beyond, 2, "val_acc").status) == ("holds", "breaks")
    assert row(zero_lr(), 4, "val_acc").tolerance == pytest.approx(3 * 0.005)  # of the calibrated model


def test_float_model_that_misses_its_reference_convicts_checkpoint_or_evaluation() -> None:
    """C4, rung 0."""
    result = zero_lr(reference={"val_acc": 0.999})
    assert result.verdict == "pipeline misaligned"
    assert "val_acc 0.999 -> 0.98" in result.note
    assert "init_from" in result.note


def test_fall_without_anything_moving_is_a_side_effect() -> None:
    """C4, rung 2."""
    result = zero_lr(batch_norm_fixed=finetune(0.5, moved_buffers={"memory": 0.5}))
    assert result.verdict == "pipeline misaligned"
    assert "side effect" in result.note
    assert "memory" in result.note


def test_batch_norm_that_collapses_accuracy_convicts_the_training_data() -> None:
    """C4, rung 3: the source's misaligned pipeline."""
    result = zero_lr(batch_norm_moving=finetune(0.12, moved_buffers=DRIFT), quantized=finetune(0.11))
    assert result.verdict == "pipeline misaligned"
    for words in ("training data do not look like the evaluation data", "bn1.running_mean by 93%", "0.98 -> 0.12"):
        assert words in result.note
    assert "do not tune learning rate or weight decay" in result.note  # C2
    assert row(result, 3, "BN statistics").value == 0.93


def test_small_fall_of_batch_norm_is_said_and_is_no_collapse() -> None:
    """C6: a fall of 4 % does not explain an accuracy of 0."""
    result = zero_lr(batch_norm_moving=finetune(0.94))
    assert row(result, 3, "val_acc").status == "falls"
    assert result.verdict == "healthy"
    assert "nearly as good" in result.note
    assert "val_acc 0.98 -> 0.94" in result.note


def test_calibrated_model_that_collapses_alone_convicts_the_scales() -> None:
    """C4, rung 4: quantization is part of it, so the verdict must not say that it is innocent."""
    result = zero_lr(quantized=finetune(0.2, moved_scales={"conv.output": 3.0}))
    assert result.verdict == "scales drift"
    assert "conv.output by 300%" in result.note
    assert "activation_scales: fixed" in result.note
    assert "Quantization is not the cause" not in result.note
    still = zero_lr(quantized=finetune(0.2))
    assert "freeze_batch_norm_after: 0" in still.note


def test_first_broken_rung_gives_the_verdict() -> None:
    """Each rung changes one thing: what breaks later follows from it."""
    result = zero_lr(batch_norm_moving=finetune(0.1, moved_buffers=DRIFT), quantized=finetune(0.1))
    assert result.verdict == "pipeline misaligned"
    assert row(result, 4, "val_acc").status == "breaks"


@pytest.mark.parametrize(
    ("by_optimizer", "words"), [((), "something other than the optimizer"), (("w",), "the optimizer's own step")]
)
def test_changed_weights_are_named_with_who_changed_them(by_optimizer: tuple[str, ...], words: str) -> None:
    """C4: weights cannot change at learning rate 0."""
    changed = finetune(0.98, changed_parameters=("w", "x", "y", "z"), changed_by_optimizer=by_optimizer)
    result = zero_lr(batch_norm_fixed=changed)
    assert result.verdict == "pipeline misaligned"
    assert "w, x, y and 1 more" in result.note
    assert words in result.note


def test_nan_after_finetune_breaks() -> None:
    """C1."""
    result = zero_lr(batch_norm_moving=finetune(math.nan, math.nan, moved_buffers=DRIFT))
    assert result.verdict == "pipeline misaligned"
    assert "nan" in result.note


def test_nan_training_loss_is_not_blamed_on_the_weights_it_destroys() -> None:
    """C1: 0 * nan is nan, so Adam moves weights at learning rate 0."""
    result = zero_lr(batch_norm_fixed=finetune(math.nan, train_loss=math.nan, changed_parameters=("w",)))
    assert "training loss of the untouched float model is nan" in result.note
    quantized = zero_lr(quantized=finetune(math.nan, train_loss=math.inf))
    assert quantized.verdict == "scales drift"
    assert "finite in float" in quantized.note


def test_float_model_that_is_nan_to_begin_with_convicts_checkpoint_or_data() -> None:
    """C1."""
    broken = Measurement({"val_acc": math.nan})
    result = judge_zero_lr(Ladder(broken, batch_norm_fixed=Finetune(broken, 5)))
    assert result.verdict == "pipeline misaligned"
    assert "evaluates to nan or inf before any training" in result.note


def test_without_reference_it_says_what_it_cannot_tell_and_how_to_get_one() -> None:
    """Design 9: rung 0 cannot convict without a reference."""
    result = zero_lr(reference=None)
    assert result.verdict == "healthy"
    assert "cannot be told without a reference" in result.note
    assert "ZeroLRFinetune(reference={'val_acc': ...})" in result.note
    assert row(result, 0, "val_acc").status == "noted"


def test_reference_that_is_not_logged_is_named_with_what_is() -> None:
    result = zero_lr(reference={"accuracy": 0.98})
    assert row(result, 0, "accuracy").status == "cannot tell"
    assert "it logs val_acc, val_loss, not accuracy" in result.note


def test_training_loss_is_judged_against_that_of_the_float_run() -> None:
    """C4: all there is to see for a model without batch norm whose training data are wrong."""
    wrong = zero_lr(
        batch_norm_fixed=finetune(0.98, train_loss=3.2, train_loss_error=0.1), reference={"train_loss": 0.05}
    )
    assert wrong.verdict == "pipeline misaligned"
    assert "training loss of 3.2 here and had 0.05 in the float run" in wrong.note
    noisy = zero_lr(
        batch_norm_fixed=finetune(0.98, train_loss=0.09, train_loss_error=0.01), reference={"train_loss": 0.05}
    )
    assert noisy.verdict == "healthy"
    assert row(zero_lr(batch_norm_fixed=finetune(0.98, train_loss=3.2)), 2, "train_loss").status == "noted"


def test_cost_may_rise_while_the_score_holds() -> None:
    """An overconfident classifier is not a collapse; a model that logs only costs is judged by them."""
    assert zero_lr(batch_norm_moving=finetune(0.98, val_loss=5.0)).verdict == "healthy"
    cost = Measurement({"val_loss": 0.06}, {"val_loss": 0.001})
    risen = Finetune(Measurement({"val_loss": 5.0}), 5, moved_buffers=DRIFT)
    result = judge_zero_lr(Ladder(cost, batch_norm_fixed=Finetune(cost, 5), batch_norm_moving=risen))
    assert result.verdict == "pipeline misaligned"


def test_without_noise_estimate_a_tenth_is_tolerated() -> None:
    """One batch, a metric of the whole epoch (mAP), batches that all agree: one image more or less is no verdict."""
    before = Measurement({"mAP": 0.5})
    near, far = (Finetune(Measurement({"mAP": value}), 5, moved_buffers=DRIFT) for value in (0.46, 0.44))
    fixed = Finetune(before, 5)
    assert judge_zero_lr(Ladder(before, None, fixed, near)).verdict == "healthy"
    assert judge_zero_lr(Ladder(before, None, fixed, far)).verdict == "pipeline misaligned"
    perfect = Measurement({"val_acc": 1.0}, {"val_acc": 0.0})
    almost = Finetune(Measurement({"val_acc": 0.997}), 5)
    assert judge_zero_lr(Ladder(perfect, None, Finetune(perfect, 5), almost)).verdict == "healthy"


def test_nothing_logged_is_no_verdict() -> None:
    nothing = Measurement({})
    result = judge_zero_lr(Ladder(nothing, batch_norm_fixed=Finetune(nothing, 5)))
    assert result.verdict == "cannot tell"
    assert "self.log('val_acc', ...)" in result.note
    assert judge_float_finetune(nothing, Finetune(nothing, 5, changed_parameters=("w",))).verdict == "cannot tell"


def test_missing_rungs_are_rows_that_say_why() -> None:
    result = zero_lr(batch_norm_moving=None, calibrated=None, quantized=None)
    notes = {r.rung: r.note for r in result.rows if r.status == "cannot tell"}
    assert notes == {3: "no batch norm moves in this training", 4: "no calibrated scales"}
    assert result.verdict == "healthy"


def test_calibration_that_lost_the_accuracy_points_to_sensitivity() -> None:
    """C6: the pipeline holds, so it is quantization error: section B."""
    bad = Measurement({"val_acc": 0.3, "val_loss": 2.0}, {"val_acc": 0.02})
    result = zero_lr(calibrated=bad, quantized=finetune(0.3))
    assert result.verdict == "healthy"
    assert "val_acc 0.98 -> 0.3" in result.note
    assert "SensitivityAnalysis()" in result.note


@pytest.mark.parametrize(
    ("zero", "verdict", "words"),
    [
        (None, "pipeline or hyperparameters", "ZeroLRFinetune(), listed before FloatFinetune(), tells"),
        ("healthy", "hyperparameters", "lower the learning rate"),
        ("pipeline misaligned", "pipeline misaligned", "fix what it names first"),
        ("cannot tell", "pipeline or hyperparameters", "ZeroLRFinetune(), listed"),
    ],
)
def test_float_finetune_that_collapses(zero: Any, verdict: str, words: str) -> None:
    """C3, C6."""
    result = judge_float_finetune(
        FLOAT, finetune(0.1, changed_parameters=("w",), learning_rates=(0.1, 0.1)), zero_lr=zero
    )
    assert result.verdict == verdict
    assert result.is_bad
    assert "val_acc 0.98 -> 0.1" in result.note
    assert "quantization is not the cause" in result.note
    assert "(lr 0.1)" in result.note
    assert words in result.note


def test_float_finetune_that_holds_points_to_quantization() -> None:
    """C3, C6."""
    result = judge_float_finetune(FLOAT, finetune(0.975, changed_parameters=("w",), learning_rates=(1e-4, 4e-4)))
    assert result.verdict == "healthy"
    assert "it is quantization error: raise the points that SensitivityAnalysis() puts first" in result.note
    assert "(lr 0.0001 to 0.0004)" in result.note


def test_float_finetune_that_falls_a_little_is_no_collapse() -> None:
    """C3: training moves the weights, so a few percent are no verdict on a large evaluation set."""
    result = judge_float_finetune(FLOAT, finetune(0.93, changed_parameters=("w",)))
    assert result.verdict == "healthy"
    assert "val_acc 0.98 -> 0.93" in result.note


def test_float_finetune_with_nan_loss_collapses() -> None:
    """C1."""
    assert judge_float_finetune(FLOAT, finetune(0.98, train_loss=math.inf)).verdict == "pipeline or hyperparameters"


def test_float_finetune_that_trained_nothing_is_no_verdict() -> None:
    """C3: a warm-up from 0, for example."""
    result = judge_float_finetune(FLOAT, finetune(0.98, learning_rates=(0.0, 0.0)))
    assert result.verdict == "cannot tell"
    assert "FloatFinetune(batches=...)" in result.note


def test_float_finetune_that_clipping_holds_still_is_a_hyperparameter() -> None:
    """C3: the same evidence as that of PipelineCheck."""
    still = finetune(0.98, changed_parameters=("w",), gradient_kept=1e-9, step_size=1e-9)
    result = judge_float_finetune(FLOAT, still)
    assert (result.verdict, result.rung) == ("hyperparameters", FLOAT_FINETUNE)
    assert "Raise gradient_clip_val" in result.note


def test_rung_that_could_not_be_measured_gives_its_reason() -> None:
    result = judge(Ladder(FLOAT, missing={FLOAT_FINETUNE: "it optimizes manually"}), rungs=(FLOAT_FINETUNE,))
    assert (result.verdict, result.note) == ("cannot tell", "cannot tell: it optimizes manually")
    assert [row.note for row in result.rows] == ["it optimizes manually"]


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_and_cuts_nothing(width: int) -> None:
    result = zero_lr(reference=None)
    text = console_text(result, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for words in ("3 lr 0, BN moving", "BN statistics", "0.9790", "tolerance"):
        assert words.rstrip("0") in text


def test_results_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        zero_lr().note = ""  # type: ignore[misc]
