"""What the rungs that train show: the float model with QAT's hyperparameters, and QAT itself."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.ladder.measurements import Finetune, Ladder
from lightning_qat.analysis.ladder.rows import (
    TRAIN_LOSS,
    Evidence,
    PipelineRow,
    breaks,
    compare,
    drift_row,
    format_falls,
    judged,
    train_loss_row,
)
from lightning_qat.analysis.ladder.rungs import (
    CALIBRATED,
    FLOAT_FINETUNE,
    QAT,
    QUANTIZED,
    BrokenRung,
    Verdict,
)
from lightning_qat.analysis.ladder.sentences import (
    LOWER_LEARNING_RATE,
    MAKE_REFERENCE,
    format_training,
    worst_points,
)
from lightning_qat.analysis.open_question import RAISE_POINTS
from lightning_qat.analysis.tolerance import COLLAPSE, tolerance
from lightning_qat.analysis.trend import mean_and_error

CLIPPED_AWAY = 0.01
"""Clipping that leaves less of the gradient cannot be what keeps it from exploding."""
HALF_A_STEP = 1 / 254
"""Half a step of a symmetric int8 weight, relative to the largest weight."""
LONG_TRAINING = 1000
"""Steps that a training is taken to have at least when asking how far it can get."""
LEAST_PAIRS = 8
"""Pairs of losses from which the error of their mean difference can be told."""
Reference = Mapping[str, float] | Fingerprint | None
"""What is known of the float run: its metrics, or its fingerprint."""
Blame = tuple[Verdict, str]
"""What a collapse of the float model is blamed on, and what to do about it."""

OTHER_PIPELINE: Blame = (
    "pipeline misaligned",
    "The pipeline is not that of the float run: mend that before you change hyperparameters.",
)
"""What a collapse is blamed on where data, layers or modes are known to differ."""


def blame_after_zero_lr(zero_lr: Verdict | None) -> Blame:
    """Blame a collapse of the float model where only the verdict of a finetune with learning rate 0 is known, if any.

    Example:
        >>> blame_after_zero_lr("healthy")[0], blame_after_zero_lr(None)[0]
        ('hyperparameters', 'pipeline or hyperparameters')
    """
    if zero_lr == "healthy":
        return "hyperparameters", f"ZeroLRFinetune holds, so it is not the training code either: {_TRY_HYPERPARAMETERS}"
    if zero_lr in ("pipeline misaligned", "scales drift"):
        return "pipeline misaligned", "ZeroLRFinetune breaks as well: fix what it names first, then run this again."
    return "pipeline or hyperparameters", (
        f"ZeroLRFinetune(), listed before FloatFinetune(), tells the two apart: if it holds, {LOWER_LEARNING_RATE}; "
        "if it breaks, fix the training code or data it names."
    )


def blame_on_the_ladder(loss_is_known: bool) -> Blame:
    """Blame a collapse of the float model where all rungs below hold.

    Args:
        loss_is_known: labels and loss of this training are known to be right.
    """
    if loss_is_known:
        return "hyperparameters", f"Data, labels and loss hold, so it is not the training code: {_TRY_HYPERPARAMETERS}"
    return "cannot tell", (
        "Labels and loss of this training have not been compared with those of the float run, so they may be to blame "
        f"as well as the hyperparameters. {MAKE_REFERENCE}."
    )


_TRY_HYPERPARAMETERS = f"{LOWER_LEARNING_RATE}, then look at weight decay and gradient clipping."


def is_loss_known(reference: Reference, here: Fingerprint | None) -> bool:
    """Whether something says that labels and loss are right: the float run, or the model itself by its answers."""
    if isinstance(reference, Fingerprint) or (reference and TRAIN_LOSS in reference):
        return True
    if here is None:
        return False
    validation, training = here.agreement.get("validate", {}), here.agreement.get("train", {})
    return any(validation[name] - training[name] <= COLLAPSE for name in validation.keys() & training.keys())


def float_finetune_evidence(ladder: Ladder, blame: Blame) -> Evidence:
    """Rung 5: training without fake-quant destroys the model, or does nothing at all.

    Args:
        ladder: what was measured.
        blame: what a collapse is blamed on.
    """
    finetune = ladder.float_finetune
    if finetune is None:
        return [], []
    rows = compare(ladder.float_model.metrics, finetune.after, ladder.float_model, rung=FLOAT_FINETUNE)
    rows += train_loss_row(FLOAT_FINETUNE, finetune)
    rows += drift_row(FLOAT_FINETUNE, "BN statistics", finetune.moved_buffers)
    if worse := _worse(ladder, finetune, rows):
        verdict, advice = blame
        text = f"{worse} in {format_training(finetune)}, so quantization is not the cause."
        return rows, [BrokenRung(FLOAT_FINETUNE, verdict, text, advice)]
    if still := _stands_still(finetune, max(ladder.total_steps, LONG_TRAINING)):
        return rows, [BrokenRung(FLOAT_FINETUNE, "hyperparameters", still, "Raise gradient_clip_val.")]
    return rows, []


def calibrated_evidence(ladder: Ladder) -> Evidence:
    """Rung 4, before: what calibration alone loses, if training does not win it back."""
    if ladder.calibrated is None:
        return [], []
    rows = compare(ladder.float_model.metrics, ladder.calibrated, ladder.float_model, rung=QUANTIZED, what=CALIBRATED)
    if not breaks(rows) or qat_recovers(ladder):
        return rows, []
    training = ""
    if ladder.qat is not None and (after := judged(_qat_rows(ladder))):
        training = f"; {format_training(ladder.qat)} in this short check do not win it back ({format_falls(after)})"
    text = f"calibration alone loses the accuracy ({format_falls(judged(rows))}){training}."
    return rows, [_quantization(QUANTIZED, text, ladder, "; evaluate again before you train", CALIBRATED)]


def blame_quantization(broken: Sequence[BrokenRung], ladder: Ladder) -> list[BrokenRung]:
    """Blame scales that drift on quantization, or on nothing if training mends it."""
    others = [rung for rung in broken if rung.verdict != "scales drift"]
    if qat_recovers(ladder):
        return others
    return others + [replace(rung, verdict="quantization error") for rung in broken if rung.verdict == "scales drift"]


def qat_evidence(ladder: Ladder) -> Evidence:
    """Rung 6: what is left is quantization."""
    if ladder.qat is None:
        return [], []
    rows = _qat_rows(ladder)
    rows += train_loss_row(QAT, ladder.qat)
    rows += drift_row(QAT, "scales", ladder.qat.moved_scales)
    loss = ladder.qat.train_loss
    if not breaks(rows) and (loss is None or math.isfinite(loss)):
        return rows, []
    detail = format_falls(judged(rows)) if breaks(rows) else f"training loss {loss}"
    text = (
        f"everything holds but QAT itself: {detail} in {format_training(ladder.qat)}, while the same training without "
        "fake-quant keeps the accuracy."
    )
    return rows, [_quantization(QAT, text, ladder)]


def _quantization(rung: int, text: str, ladder: Ladder, then: str = "", what: str = "") -> BrokenRung:
    """Say why quantization loses accuracy, and what to do."""
    if ladder.calibration:
        return BrokenRung(rung, "quantization error", text, ladder.calibration, what=what)
    step = f"{RAISE_POINTS[:1].upper()}{RAISE_POINTS[1:]}{then}."
    return BrokenRung(rung, "quantization error", f"{text} {worst_points(ladder.points)}".rstrip(), step, what=what)


def qat_recovers(ladder: Ladder) -> bool:
    """Whether training mends what quantization has broken."""
    rows = judged(_qat_rows(ladder))
    return bool(rows) and not breaks(rows)


def _qat_rows(ladder: Ladder) -> list[PipelineRow]:
    if ladder.qat is None:
        return []
    return compare(ladder.float_model.metrics, ladder.qat.after, ladder.float_model, rung=QAT)


def _worse(ladder: Ladder, finetune: Finetune, rows: Sequence[PipelineRow]) -> str:
    """Say that training makes the float model worse; empty if it does not."""
    if breaks(rows):
        return f"the float model collapses too ({format_falls(judged(rows))})"
    if finetune.train_loss is not None and not math.isfinite(finetune.train_loss):
        return f"the float model collapses too (training loss {finetune.train_loss})"
    at_zero = ladder.batch_norm_moving or ladder.batch_norm_fixed
    rises = _loss_rise(at_zero.losses, finetune.losses) if at_zero is not None else ""
    if rises and any(row.status == "falls" for row in judged(rows)):
        return f"the float model gets worse too ({format_falls(judged(rows))}, and {rises})"
    return ""


def _stands_still(finetune: Finetune, steps: int) -> str:
    """Say that clipping leaves nothing of the gradient, and so little moves that training does nothing."""
    kept, step = finetune.gradient_kept, finetune.step_size or 0.0
    if kept is None or kept >= CLIPPED_AWAY or step * steps >= HALF_A_STEP:
        return ""
    return (
        f"training does nothing: clipping leaves {kept:.1g} of the gradient's length, and a step moves no weight by "
        f"more than {step:.1g} of the largest one, so that {steps} steps in one direction would move none by half a "
        "step of int8."
    )


def _loss_rise(before: Sequence[float], after: Sequence[float]) -> str:
    """Whether training makes the loss worse than leaving the weights alone: the same batches, so differences count."""
    count = min(len(before), len(after))
    pairs = [(b, a) for b, a in zip(before[count // 2 : count], after[count // 2 : count], strict=True)]
    rises = [a - b for b, a in pairs if math.isfinite(a - b)]
    if len(rises) < LEAST_PAIRS:
        return ""
    mean, error = mean_and_error(rises)
    if mean <= tolerance(error):
        return ""
    still, trained = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    return f"training raises the training loss on the same batches ({still:.4g} -> {trained:.4g})"
