"""The judge of the pipeline check: is the pipeline, the hyperparameters or quantization to blame?

Pure functions: they take measured numbers and return evidence and one verdict.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from lightning_qat.analysis.fingerprint.difference import PipelineDifference, PipelineDifferences
from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.fingerprint.fingerprint_differences import compare_fingerprints, compare_stages
from lightning_qat.analysis.fingerprint.label_agreement import LABELS
from lightning_qat.analysis.fingerprint.module_differences import MODULES, UPDATES
from lightning_qat.analysis.ladder.doubts import doubts
from lightning_qat.analysis.ladder.healthy import healthy
from lightning_qat.analysis.ladder.hindrances import frozen_parts, hindrances, is_largely_frozen, plan_rows, prevention
from lightning_qat.analysis.ladder.measurements import Ladder
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.rows import TRAIN_LOSS, Evidence, skipped_row
from lightning_qat.analysis.ladder.rungs import (
    BATCH_NORM_FIXED,
    BATCH_NORM_MOVING,
    FLOAT_FINETUNE,
    FLOAT_MODEL,
    RUNG_NAMES,
    RUNGS,
    ZERO_LR_RUNGS,
    BrokenRung,
    Verdict,
)
from lightning_qat.analysis.ladder.sentences import MAKE_REFERENCE, ended
from lightning_qat.analysis.ladder.training_rungs import (
    OTHER_PIPELINE,
    Blame,
    Reference,
    blame_after_zero_lr,
    blame_on_the_ladder,
    blame_quantization,
    calibrated_evidence,
    float_finetune_evidence,
    is_loss_known,
    qat_evidence,
)
from lightning_qat.analysis.ladder.zero_lr_rungs import (
    fingerprint_evidence,
    float_model_evidence,
    off_evidence,
    training_loss_evidence,
    zero_lr_evidence,
)

_EXPLAINS: dict[int, tuple[str, ...]] = {
    FLOAT_MODEL: (
        "weights",
        "model input (validate)",
        "data (validate)",
        "layers",
        "labels (validate)",
        "evaluation",
        "modes",
        "metric",
    ),
    BATCH_NORM_FIXED: (
        "weights",
        "model input (train)",
        "data (train)",
        "layers",
        MODULES,
        "labels (train)",
        "modes",
        "loss",
        "batch norm",
    ),
    BATCH_NORM_MOVING: (
        "model input (train)",
        "data (train)",
        "layers",
        MODULES,
        "modes",
        "batch norm",
        "settings",
        "loss",
    ),
    FLOAT_FINETUNE: (
        "model input (train)",
        "data (train)",
        "layers",
        MODULES,
        "modes",
        UPDATES,
        "labels (train)",
        "optimizer",
        "settings",
        "scheduler",
        "loss",
    ),
}
"""Parts of two pipelines that can explain why a rung breaks, if they differ."""
_WEAK_CAUSES = {
    BATCH_NORM_MOVING: ("batch_size", "momentum"),
    FLOAT_FINETUNE: ("gradient_clip", "class", "schedulers", "lr", "weight_decay", "batch_size", "no longer frozen"),
}
"""Differences that are common in healthy runs, and still the likeliest cause if just this rung breaks."""
_CONSEQUENCES = ("loss", "metric")
"""Parts that are what follows from another difference, and a cause only if nothing else differs."""
_OF_THE_PIPELINE = ("weights", "model input", "data", "layers", "modes", "evaluation", LABELS)
"""Parts that have to be the same in both runs, whatever the hyperparameters."""


def judge(
    ladder: Ladder,
    reference: Reference = None,
    here: Fingerprint | None = None,
    rungs: Collection[int] = RUNGS,
    *,
    pipeline_only: bool = False,
    zero_lr: Verdict | None = None,
    flag: str = "",
) -> PipelineResult:
    """Judge the ladder: the first rung that breaks names the culprit.

    Args:
        ladder: what was measured.
        reference: the float run: its fingerprint, or its metrics; ``train_loss`` among them is its last training loss.
        here: the fingerprint of this pipeline with the weights it starts from.
        rungs: those asked for.
        pipeline_only: judge only the pipeline. The note then says what quantization loses without judging it, and a
            quantized model that collapses at learning rate 0 is called ``scales drift``.
        zero_lr: the verdict of a finetune with learning rate 0 that ran before, if this one has no such rung.
        flag: what ConvergenceMonitor has flagged, if that is why the check runs.

    Example:
        >>> from lightning_qat.analysis.ladder.measurements import Finetune, Measurement
        >>> accuracy = Measurement({"val_acc": 0.9}, {"val_acc": 0.01})
        >>> collapsed = Finetune(Measurement({"val_acc": 0.1}), 50, moved_buffers={"bn.running_mean": 0.9})
        >>> kept = Finetune(accuracy, 50)
        >>> result = judge(Ladder(accuracy, batch_norm_fixed=kept, batch_norm_moving=collapsed), rungs=(0, 2, 3))
        >>> result.verdict, result.rung
        ('pipeline misaligned', 3)
    """
    known = reference if isinstance(reference, Fingerprint) else None
    differences = compare_fingerprints(known, here) if known and here else PipelineDifferences(())
    stood_still = any(rung in rungs for rung in ZERO_LR_RUNGS)
    if pipeline_only and known is None and not stood_still:
        blame = blame_after_zero_lr(zero_lr)
    else:
        blame = _blame(reference, here, differences, stood_still)
    frozen, found = frozen_parts(differences), hindrances(known, here)
    proof = [*frozen, *found] if known and here and is_largely_frozen(known, here) else found
    rows, broken = _evidence(ladder, reference, here, rungs, pipeline_only, blame)
    if known is not None and not pipeline_only and (prevented := prevention(ladder, proof)):
        broken = [rung for rung in broken if rung.verdict != "quantization error"] + prevented
        broken.sort(key=lambda rung: rung.rung)
    stages = compare_stages(here) if here is not None else PipelineDifferences(())
    result = PipelineResult(tuple(rows), differences=differences, stages=stages)
    if broken:
        return _convicted(result, broken[0], known is not None)
    doubt = next(doubts(ladder, rows, rungs, reference, here, (result.differences, result.stages), flag), None)
    if doubt is not None:
        result = replace(result, verdict=doubt.verdict, rung=doubt.rung, cause=doubt.cause)
        return _saying(result, f"{doubt.verdict}:", doubt.text, doubt.next_step)
    strong = result.differences.strong or (result.stages.strong if known is None else ())
    text, step = healthy(ladder, rows, rungs, reference if isinstance(reference, Mapping) else None, pipeline_only)
    result = replace(result, verdict="healthy")
    if but := [*frozen, *found, *(row.what for row in strong)]:
        return _saying(result, "healthy, but", f"{ended(but[0])} {text[:1].upper()}{text[1:]}", step)
    return _saying(result, "healthy:", text, step)


def _saying(result: PipelineResult, lead: str, finding: str, next_step: str, cause: str = "") -> PipelineResult:
    """Return the result with its sentences.

    Args:
        result: without them.
        lead: the beginning of the note.
        finding, next_step: what was found, and what to do.
        cause: the end of the note.
    """
    sentences = (part for part in (f"{lead} {finding}", next_step, cause) if part)
    return replace(result, note=" ".join(sentences), finding=finding, next_step=next_step)


def _blame(
    reference: Reference,
    here: Fingerprint | None,
    differences: PipelineDifferences,
    stood_still: bool,
) -> Blame:
    """What a collapse of the float model in training is blamed on.

    Where the rungs with learning rate 0 hold, data that differ may do no harm, and the optimizer is the likelier cause.
    """
    strong = [row.part for row in differences.strong]
    trains_otherwise = stood_still and {"optimizer", "settings"} & set(strong)
    if any(part.startswith(_OF_THE_PIPELINE) for part in strong) and not trains_otherwise:
        return OTHER_PIPELINE
    return blame_on_the_ladder(is_loss_known(reference, here))


def _evidence(
    ladder: Ladder,
    reference: Reference,
    here: Fingerprint | None,
    rungs: Collection[int],
    pipeline_only: bool,
    blame: Blame,
) -> Evidence:
    """The rows and the broken rungs, the lowest first, of the rungs asked for."""
    known = reference if isinstance(reference, Fingerprint) else None
    metrics = dict(reference) if isinstance(reference, Mapping) else {}
    float_model = ladder.float_model
    still = zero_lr_evidence(ladder, rungs, metrics.get(TRAIN_LOSS))
    if not pipeline_only:
        still = still[0], blame_quantization(still[1], ladder)
    nothing: Evidence = [], []
    every: tuple[Evidence, ...] = (
        fingerprint_evidence(known, here, float_model)
        if known and here
        else float_model_evidence(float_model, metrics),
        off_evidence(ladder.off),
        calibrated_evidence(ladder) if not pipeline_only else nothing,
        still,
        training_loss_evidence(known, here) if known and here else nothing,
        float_finetune_evidence(ladder, blame),
        qat_evidence(ladder),
        (plan_rows(known, here), []),
    )
    rows = [row for evidence in every for row in evidence[0] if row.rung in rungs]
    rows += [skipped_row(rung, why) for rung, why in ladder.missing.items()]
    broken = [found for evidence in every for found in evidence[1] if found.rung in rungs]
    return sorted(rows, key=lambda row: row.rung), sorted(broken, key=lambda found: found.rung)


def _convicted(result: PipelineResult, broken: BrokenRung, has_fingerprint: bool) -> PipelineResult:
    cause = None if broken.cause else _cause(result, broken, has_fingerprint)
    verdict = broken.verdict
    if verdict == "cannot tell" and cause and cause.suspicion == "strong" and cause.part.startswith(LABELS):
        verdict = "pipeline misaligned"  # the model's own answers convict them
    words, step = f"Most likely cause: {ended(cause.what)}" if cause else "", broken.next_step
    if not cause and verdict == "pipeline misaligned" and not has_fingerprint and broken.rung in _EXPLAINS:
        step = f"{step} {MAKE_REFERENCE}: it says what differs.".lstrip()
    where = f"{verdict} (rung {broken.rung}, {broken.what or RUNG_NAMES[broken.rung]}):"
    result = replace(result, verdict=verdict, rung=broken.rung, cause=cause.what if cause else broken.cause)
    return _saying(result, where, broken.text, step, words)


def _cause(result: PipelineResult, broken: BrokenRung, has_fingerprint: bool) -> PipelineDifference | None:
    """The most suspicious difference that could break this rung."""
    parts = _EXPLAINS.get(broken.rung, ())
    weak = _WEAK_CAUSES.get(broken.rung, ())
    rows = [row for row in result.differences.rows if any(row.part.startswith(part) for part in parts)]
    strong = [row for row in rows if row.suspicion == "strong"]
    causes = [row for row in strong if not row.part.startswith(_CONSEQUENCES)]
    causes += [row for row in rows if row.suspicion == "possible" and row.part == MODULES]
    causes += [row for row in rows if row.suspicion == "possible" and any(word in row.what for word in weak)]
    if causes or strong:
        return (causes or strong)[0]
    if not has_fingerprint and broken.rung in (BATCH_NORM_FIXED, BATCH_NORM_MOVING, FLOAT_FINETUNE):
        by_labels = (row for row in result.stages.rows if row.part.startswith(LABELS))
        return next(iter(result.stages.strong), next(by_labels, None))
    return None
