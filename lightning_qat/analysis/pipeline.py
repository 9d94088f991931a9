"""Is the training pipeline to blame, or quantization? Rungs of a ladder, each changing one thing (C3, C4, C6).

Pure: numbers measured by somebody else in, rows and a verdict out. A rung breaks if a metric falls by more than its
tolerance, and the tolerance is what evaluating on other batches would change: three standard errors of the metric over
the evaluation batches, never a constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lightning_qat.analysis.results import Result

Status = Literal["holds", "breaks", "cannot tell"]
Verdict = Literal["healthy", "pipeline misaligned", "hyperparameters", "cannot tell"]

STANDARD_ERRORS = 3.0
"""A fall of three standard errors happens by chance in about one of a thousand evaluations."""


@dataclass(frozen=True)
class Measurement:
    """One evaluation.

    Args:
        metrics: values by name.
        standard_errors: their variation over batches, where known.
    """

    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finetune:
    """What a finetune on a copy of the model did.

    Args:
        after: the evaluation after it.
        batches: training batches run.
        train_loss: mean training loss over them, None if the step returns none.
        changed_parameters: names of the parameters that are not bit-identical to before.
        moved_buffers: names of the buffers that moved (batch norm statistics).
        moved_scales: names of the quantization points whose scale moved.
    """

    after: Measurement
    batches: int
    train_loss: float | None = None
    changed_parameters: tuple[str, ...] = ()
    moved_buffers: tuple[str, ...] = ()
    moved_scales: tuple[str, ...] = ()


@dataclass(frozen=True)
class PipelineRow:
    """One metric on one rung."""

    rung: int
    what: str
    metric: str
    expected: float | None
    value: float | None
    tolerance: float | None
    status: Status
    note: str


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
    shown: ClassVar[tuple[str, ...]] = ("rung", "what", "metric", "expected", "value", "tolerance", "status")


def judge_zero_lr(
    float_model: Measurement,
    batch_norm_frozen: Finetune,
    batch_norm_moving: Finetune,
    calibrated: Measurement | None = None,
    quantized: Finetune | None = None,
    reference: Mapping[str, float] | None = None,
) -> PipelineResult:
    """Judge the finetune with learning rate 0 (rungs 0 and 2 to 4): weights cannot change, so nothing may collapse.

    Args:
        float_model: fake-quant off, before.
        batch_norm_frozen: fake-quant off, lr 0, batch norm in eval mode.
        batch_norm_moving: fake-quant off, lr 0, batch norm as in training.
        calibrated: quantized, before; None if there are no scales.
        quantized: quantized, lr 0, as in QAT.
        reference: the float metrics of the float training run, if known.
    """
    rows: list[PipelineRow] = []
    verdicts: list[tuple[Verdict, str]] = []
    if reference:
        rung = _compare(0, "float model as it is", reference, float_model, float_model, [])
        rows += rung
        if _breaks(rung):
            verdicts.append(
                (
                    "pipeline misaligned",
                    f"the float model does not reproduce its own accuracy here ({_worst(rung)}), before any training "
                    "and "
                    "without quantization: wrong checkpoint, other evaluation data or preprocessing, or another "
                    "metric.",
                )
            )
    else:
        note = "no reference: give the float run's metrics, reference: {val_acc: 0.98}"
        rows.append(PipelineRow(0, "float model as it is", "", None, None, None, "cannot tell", note))
    rungs = (
        (2, "lr 0, batch norm fixed", float_model, batch_norm_frozen),
        (3, "lr 0, batch norm moves", float_model, batch_norm_moving),
        (4, "lr 0, quantized", calibrated, quantized),
    )
    for number, what, before, finetune in rungs:
        if before is None or finetune is None:
            rows.append(PipelineRow(number, what, "", None, None, None, "cannot tell", "no calibrated scales"))
            continue
        rung = _compare(number, what, before.metrics, finetune.after, before, _moves(finetune))
        rows += rung
        if finetune.changed_parameters:
            verdicts.append(("pipeline misaligned", _moved_weights(finetune)))
        elif _breaks(rung):
            verdicts.append(("pipeline misaligned", _broken_rung(number, rung, finetune)))
    if verdicts:
        verdict, sentence = verdicts[0]
        note = (
            f"{verdict}: {sentence} Quantization is not the cause; do not tune lr or weight decay before this is fixed."
        )
        return PipelineResult(tuple(rows), verdict, note)
    doubt = (
        "" if reference else " Whether the float accuracy itself is right cannot be told without reference: metrics."
    )
    return PipelineResult(
        tuple(rows),
        "healthy",
        "healthy: with learning rate 0 the pipeline leaves the model as good as it was, so the training code does not "
        f"destroy it by itself.{doubt} If QAT still collapses, run FloatFinetune to test the hyperparameters.",
    )


def judge_float_finetune(float_model: Measurement, finetune: Finetune) -> PipelineResult:
    """Judge the float finetune (rung 5): QAT's pipeline and hyperparameters, without fake-quant.

    Args:
        float_model: fake-quant off, before.
        finetune: fake-quant off, trained as QAT would.
    """
    what = "float, QAT's training"
    rung = _compare(5, what, float_model.metrics, finetune.after, float_model, _moves(finetune))
    broken = _breaks(rung)
    loss = finetune.train_loss
    if broken or (loss is not None and not math.isfinite(loss)):
        detail = _worst(rung) if broken else f"training loss {loss}"
        return PipelineResult(
            tuple(rung),
            "hyperparameters",
            f"hyperparameters: the float model collapses too ({detail}) after {finetune.batches} batches of this "
            "training "
            "without any quantization, so quantization is not the cause. Run ZeroLRFinetune: if that holds, it is the "
            "learning rate, weight decay or clipping (QAT wants about 1/10 to 1/20 of the float learning rate, no "
            "warm-up); "
            "if that breaks, it is the training code or data.",
        )
    return PipelineResult(
        tuple(rung),
        "healthy",
        f"healthy: {finetune.batches} batches of QAT's own training leave the float model as good as it was. If QAT "
        "collapses now, it is quantization error: look at SensitivityAnalysis, raise the first ops to int16.",
    )


def is_worse_when_larger(metric: str) -> bool:
    """Whether a metric is a cost, judged by its name (``val_loss``, ``mse``, ``error_rate``)."""
    words = metric.lower().replace("/", "_").replace("-", "_").replace(".", "_").split("_")
    costs = {
        "loss",
        "error",
        "err",
        "mse",
        "mae",
        "rmse",
        "perplexity",
        "ppl",
        "wer",
        "cer",
        "nll",
        "fid",
        "fpr",
        "fnr",
    }
    return bool(costs & set(words))


def _compare(
    number: int,
    what: str,
    expected: Mapping[str, float],
    after: Measurement,
    noise: Measurement,
    moves: Sequence[str],
) -> list[PipelineRow]:
    rows = []
    for metric, before in expected.items():
        value = after.metrics.get(metric)
        if value is None:
            row = PipelineRow(number, what, metric, before, None, None, "cannot tell", "not logged by the evaluation")
            rows.append(row)
            continue
        # the floor is float32 rounding of a mean, for metrics whose batches all agree
        tolerance = max(STANDARD_ERRORS * noise.standard_errors.get(metric, 0.0), 1e-6 * abs(before))
        fall = value - before if is_worse_when_larger(metric) else before - value
        status: Status = "holds" if fall <= tolerance else "breaks"  # NaN breaks
        rows.append(PipelineRow(number, what, metric, before, value, tolerance, status, "; ".join(moves)))
    return rows


def _breaks(rows: Sequence[PipelineRow]) -> bool:
    """A cost may rise while what counts holds (an overconfident classifier); without other metrics it decides."""
    judged = [row for row in rows if not is_worse_when_larger(row.metric)] or list(rows)
    return any(row.status == "breaks" for row in judged)


def _worst(rows: Sequence[PipelineRow]) -> str:
    broken = [row for row in rows if row.status == "breaks"]
    broken.sort(key=lambda row: is_worse_when_larger(row.metric))
    return ", ".join(f"{row.metric} {row.expected:.4g} -> {row.value:.4g}" for row in broken[:2])


def _moves(finetune: Finetune) -> list[str]:
    moves = [] if finetune.train_loss is None else [f"train loss {finetune.train_loss:.4g}"]
    for what, names in (("buffers", finetune.moved_buffers), ("scales", finetune.moved_scales)):
        if names:
            moves.append(f"{len(names)} {what} moved")
    return moves


def _moved_weights(finetune: Finetune) -> str:
    names = finetune.changed_parameters
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"weights changed although the learning rate is 0 ({', '.join(names[:3])}{more}): something other than the "
        "optimizer's step writes to them (an EMA swap, a clamp or a hook in the training step)."
    )


def _broken_rung(number: int, rung: Sequence[PipelineRow], finetune: Finetune) -> str:
    if number == 2:
        return f"evaluation changed ({_worst(rung)}) although nothing was trained: the training step has a side effect."
    if number == 3:
        buffers = ", ".join(finetune.moved_buffers[:3])
        return (
            f"accuracy collapses at learning rate 0 as soon as batch norm updates its statistics ({_worst(rung)}; "
            "moved: "
            f"{buffers}): the training data do not look like the evaluation data (preprocessing, normalization, "
            "augmentation), or the batches are too small. Compare the two data pipelines, or set "
            "freeze_batch_norm_after: 0."
        )
    scales = f"scales moved: {', '.join(finetune.moved_scales[:3])}" if finetune.moved_scales else "no scale moved"
    return (
        f"the calibrated model collapses at learning rate 0 ({_worst(rung)}; {scales}) while the float model holds: "
        "use activation_scales: fixed, calibrate with more batches, or set freeze_batch_norm_after: 0."
    )
