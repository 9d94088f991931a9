"""A ladder on which nothing breaks is not healthy against its own evidence (C5, C6)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.fingerprint.tensor_summary import TensorSummary
from lightning_qat.analysis.ladder.measurements import Measurement
from tests.analysis.ladder.test_verdict import HERE, finetune, judged, trained

PAIR = "model=1"
GUESS = {"train": {PAIR: 0.12}, "validate": {PAIR: 0.12}}


def answering(train: float, validate: float, **kwargs: Any) -> Fingerprint:
    shares = {"train": {PAIR: train}, "validate": {PAIR: validate}}
    return dataclasses.replace(HERE, **({"agreement": shares, "constant_guess": GUESS} | kwargs))


def test_labels_at_chance_convict_the_training_data_though_no_rung_breaks() -> None:
    """With few batches and a small learning rate, shuffled labels break no rung; the answers still convict them."""
    result = judged(None, answering(0.09, 0.87))
    assert (result.verdict, result.rung) == ("pipeline misaligned", None)
    assert "labels (train, 1): 9% are what the model answers (model), in validation 87%" in result.cause
    assert result.cause[:-1] in result.note
    assert result.is_bad


def test_labels_that_hardly_agree_leave_the_verdict_open() -> None:
    """Above chance, other causes are possible: labels of a part of the data, a strong augmentation."""
    result = judged(None, answering(0.35, 0.87))
    assert result.verdict == "cannot tell"
    assert "35% are what the model answers" in result.note
    unknown = dataclasses.replace(answering(0.09, 0.87), constant_guess={})
    assert judged(None, unknown).verdict == "cannot tell"


@pytest.mark.parametrize("share", [0.6, 0.75, 0.85, 1.0])
def test_augmented_or_mixed_training_data_are_healthy(share: float) -> None:
    """Mixed samples and augmentations cost agreement in every healthy run."""
    assert judged(None, answering(share, 0.87)).verdict == "healthy"


def test_agreement_that_the_float_run_had_as_well_is_no_evidence() -> None:
    """With its fingerprint, the float run is what training is compared with."""
    both = answering(0.09, 0.87)
    assert judged(both, both).verdict == "healthy"
    assert judged(answering(0.86, 0.87), both).verdict == "pipeline misaligned"


@pytest.mark.parametrize("guess", [0.12, 0.9, 0.98])
def test_float_model_at_chance_is_not_called_healthy(guess: float) -> None:
    """Another seed, a checkpoint that was not loaded: nothing can break that was not there; frequent labels too."""
    chance = {"val_acc": guess}
    kept = finetune(guess), trained(guess)
    measured = {"batch_norm_fixed": kept[0], "batch_norm_moving": kept[0], "quantized": kept[0], "qat": kept[1]}
    measured |= {"float_model": Measurement(chance, {"val_acc": 0.02}), "calibrated": Measurement(chance)}
    guesses = {stage: {PAIR: guess} for stage in ("train", "validate")}
    here = answering(guess, guess - 0.01, constant_guess=guesses, metrics=chance)
    result = judged(None, here, **measured, float_finetune=kept[1])
    assert result.verdict == "cannot tell"
    assert "no better than a constant guess" in result.note
    assert "init_from" in result.note
    assert judged(chance, here, **measured, float_finetune=kept[1]).verdict == "healthy"  # the float run was no better


def test_answers_that_are_read_in_another_way_are_no_guess() -> None:
    """A logged score says that the model is good: its largest output is not its answer."""
    assert judged(None, answering(0.1, 0.1)).verdict == "healthy"
    good = {PAIR: 0.995}
    frequent = {stage: {PAIR: 0.98} for stage in ("train", "validate")}
    assert judged(None, answering(0.995, good[PAIR], constant_guess=frequent)).verdict == "healthy"


def test_inputs_that_differ_strongly_are_open_only_where_nothing_speaks_for_them() -> None:
    """Without labels and without batch norm nothing would break; either of the two says that the inputs are right."""
    normal = TensorSummary("model.0", "float32", (1,), 64, (0.0,), (1.0,), (0.01,), (-0.8,), (1.8,))
    raw = dataclasses.replace(normal, mean=(4.9,), std=(6.0,), min=(0.0,), max=(16.0,))
    inputs = {"train": (raw,), "validate": (normal,)}
    blind = dataclasses.replace(HERE, model_inputs=inputs, agreement={})
    result = judged(None, blind, batch_norm_moving=None)
    assert result.verdict == "cannot tell"
    assert "normalization missing here?" in result.note
    assert judged(None, blind).verdict == "healthy"
    assert judged(None, dataclasses.replace(HERE, model_inputs=inputs), batch_norm_moving=None).verdict == "healthy"


def test_few_samples_are_no_evidence_against_labels() -> None:
    """Of 16 samples, 31 % are not more than 12 % of 32."""
    labels = TensorSummary("1", "int64", (), 16, (4.5,), (2.9,), (0.7,), (0.0,), (9.0,), labels={"0": 8, "1": 8})
    data = {"validate": (labels,), "train": (dataclasses.replace(labels, samples=32),)}
    few: dict[str, Any] = {"data": data, "agreement": {"train": {PAIR: 0.12}, "validate": {PAIR: 0.31}}}
    assert judged(None, answering(0.12, 0.31, **few)).verdict == "healthy"


def test_labels_at_chance_are_not_the_cause_where_the_input_is_destroyed() -> None:
    """Answers to another input fit no label: the input is the cause, and the pipeline is convicted all the same."""
    normal = TensorSummary("model.0", "float32", (1,), 64, (0.0,), (1.0,), (0.01,), (-0.8,), (1.8,))
    raw = dataclasses.replace(normal, mean=(4.9,), std=(6.0,), min=(0.0,), max=(16.0,))
    result = judged(None, answering(0.09, 0.87, model_inputs={"train": (raw,), "validate": (normal,)}))
    assert result.verdict == "pipeline misaligned"
    assert "normalization missing here?" in result.cause
    assert [row.part for row in result.stages.strong] == ["model input (validation -> train)"]
