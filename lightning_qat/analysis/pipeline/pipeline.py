"""Is the training pipeline to blame, or quantization? Rungs of a ladder, each changing one thing (C3, C4, C6).

Pure: numbers measured by somebody else in, evidence and a verdict out.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from rich.table import Table

from lightning_qat.analysis.metric_direction import is_worse_when_larger
from lightning_qat.analysis.pipeline.pipeline_rows import (
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
from lightning_qat.analysis.pipeline.pipeline_sentences import (
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
from lightning_qat.analysis.results import Result, rich_table

Verdict = Literal[
    "healthy",
    "pipeline misaligned",
    "scales drift",
    "quantization error",
    "hyperparameters",
    "pipeline or hyperparameters",
    "cannot tell",
]


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


@dataclass(frozen=True)
class PipelineResult(Result[PipelineRow]):
    """Evidence and verdict.

    Args:
        verdict: what is to blame.
        note: the verdict as a sentence, with the next step.
    """

    verdict: Verdict = "cannot tell"
    note: str = ""
    title: ClassVar[str] = "Pipeline check"
    shown: ClassVar[tuple[str, ...]] = ("rung", "what", "metric", "expected", "value", "tolerance", "status", "note")

    def __rich__(self) -> Table:
        """What a rung does is said once, and the notes are left to the files: this fits into 80 columns."""
        rows = self.to_dicts()
        for before, row in zip([None, *self.rows], rows, strict=False):
            repeated = before is not None and (before.rung, before.what) == (row["rung"], row["what"])
            row["rung"] = "" if repeated else f"{row['rung']} {row['what']}"
            row["metric"] = row["metric"] or row["note"]
        return rich_table(self.title, ("rung", "metric", "expected", "value", "tolerance", "status"), rows)

    @property
    def is_bad(self) -> bool:
        """Whether something was found that has to be fixed before training makes sense."""
        return self.verdict not in ("healthy", "cannot tell")


def judge_zero_lr(
    float_model: Measurement,
    batch_norm_frozen: Finetune,
    batch_norm_moving: Finetune | None,
    calibrated: Measurement | None = None,
    quantized: Finetune | None = None,
    reference: Mapping[str, float] | None = None,
) -> PipelineResult:
    """Judge the finetune with learning rate 0 (rungs 0 and 2 to 4): weights cannot change, so nothing may collapse.

    Args:
        float_model: fake-quant off, before.
        batch_norm_frozen: fake-quant off, lr 0, batch norm in eval mode.
        batch_norm_moving: fake-quant off, lr 0, batch norm as in training; None if none moves in training.
        calibrated: quantized, before; None if there are no scales.
        quantized: quantized, lr 0, as in QAT.
        reference: the float metrics of the float training run, if known; ``train_loss`` is its last training loss.
    """
    rows, findings = float_model_evidence(float_model, reference or {})
    more = zero_lr_evidence(float_model, batch_norm_frozen, batch_norm_moving, calibrated, quantized, reference)
    rows, findings = [*rows, *more[0]], [*findings, *more[1]]
    if findings:
        verdict, text = findings[0].verdict, findings[0].text
        return PipelineResult(tuple(rows), verdict, f"{verdict}: {text}")
    if not judged([row for row in rows if row.rung == 2]):
        return PipelineResult(tuple(rows), "cannot tell", f"cannot tell: {NO_METRIC}")
    return PipelineResult(tuple(rows), "healthy", _healthy(rows, float_model, calibrated, reference))


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


def judge_float_finetune(
    float_model: Measurement, finetune: Finetune, zero_lr: Verdict | None = None
) -> PipelineResult:
    """Judge the float finetune (rung 5): QAT's pipeline and hyperparameters, without fake-quant.

    Args:
        float_model: fake-quant off, before.
        finetune: fake-quant off, trained as QAT would.
        zero_lr: the verdict of the finetune with learning rate 0, if it ran: it tells the pipeline from the
            hyperparameters.
    """
    rung, detail = float_finetune_evidence(float_model, finetune)
    rows = tuple(rung)
    trained = spelled_training(finetune)
    if detail:
        verdict, advice = _blame(zero_lr)
        note = (
            f"{verdict}: the float model collapses too ({detail}) in {trained}, so quantization is not the cause. "
            f"{advice}"
        )
        return PipelineResult(rows, verdict, note)
    if not finetune.changed_parameters:
        return PipelineResult(rows, "cannot tell", f"cannot tell: {nothing_moved(finetune)}")
    if not judged(rung):
        return PipelineResult(rows, "cannot tell", f"cannot tell: {NO_METRIC}")
    small = [row for row in judged(rung) if row.status == "falls"]
    remark = f" It did fall a little ({spelled(small)}): so much is not quantization's doing." if small else ""
    note = (
        f"healthy: the float model is {'nearly ' if small else ''}as good as before after {trained}.{remark} If QAT "
        "collapses in as many batches, it is quantization error: list SensitivityAnalysis() and raise its first points "
        "to int16 with overrides. If it collapses later, give more batches here."
    )
    return PipelineResult(rows, "healthy", note)


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


def cannot_tell(reason: str) -> PipelineResult:
    """Return a verdict without evidence: the check could not run."""
    return PipelineResult((), "cannot tell", f"cannot tell: {reason}")


NO_METRIC = (
    "the evaluation logs no finite number to judge by. Log one in validation_step, self.log('val_acc', ...), and give "
    "it batches (limit_val_batches)."
)


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


def _healthy(
    rows: Sequence[PipelineRow],
    float_model: Measurement,
    calibrated: Measurement | None,
    reference: Mapping[str, float] | None,
) -> str:
    small = [row for row in judged([row for row in rows if row.rung >= 3]) if row.status == "falls"]
    parts = [
        f"healthy: with learning rate 0 the model stays {'nearly ' if small else ''}as good as it was: the training "
        "code alone does not destroy it."
    ]
    if small:
        parts.append(
            f"It does fall a little on rung {small[0].rung} ({spelled(small)}): so much of a loss in QAT is not the "
            "learning rate's; freeze_batch_norm_after: 0 may avoid it."
        )
    lost = compare(4, "", float_model.metrics, calibrated, float_model) if calibrated is not None else []
    if breaks(lost):
        parts.append(
            f"Calibration alone has lost the accuracy ({spelled(judged(lost))}), and that is quantization error: list "
            "SensitivityAnalysis() and raise its first points to int16 with overrides before you train."
        )
    else:
        parts.append("If QAT still collapses, list FloatFinetune() to test the hyperparameters.")
    if not any(row.rung == 0 and row.status == "holds" for row in rows):
        given = f" (it logs {', '.join(float_model.metrics)}, not {', '.join(reference)})" if reference else ""
        name = next((n for n in float_model.metrics if not is_worse_when_larger(n)), next(iter(float_model.metrics)))
        parts.append(
            "Whether the float accuracy itself is right cannot be told without a reference"
            f"{given}: run `validate` in the float project on the float checkpoint, and give what it prints: "
            f"ZeroLRFinetune(reference={{{name!r}: ...}})."
        )
    return " ".join(parts)


def _blame(zero_lr: Verdict | None) -> tuple[Verdict, str]:
    if zero_lr == "healthy":
        return "hyperparameters", (
            "ZeroLRFinetune holds, so it is not the training code either: lower the learning rate (QAT wants about "
            "1/10 to 1/20 of the float one, no warm-up), then look at weight decay and gradient clipping."
        )
    if zero_lr in ("pipeline misaligned", "scales drift"):
        return "pipeline misaligned", "ZeroLRFinetune breaks as well: fix what it names first, then run this again."
    return "pipeline or hyperparameters", (
        "List ZeroLRFinetune() before FloatFinetune() to tell the two apart: if it holds, lower the learning rate (QAT "
        "wants about 1/10 to 1/20 of the float one, no warm-up); if it breaks, fix the training code or data it names."
    )


def _at_rates(finetune: Finetune) -> str:
    if finetune.learning_rates is None:
        return ""
    low, high = finetune.learning_rates
    return f" (lr {high:.3g})" if low == high else f" (lr {low:.3g} to {high:.3g})"
