"""Is the training pipeline to blame, or quantization? The verdicts of the two finetunes (C3, C4, C6).

Pure: numbers measured by somebody else in, evidence and a verdict out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_qat.analysis.ladder.measurements import (
    Finetune,
    Measurement,
    PipelineRow,
    breaks,
    compare,
    judged,
    spelled,
)
from lightning_qat.analysis.ladder.rung_evidence import (
    NO_METRIC,
    Verdict,
    float_finetune_evidence,
    float_model_evidence,
    nothing_moved,
    spelled_training,
    zero_lr_evidence,
)
from lightning_qat.analysis.ladder.sentences import RAISE_POINTS
from lightning_qat.analysis.metric_direction import is_worse_when_larger
from lightning_qat.analysis.results import Block, Result


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

    def blocks(self) -> tuple[Block, ...]:
        """What a rung does is said once, and the notes are left to the files: this fits into 80 columns."""
        rows = self.to_dicts()
        for before, row in zip([None, *self.rows], rows, strict=False):
            repeated = before is not None and (before.rung, before.what) == (row["rung"], row["what"])
            row["rung"] = "" if repeated else f"{row['rung']} {row['what']}"
            row["metric"] = row["metric"] or row["note"]
        columns = ("rung", "metric", "expected", "value", "tolerance", "status")
        return (Block.of(self.title, columns, rows, self.note),)

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
        f"collapses in as many batches, it is quantization error: {RAISE_POINTS}. If it collapses later, give more "
        "batches here."
    )
    return PipelineResult(rows, "healthy", note)


def cannot_tell(reason: str) -> PipelineResult:
    """Return a verdict without evidence: the check could not run."""
    return PipelineResult((), "cannot tell", f"cannot tell: {reason}")


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
            f"Calibration alone has lost the accuracy ({spelled(judged(lost))}), and that is quantization error: "
            f"{RAISE_POINTS} before you train."
        )
    else:
        parts.append("If QAT still collapses, FloatFinetune() tests the hyperparameters.")
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
        "ZeroLRFinetune(), listed before FloatFinetune(), tells the two apart: if it holds, lower the learning rate "
        "(QAT wants about 1/10 to 1/20 of the float one, no warm-up); if it breaks, fix the training code or data it "
        "names."
    )
