"""The evidence of every rung of the ladder: rows, and what is found (C3 to C6)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.ladder.measurements import (
    TRAIN_LOSS,
    Measurement,
    PipelineRow,
    Status,
    breaks,
    compare,
    drift_row,
    judged,
    skipped_row,
    spelled,
    train_loss_row,
)
from lightning_qat.analysis.ladder.pipeline_ladder import (
    FINGERPRINT_COMMAND,
    HALF_A_STEP,
    LONG_TRAINING,
    NAMES,
    Ladder,
)
from lightning_qat.analysis.ladder.rung_evidence import (
    Finding,
    float_finetune_evidence,
    float_model_evidence,
    spelled_training,
    zero_lr_evidence,
)
from lightning_qat.analysis.ladder.sentences import NOT_QUANTIZATION, RAISE_POINTS, other_loss
from lightning_qat.analysis.tolerance import COLLAPSE, ROUNDING, STANDARD_ERRORS
from lightning_qat.analysis.trend import mean_and_error

CLIPPED_AWAY = 0.01
"""Clipping that leaves less of the gradient cannot be what keeps it from exploding."""
LEAST_PAIRS = 8
"""Pairs of losses from which the error of their mean difference can be told."""
Evidence = tuple[list[PipelineRow], list[Finding]]
"""Rows of one rung, and what is found on it."""


def against_fingerprint(known: Fingerprint, here: Fingerprint, float_model: Measurement) -> Evidence:
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
    if same:  # nothing is left to chance
        errors = {name: ROUNDING * abs(value) / STANDARD_ERRORS for name, value in known.metrics.items()}
    after = Measurement(here.metrics)
    rows = compare(0, NAMES[0], known.metrics, after, Measurement({}, errors), strict=True)
    note = f"first {known.batches} batches, the same samples" if same else f"first {known.batches} batches"
    rows = [replace(row, note=row.note or note) for row in rows]
    if breaks(rows):
        text = (
            f"the float model does not reproduce its own accuracy here ({spelled(judged(rows))}), before any training "
            "and with fake-quant off." + NOT_QUANTIZATION
        )
        return rows, [Finding(0, "pipeline misaligned", text)]
    return rows, float_model_evidence(float_model, {})[1]


def off_evidence(ladder: Ladder) -> Evidence:
    """Rung 1: fake-quant that is off changes no bit."""
    if ladder.off is None:
        return [], []
    off = ladder.off
    if not off.repeatable:
        note = "the float module itself gives other bits when it is run again: nothing to compare bit by bit"
        return [skipped_row(1, NAMES[1], note)], []
    value = float(len(off.differing))
    status: Status = "breaks" if off.differing else "holds"
    note = f"of {off.compared} outputs and gradients are not bit-identical to those of the module without fake-quant"
    rows = [PipelineRow(1, NAMES[1], "differing tensors", 0.0, value, 0.0, status, note)]
    if not off.differing:
        return rows, []
    text = (
        f"fake-quant that is inserted and off changes the module ({', '.join(off.differing[:3])}): that is a fault of "
        "lightning_qat, or of code that depends on the names or number of submodules. Report it with this table."
    )
    return rows, [Finding(1, "pipeline misaligned", text)]


def quantized_zero_lr_evidence(ladder: Ladder, metrics: Mapping[str, float], rungs: Sequence[int]) -> Evidence:
    """Rungs 2 to 4: what moves without training; in the quantized model only if training does not mend it."""
    asked = [number for number in rungs if number in (2, 3, 4) and number not in ladder.missing]
    rows, findings = zero_lr_evidence(
        ladder.float_model,
        ladder.batch_norm_frozen,
        ladder.batch_norm_moving,
        ladder.calibrated,
        ladder.quantized,
        metrics,
        asked,
    )
    drifts = [finding for finding in findings if finding.verdict == "scales drift"]
    findings = [finding for finding in findings if finding.verdict != "scales drift"]
    if not _qat_recovers(ladder):
        findings += [replace(finding, verdict="quantization error") for finding in drifts]
    return rows, findings


def training_loss_evidence(known: Fingerprint | None, here: Fingerprint | None, rungs: Sequence[int]) -> Evidence:
    """Rung 2 against the loss of the same model on the first batches of the float run: other values are other loss."""
    rows: list[PipelineRow] = []
    if known is None or here is None or 2 not in rungs:
        return rows, []
    for name in sorted(known.losses.keys() & here.losses.keys()):
        one, other = known.losses[name], here.losses[name]
        noise = math.hypot(known.standard_errors.get(name, 0.0), here.standard_errors.get(name, 0.0))
        tolerance = max(STANDARD_ERRORS * noise, COLLAPSE * abs(one))
        holds = abs(one - other) <= tolerance
        status: Status = "holds" if holds else "breaks"
        note = f"first {known.batches} batches"
        name = name.replace("batch norm in ", "BN ")
        rows.append(PipelineRow(2, NAMES[2], name, one, other, tolerance, status, note))
    # in train mode dropout and small batches add their own: eval mode decides
    worst = next((row for row in rows if row.status == "breaks" and "eval" in row.metric), None)
    if worst is None:
        return rows, []
    return rows, [Finding(2, "pipeline misaligned", other_loss(worst.value, worst.expected) + NOT_QUANTIZATION)]


def calibrated_evidence(ladder: Ladder, rungs: Sequence[int]) -> Evidence:
    """Rung 4, before: what calibration alone loses, if training does not win it back."""
    if ladder.calibrated is None or 4 not in rungs:
        return [], []
    rows = compare(4, "calibrated", ladder.float_model.metrics, ladder.calibrated, ladder.float_model)
    if not breaks(rows) or _qat_recovers(ladder):
        return rows, []
    after = _qat_rows(ladder)
    training = f", and training does not mend it ({spelled(judged(after))})" if after else ""
    text = (
        f"calibration alone loses the accuracy ({spelled(judged(rows))}){training}. {_points(ladder)}Next: "
        f"{RAISE_POINTS}; evaluate again before you train."
    )
    return rows, [Finding(4, "quantization error", text)]


def hyperparameter_evidence(ladder: Ladder, rungs: Sequence[int], loss_is_known: bool) -> Evidence:
    """Rung 5: training without fake-quant destroys the model, or does nothing at all.

    Args:
        ladder: what was measured.
        rungs: those asked for.
        loss_is_known: labels and loss of this training are known to be right.
    """
    finetune = ladder.float_finetune
    if finetune is None or 5 not in rungs:
        return [], []
    rows, detail = float_finetune_evidence(ladder.float_model, finetune)
    at_zero = ladder.batch_norm_moving or ladder.batch_norm_frozen
    rises = _loss_rise(at_zero.losses, finetune.losses) if at_zero is not None else ""
    if not detail and rises and any(row.status == "falls" for row in judged(rows)):
        detail = f"{spelled(judged(rows))}, and {rises}"
    trained = spelled_training(finetune)
    if detail:
        text = f"the float model gets worse too ({detail}) in {trained}, so quantization is not the cause. "
        if not loss_is_known:
            text += (
                "Labels and loss of this training have not been compared with those of the float run, so they may be "
                f"to blame as well as the hyperparameters. Make a reference in the float project: {FINGERPRINT_COMMAND}"
                ", and write PipelineCheck(reference='pipeline_fingerprint.json')."
            )
            return rows, [Finding(5, "cannot tell", text)]
        text += (
            "Data, labels and loss hold, so it is not the training code: lower the learning rate (QAT wants about 1/10 "
            "to 1/20 of the float one, no warm-up), then look at weight decay and gradient clipping."
        )
        return rows, [Finding(5, "hyperparameters", text)]
    kept, step = finetune.gradient_kept, finetune.step_size
    reach = (step or 0.0) * max(ladder.total_steps, LONG_TRAINING)
    if kept is not None and kept < CLIPPED_AWAY and reach < HALF_A_STEP:
        text = (
            f"training does nothing: clipping leaves {kept:.1g} of the gradient's length, and a step moves no weight "
            f"by more than {step:.1g} of the largest one, so that {max(ladder.total_steps, LONG_TRAINING)} steps in "
            "one direction would move none by half a step of int8. Raise gradient_clip_val."
        )
        return rows, [Finding(5, "hyperparameters", text)]
    return rows, []


def qat_evidence(ladder: Ladder, rungs: Sequence[int]) -> Evidence:
    """Rung 6: what is left is quantization."""
    if ladder.qat is None or 6 not in rungs:
        return [], []
    rows = _qat_rows(ladder)
    rows += train_loss_row(6, NAMES[6], ladder.qat)
    rows += drift_row(6, NAMES[6], "scales", ladder.qat.moved_scales)
    loss = ladder.qat.train_loss
    if not breaks(rows) and (loss is None or math.isfinite(loss)):
        return rows, []
    detail = spelled(judged(rows)) if breaks(rows) else f"training loss {loss}"
    text = (
        f"everything holds but QAT itself: {detail} in {spelled_training(ladder.qat)}, while the same training without "
        f"fake-quant keeps the accuracy. {_points(ladder)}Next: {RAISE_POINTS}."
    )
    return rows, [Finding(6, "quantization error", text)]


def _qat_rows(ladder: Ladder) -> list[PipelineRow]:
    if ladder.qat is None:
        return []
    return compare(6, NAMES[6], ladder.float_model.metrics, ladder.qat.after, ladder.float_model)


def _qat_recovers(ladder: Ladder) -> bool:
    """Whether training mends what quantization has broken."""
    rows = judged(_qat_rows(ladder))
    return bool(rows) and not breaks(rows)


def _points(ladder: Ladder) -> str:
    return f"Worst points: {'; '.join(ladder.points[:3])}. " if ladder.points else ""


def _loss_rise(before: Sequence[float], after: Sequence[float]) -> str:
    """Whether training makes the loss worse than leaving the weights alone: the same batches, so differences count."""
    count = min(len(before), len(after))
    pairs = [(b, a) for b, a in zip(before[count // 2 : count], after[count // 2 : count], strict=True)]
    rises = [a - b for b, a in pairs if math.isfinite(a - b)]
    if len(rises) < LEAST_PAIRS:
        return ""
    mean, error = mean_and_error(rises)
    if mean <= STANDARD_ERRORS * error:
        return ""
    still, trained = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    return f"training raises the training loss on the same batches ({still:.4g} -> {trained:.4g})"


def is_loss_known(
    ladder: Ladder, reference: Mapping[str, float] | Fingerprint | None, here: Fingerprint | None
) -> bool:
    """Whether something says that labels and loss are right: the float run, or the model itself by its answers."""
    if isinstance(reference, Fingerprint) or (reference and TRAIN_LOSS in reference):
        return True
    if here is None:
        return False
    validation, training = here.agreement.get("validate", {}), here.agreement.get("train", {})
    return any(validation[name] - training[name] <= COLLAPSE for name in validation.keys() & training.keys())
