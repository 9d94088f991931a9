"""What the rungs without training show: the float model, fake-quant that is off, and learning rate 0."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.ladder.measurements import Finetune, Ladder, Measurement, OffComparison
from lightning_qat.analysis.ladder.rows import (
    TRAIN_LOSS,
    Evidence,
    PipelineRow,
    Status,
    breaks,
    compare,
    drift_row,
    skipped_row,
    train_loss_row,
)
from lightning_qat.analysis.ladder.rung_tolerance import first_losses_tolerance
from lightning_qat.analysis.ladder.rungs import (
    BATCH_NORM_FIXED,
    BATCH_NORM_MOVING,
    FLOAT_MODEL,
    OFF,
    QUANTIZED,
    RUNG_NAMES,
    BrokenRung,
)
from lightning_qat.analysis.ladder.sentences import (
    NOT_QUANTIZATION,
    QUANTIZED_LOSS,
    TRAINING_LOSS,
    Sentence,
    batch_norm,
    moved_weights,
    other_loss,
    other_metrics,
    scales,
    side_effect,
)
from lightning_qat.quantization.counts import number_of


def float_model_evidence(float_model: Measurement, reference: Mapping[str, float]) -> Evidence:
    """Rung 0: does the float model have its own accuracy here?

    Args:
        float_model: evaluation with fake-quant off, before any training.
        reference: metrics of the float run; ``train_loss`` is left for rung 2.
    """
    logged = float_model.metrics
    expected = {name: value for name, value in reference.items() if name != TRAIN_LOSS or name in logged}
    rows = compare(expected, float_model, float_model, strict=True)
    for name in (name for name in logged if name not in expected):
        what = RUNG_NAMES[FLOAT_MODEL]
        rows.append(PipelineRow(FLOAT_MODEL, what, name, None, logged[name], None, "noted", "no reference"))
    if breaks(rows):
        text = (
            f"{other_metrics(rows)}: another checkpoint (init_from), other evaluation data or preprocessing, or "
            "another metric."
        )
        step = "Quantization is not the cause; fix this first."
        return rows, [BrokenRung(FLOAT_MODEL, "pipeline misaligned", text, step)]
    if logged and not any(map(math.isfinite, logged.values())):
        text = "the float model evaluates to nan or inf before any training and with fake-quant off."
        step = "Look at the checkpoint (init_from) and the evaluation data. Quantization is not the cause."
        return rows, [BrokenRung(FLOAT_MODEL, "pipeline misaligned", text, step)]
    return rows, []


def fingerprint_evidence(known: Fingerprint, here: Fingerprint, float_model: Measurement) -> Evidence:
    """Rung 0 on the batches of the fingerprint: the same samples must give the same numbers.

    Args:
        known: of the float run.
        here: of this pipeline.
        float_model: the evaluation on all batches.
    """
    same = known.data.get("validate") == here.data.get("validate") and bool(known.data.get("validate"))
    errors = {
        name: math.hypot(known.standard_errors.get(name, 0.0), here.standard_errors.get(name, 0.0))
        for name in known.metrics
        if name in known.standard_errors or name in here.standard_errors
    }
    noise = Measurement({}, errors)
    rows = compare(known.metrics, Measurement(here.metrics), noise, strict=True, same_samples=same)
    first = f"first {number_of(known.batches, 'batch')}"
    note = f"{first}, the same samples" if same else first
    rows = [replace(row, note=row.note or note) for row in rows]
    if breaks(rows):
        return rows, [BrokenRung(FLOAT_MODEL, "pipeline misaligned", f"{other_metrics(rows)}.", NOT_QUANTIZATION)]
    return rows, float_model_evidence(float_model, {})[1]


def off_evidence(off: OffComparison | None) -> Evidence:
    """Rung 1: fake-quant that is off changes no bit."""
    if off is None:
        return [], []
    if not off.repeatable:
        note = "the float module itself gives other bits when it is run again: nothing to compare bit by bit"
        return [skipped_row(OFF, note)], []
    value = float(len(off.differing))
    status: Status = "breaks" if off.differing else "holds"
    note = f"of {off.compared} outputs and gradients are not bit-identical to those of the module without fake-quant"
    rows = [PipelineRow(OFF, RUNG_NAMES[OFF], "differing tensors", 0.0, value, 0.0, status, note)]
    if not off.differing:
        return rows, []
    text = (
        f"fake-quant that is inserted and off changes the module ({', '.join(off.differing[:3])}): that is a fault of "
        "lightning_qat, or of code that depends on the names or number of submodules."
    )
    return rows, [BrokenRung(OFF, "pipeline misaligned", text, "Report it with this table.")]


def zero_lr_evidence(ladder: Ladder, rungs: Collection[int], train_loss: float | None = None) -> Evidence:
    """Rungs 2 to 4: what moves without training.

    Args:
        ladder: what was measured.
        rungs: those asked for.
        train_loss: training loss of the float run, if known.
    """
    rows: list[PipelineRow] = []
    broken: list[BrokenRung] = []
    every: tuple[tuple[int, Measurement | None, str, Sentence], ...] = (
        (BATCH_NORM_FIXED, ladder.float_model, "", side_effect),
        (BATCH_NORM_MOVING, ladder.float_model, "no batch norm moves in this training", batch_norm),
        (QUANTIZED, ladder.calibrated, "no calibrated scales", scales),
    )
    for rung, before, why_not, sentence in every:
        if rung not in rungs or rung in ladder.missing:
            continue
        finetune = ladder.finetunes.get(rung)
        if before is None or finetune is None:
            rows.append(skipped_row(rung, why_not))
            continue
        found = compare(before.metrics, finetune.after, before, rung=rung, strict=rung == BATCH_NORM_FIXED)
        found += train_loss_row(rung, finetune, train_loss if rung == BATCH_NORM_FIXED else None)
        found += drift_row(rung, "BN statistics", finetune.moved_buffers)
        found += drift_row(rung, "scales", finetune.moved_scales)
        rows += found
        broken += _broken(rung, found, finetune, sentence)
    return rows, broken


def training_loss_evidence(known: Fingerprint, here: Fingerprint) -> Evidence:
    """Rung 2 on the batches of the fingerprint: another training loss of the same model is another loss or other data.

    Args:
        known: of the float run.
        here: of this pipeline.
    """
    rows: list[PipelineRow] = []
    for name in sorted(known.losses.keys() & here.losses.keys()):
        one, other = known.losses[name], here.losses[name]
        errors = known.standard_errors.get(name, 0.0), here.standard_errors.get(name, 0.0)
        tolerated = first_losses_tolerance(one, *errors)
        status: Status = "holds" if abs(one - other) <= tolerated else "breaks"
        what, metric = RUNG_NAMES[BATCH_NORM_FIXED], name.replace("batch norm in ", "BN ")
        note = f"first {number_of(known.batches, 'batch')}"
        rows.append(PipelineRow(BATCH_NORM_FIXED, what, metric, one, other, tolerated, status, note))
    # in train mode dropout and small batches add their own: eval mode decides
    worst = next((row for row in rows if row.status == "breaks" and "eval" in row.metric), None)
    if worst is None:
        return rows, []
    text, step = other_loss(worst.value, worst.expected)
    return rows, [BrokenRung(BATCH_NORM_FIXED, "pipeline misaligned", text, f"{step} {NOT_QUANTIZATION}")]


def _broken(rung: int, rows: Sequence[PipelineRow], finetune: Finetune, sentence: Sentence) -> list[BrokenRung]:
    loss = finetune.train_loss
    if loss is not None and not math.isfinite(loss):
        if rung == QUANTIZED:
            return [BrokenRung(rung, "scales drift", QUANTIZED_LOSS[0].format(loss=loss), QUANTIZED_LOSS[1])]
        text, step = TRAINING_LOSS[0].format(loss=loss), TRAINING_LOSS[1]
    elif finetune.changed_parameters:
        text, step = moved_weights(finetune), ""
    elif breaks(rows):
        text, step = sentence(rows, finetune)
        if rung == QUANTIZED:
            return [BrokenRung(rung, "scales drift", text, step)]
    elif known := next((row for row in rows if row.metric == TRAIN_LOSS and row.status == "breaks"), None):
        text, step = other_loss(known.value, known.expected)
    else:
        return []
    return [BrokenRung(rung, "pipeline misaligned", text, f"{step} {NOT_QUANTIZATION}".lstrip())]
