"""The note of a pipeline check on which no rung breaks: what holds, what falls a little, and what to run next."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from lightning_qat.analysis.ladder.measurements import Ladder
from lightning_qat.analysis.ladder.rows import PipelineRow, breaks, compare, format_falls, judged
from lightning_qat.analysis.ladder.rungs import (
    BATCH_NORM_MOVING,
    FLOAT_FINETUNE,
    FLOAT_MODEL,
    QAT,
    QUANTIZED,
    ZERO_LR_RUNGS,
)
from lightning_qat.analysis.ladder.sentences import MAKE_REFERENCE, Said, format_training, worst_points
from lightning_qat.analysis.metric_direction import higher_is_better, is_quality
from lightning_qat.analysis.open_question import RAISE_POINTS
from lightning_qat.quantization.counts import number_of

_NOT_LEARNING_RATE = " A loss of this size is not caused by the learning rate; freeze_batch_norm_after: 0 may avoid it."
_SMALL_FALL = {
    BATCH_NORM_MOVING: _NOT_LEARNING_RATE,
    QUANTIZED: _NOT_LEARNING_RATE,
    FLOAT_FINETUNE: " A loss of this size is not caused by quantization.",
    QAT: "",
}
"""What a small fall means, on the rungs where something may move."""


def healthy(
    ladder: Ladder,
    rows: Sequence[PipelineRow],
    rungs: Collection[int],
    reference: Mapping[str, float] | None = None,
    pipeline_only: bool = False,
) -> Said:
    """Say that no rung breaks, and what to do if quantization-aware training fails nevertheless.

    Args:
        ladder: what was measured.
        rows: the evidence.
        rungs: those asked for.
        reference: the metrics of the float run, if they were given.
        pipeline_only: only the pipeline was asked about.
    """
    calibration, step = _what_is_lost(ladder, rungs)
    found = [
        *_what_holds(ladder, rows, rungs),
        *_what_falls(ladder, rows),
        *([calibration] if calibration else []),
        *_what_is_unknown(ladder, rows, rungs, reference, pipeline_only),
    ]
    return " ".join(found), step


def _what_holds(ladder: Ladder, rows: Sequence[PipelineRow], rungs: Collection[int]) -> Iterator[str]:
    nearly = "nearly " if _small_falls(rows) else ""
    highest = _highest(ladder, rungs)
    if highest == FLOAT_FINETUNE and ladder.float_finetune is not None:
        yield f"the float model is {nearly}as good as before after {format_training(ladder.float_finetune)}."
    elif highest in ZERO_LR_RUNGS:
        yield (
            f"with learning rate 0 the model stays {nearly}as good as it was: the training code alone does not destroy "
            "it."
        )
    else:
        batches = max((finetune.batches for finetune in ladder.finetunes.values()), default=0)
        each = f", with {number_of(batches, 'batch')} each" if batches else ""
        yield f"every rung holds{each}."


def _what_falls(ladder: Ladder, rows: Sequence[PipelineRow]) -> Iterator[str]:
    if small := _small_falls(rows):
        rung = small[0].rung
        falls = format_falls([row for row in small if row.rung == rung])
        yield f"Rung {rung} falls a little ({falls}), which is no collapse.{_SMALL_FALL[rung]}"
    if risen := _risen_costs(rows):
        yield (f"A cost rises on rung {risen[0].rung} ({format_falls(risen[:1])}), but the scores hold.")


def _what_is_lost(ladder: Ladder, rungs: Collection[int]) -> Said:
    """What calibration alone loses, and what the rungs that were not asked for would tell."""
    before, calibrated = ladder.float_model, ladder.calibrated
    lost = compare(before.metrics, calibrated, before) if calibrated is not None else []
    highest = _highest(ladder, rungs)
    if breaks(lost) and highest == QAT:
        worst = ladder.calibration or worst_points(ladder.points)
        text = f"Calibration alone loses the accuracy ({format_falls(judged(lost))}), and QAT wins it back: train on."
        return f"{text} {worst}".rstrip(), ""
    if breaks(lost):
        text = f"Calibration alone has lost the accuracy ({format_falls(judged(lost))})"
        if ladder.calibration:
            return f"{text}. {ladder.calibration}", ""
        return f"{text}, and that is quantization error.", f"First {RAISE_POINTS}, then train."
    if highest == FLOAT_FINETUNE and QAT not in rungs:
        return "", (
            f"If QAT collapses in as many batches, it is quantization error: {RAISE_POINTS}. If it collapses later, "
            "give more batches here."
        )
    if highest in ZERO_LR_RUNGS and FLOAT_FINETUNE not in rungs:
        return "", "If QAT still collapses, FloatFinetune() tests the hyperparameters."
    return "", ""


def _what_is_unknown(
    ladder: Ladder,
    rows: Sequence[PipelineRow],
    rungs: Collection[int],
    reference: Mapping[str, float] | None,
    pipeline_only: bool,
) -> Iterator[str]:
    if FLOAT_MODEL not in rungs or any(row.rung == FLOAT_MODEL and row.status == "holds" for row in rows):
        return
    logged = list(filter(is_quality, ladder.float_model.metrics))
    given = f" (it logs {', '.join(logged)}, not {', '.join(reference)})" if reference else ""
    name = next(filter(higher_is_better, logged), next(iter(logged), "val_acc"))
    trains = FLOAT_FINETUNE in rungs
    check = ("FloatFinetune" if trains else "ZeroLRFinetune") if pipeline_only else "PipelineCheck"
    yield (
        "Whether the float model itself, its labels and its loss are right cannot be told without a reference"
        f"{given}. {MAKE_REFERENCE}. Or give the metrics that `validate` prints there: "
        f"{check}(reference={{{name!r}: ...}})."
    )


def _highest(ladder: Ladder, rungs: Collection[int]) -> int:
    """The highest rung asked for that was finetuned."""
    return max((rung for rung in ladder.finetunes if rung in rungs), default=FLOAT_MODEL)


def _small_falls(rows: Sequence[PipelineRow]) -> list[PipelineRow]:
    """Falls that count, but are no collapse, of the metrics that decide."""
    return [row for row in judged([row for row in rows if row.rung in _SMALL_FALL]) if row.status == "falls"]


def _risen_costs(rows: Sequence[PipelineRow]) -> list[PipelineRow]:
    """Costs that break where the scores hold."""
    groups: dict[tuple[int, str], list[PipelineRow]] = {}
    for row in rows:
        groups.setdefault((row.rung, row.what), []).append(row)
    return [row for group in groups.values() if not breaks(group) for row in group if row.status == "breaks"]
