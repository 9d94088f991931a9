"""What the rungs of the pipeline ladder show, whoever judges them: rows, and what is found on each (C3, C4)."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_qat.analysis.ladder.measurements import (
    TRAIN_LOSS,
    Finetune,
    Measurement,
    PipelineRow,
    breaks,
    compare,
    drift_row,
    judged,
    skipped_row,
    spelled,
    train_loss_row,
)
from lightning_qat.analysis.ladder.sentences import (
    NOT_QUANTIZATION,
    QUANTIZED_LOSS,
    TRAINING_LOSS,
    Sentence,
    batch_norm,
    moved_weights,
    other_loss,
    scales,
    side_effect,
)

Verdict = Literal[
    "healthy",
    "pipeline misaligned",
    "scales drift",
    "quantization error",
    "hyperparameters",
    "pipeline or hyperparameters",
    "cannot tell",
]


NO_METRIC = (
    "the evaluation logs no finite number to judge by. Log one in validation_step, self.log('val_acc', ...), and give "
    "it batches (limit_val_batches)."
)


@dataclass(frozen=True)
class Finding:
    """A rung that breaks.

    Args:
        rung: its number.
        verdict: what is to blame.
        text: why, and what to do.
    """

    rung: int
    verdict: Verdict
    text: str


def float_model_evidence(
    float_model: Measurement, reference: Mapping[str, float]
) -> tuple[list[PipelineRow], list[Finding]]:
    """Return the rows of rung 0 and what is found: does the float model have its own accuracy here?

    Args:
        float_model: fake-quant off, before.
        reference: metrics of the float run; ``train_loss`` is left for rung 2.
    """
    logged = float_model.metrics
    expected = {name: value for name, value in reference.items() if name != TRAIN_LOSS or name in logged}
    rows = compare(0, "float model", expected, float_model, float_model, strict=True)
    for name in (name for name in logged if name not in expected):
        rows.append(PipelineRow(0, "float model", name, None, logged[name], None, "noted", "no reference"))
    if breaks(rows):
        text = (
            f"the float model does not reproduce its own accuracy here ({spelled(judged(rows))}), before any training "
            "and with fake-quant off: another checkpoint (init_from), other evaluation data or preprocessing, or "
            "another metric. Quantization is not the cause; fix this first."
        )
        return rows, [Finding(0, "pipeline misaligned", text)]
    if logged and not any(map(math.isfinite, logged.values())):
        text = (
            "the float model evaluates to nan or inf before any training and with fake-quant off: look at the "
            "checkpoint (init_from) and the evaluation data. Quantization is not the cause."
        )
        return rows, [Finding(0, "pipeline misaligned", text)]
    return rows, []


def zero_lr_evidence(
    float_model: Measurement,
    batch_norm_frozen: Finetune | None,
    batch_norm_moving: Finetune | None,
    calibrated: Measurement | None = None,
    quantized: Finetune | None = None,
    reference: Mapping[str, float] | None = None,
    rungs: Container[int] = (2, 3, 4),
) -> tuple[list[PipelineRow], list[Finding]]:
    """Return the rows of the rungs with learning rate 0 and what is found; arguments as for :func:`judge_zero_lr`.

    Args:
        float_model: fake-quant off, before.
        batch_norm_frozen: rung 2.
        batch_norm_moving: rung 3.
        calibrated: what rung 4 starts from.
        quantized: rung 4.
        reference: ``train_loss`` of the float run, if known.
        rungs: those asked for.
    """
    rows: list[PipelineRow] = []
    findings: list[Finding] = []
    every: tuple[tuple[int, str, Measurement | None, Finetune | None, str, Sentence], ...] = (
        (2, "lr 0, BN fixed", float_model, batch_norm_frozen, "", side_effect),
        (3, "lr 0, BN moving", float_model, batch_norm_moving, "no batch norm moves in this training", batch_norm),
        (4, "lr 0, quantized", calibrated, quantized, "no calibrated scales", scales),
    )
    for number, what, before, finetune, missing, sentence in every:
        if number not in rungs:
            continue
        if before is None or finetune is None:
            rows.append(skipped_row(number, what, missing))
            continue
        rung = compare(number, what, before.metrics, finetune.after, before, strict=number == 2)
        known_loss = (reference or {}).get(TRAIN_LOSS) if number == 2 else None
        rung += train_loss_row(number, what, finetune, known_loss)
        rung += drift_row(number, what, "BN statistics", finetune.moved_buffers)
        rung += drift_row(number, what, "scales", finetune.moved_scales)
        rows += rung
        findings += _judge_rung(number, rung, finetune, sentence)
    return rows, findings


def float_finetune_evidence(float_model: Measurement, finetune: Finetune) -> tuple[list[PipelineRow], str]:
    """Return the rows of rung 5, and the collapse in words, if it is one."""
    what = "float finetune"
    rung = compare(5, what, float_model.metrics, finetune.after, float_model)
    rung += train_loss_row(5, what, finetune)
    rung += drift_row(5, what, "BN statistics", finetune.moved_buffers)
    if breaks(rung):
        return rung, spelled(judged(rung))
    exploded = finetune.train_loss is not None and not math.isfinite(finetune.train_loss)
    return rung, f"training loss {finetune.train_loss}" if exploded else ""


def spelled_training(finetune: Finetune) -> str:
    """Spell how a copy was trained, with the learning rates."""
    return f"{finetune.batches} batches of QAT's own training{_at_rates(finetune)}"


def nothing_moved(finetune: Finetune) -> str:
    """Say that training changed no weight."""
    return (
        f"{spelled_training(finetune)} changed no weight at all: a warm-up that starts at 0, a step without loss, or "
        "nothing to optimize. Write FloatFinetune(batches=...) with more batches than the warm-up has."
    )


def _judge_rung(number: int, rung: Sequence[PipelineRow], finetune: Finetune, sentence: Sentence) -> list[Finding]:
    quantized = number == 4
    loss = finetune.train_loss
    if loss is not None and not math.isfinite(loss):
        if quantized:
            return [Finding(number, "scales drift", QUANTIZED_LOSS.format(loss=loss))]
        return [Finding(number, "pipeline misaligned", TRAINING_LOSS.format(loss=loss) + NOT_QUANTIZATION)]
    if finetune.changed_parameters:
        return [Finding(number, "pipeline misaligned", moved_weights(finetune) + NOT_QUANTIZATION)]
    if breaks(rung):
        text = sentence(rung, finetune)
        if quantized:
            return [Finding(number, "scales drift", text)]
        return [Finding(number, "pipeline misaligned", text + NOT_QUANTIZATION)]
    known = next((row for row in rung if row.metric == TRAIN_LOSS and row.status == "breaks"), None)
    if known is not None:
        return [Finding(number, "pipeline misaligned", other_loss(known.value, known.expected) + NOT_QUANTIZATION)]
    return []


def _at_rates(finetune: Finetune) -> str:
    if finetune.learning_rates is None:
        return ""
    low, high = finetune.learning_rates
    return f" (lr {high:.3g})" if low == high else f" (lr {low:.3g} to {high:.3g})"
