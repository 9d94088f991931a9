"""The whole ladder with one verdict: the pipeline, the hyperparameters or quantization (C3 to C6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from lightning_qat.analysis.fingerprint.difference import PipelineDifference, PipelineDifferences
from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.fingerprint.fingerprint_differences import compare_fingerprints, compare_stages
from lightning_qat.analysis.ladder.ladder_evidence import (
    against_fingerprint,
    calibrated_evidence,
    hyperparameter_evidence,
    is_loss_known,
    off_evidence,
    qat_evidence,
    quantized_zero_lr_evidence,
    training_loss_evidence,
)
from lightning_qat.analysis.ladder.measurements import (
    Finetune,
    PipelineRow,
    breaks,
    compare,
    judged,
    skipped_row,
    spelled,
)
from lightning_qat.analysis.ladder.pipeline import PipelineResult
from lightning_qat.analysis.ladder.pipeline_ladder import FINGERPRINT_COMMAND, NAMES, RUNGS, Ladder
from lightning_qat.analysis.ladder.rung_evidence import (
    NO_METRIC,
    Finding,
    Verdict,
    float_model_evidence,
    nothing_moved,
)
from lightning_qat.analysis.metric_direction import is_worse_when_larger
from lightning_qat.analysis.results import Block

_EXPLAINS: dict[int, tuple[str, ...]] = {
    0: ("weights", "model input (validate)", "data (validate)", "labels (validate)", "evaluation", "modes", "metric"),
    2: ("weights", "model input (train)", "data (train)", "labels (train)", "modes", "loss", "batch norm"),
    3: ("model input (train)", "data (train)", "modes", "batch norm", "settings", "loss"),
    5: ("model input (train)", "data (train)", "labels (train)", "optimizer", "settings", "scheduler", "loss"),
}
_WEAK_CAUSES = {3: ("batch_size", "momentum"), 5: ("gradient_clip", "class", "schedulers", "lr", "weight_decay")}
"""Differences that are common in healthy runs, and still the likeliest cause if just this rung breaks."""


def _no_differences() -> PipelineDifferences:
    return PipelineDifferences(())


@dataclass(frozen=True)
class PipelineCheckResult(PipelineResult):
    """Evidence of all rungs, one verdict, and what differs from the float pipeline.

    Args:
        rung: number of the rung that breaks first, None if none does.
        cause: the difference that explains it, in words; empty if none does.
        differences: to the reference, the most suspicious first.
        stages: of the model's inputs in training to those in validation.
    """

    rung: int | None = None
    cause: str = ""
    differences: PipelineDifferences = field(default_factory=_no_differences)
    stages: PipelineDifferences = field(default_factory=_no_differences)
    title: ClassVar[str] = "Pipeline check"

    def blocks(self) -> tuple[Block, ...]:
        """The table of the rungs, and those of the differences."""
        tables = (block for differences in self._differences() for block in differences.blocks())
        return (*super().blocks(), *(replace(table, note="") for table in tables))  # they begin with what it says

    def full_blocks(self) -> tuple[Block, ...]:
        """The table of the rungs, and those of the differences."""
        return (*super().full_blocks(), *(block for table in self._differences() for block in table.full_blocks()))

    def _differences(self) -> list[PipelineDifferences]:
        return [table for table in (self.differences, self.stages) if table.rows]


def judge_pipeline(
    ladder: Ladder,
    reference: Mapping[str, float] | Fingerprint | None = None,
    here: Fingerprint | None = None,
    rungs: Sequence[int] = RUNGS,
    flag: str = "",
) -> PipelineCheckResult:
    """Judge the ladder: the first rung that breaks names the culprit.

    Args:
        ladder: what was measured.
        reference: the float run: its fingerprint, or its metrics.
        here: the fingerprint of this pipeline with the weights it starts from.
        rungs: those asked for.
        flag: what ConvergenceMonitor has flagged, if that is why the check runs.

    Example:
        >>> from lightning_qat.analysis.ladder.measurements import Measurement
        >>> accuracy = Measurement({"val_acc": 0.9}, {"val_acc": 0.01})
        >>> collapsed = Finetune(Measurement({"val_acc": 0.1}), 50, moved_buffers={"bn.running_mean": 0.9})
        >>> kept = Finetune(accuracy, 50)
        >>> result = judge_pipeline(Ladder(accuracy, None, kept, collapsed), rungs=(0, 2, 3))
        >>> result.verdict, result.rung
        ('pipeline misaligned', 3)
    """
    known = reference if isinstance(reference, Fingerprint) else None
    metrics = dict(reference) if isinstance(reference, Mapping) else {}
    stages = compare_stages(here) if here is not None else PipelineDifferences(())
    differences = compare_fingerprints(known, here) if known and here else PipelineDifferences(())
    rows, findings = float_model_evidence(ladder.float_model, metrics)
    if known and here:
        rows, findings = against_fingerprint(known, here, ladder.float_model)
    for found_rows, found in (
        off_evidence(ladder),
        quantized_zero_lr_evidence(ladder, metrics, [n for n in rungs if n < 4]),
        training_loss_evidence(known, here, rungs),
        calibrated_evidence(ladder, rungs),
        quantized_zero_lr_evidence(ladder, metrics, [n for n in rungs if n == 4]),
        hyperparameter_evidence(ladder, rungs, is_loss_known(ladder, reference, here)),
        qat_evidence(ladder, rungs),
    ):
        rows += found_rows
        findings += found
    rows = [row for row in rows if row.rung in rungs]
    rows += [skipped_row(number, NAMES[number], why) for number, why in ladder.missing.items()]
    rows.sort(key=lambda row: row.rung)
    result = PipelineCheckResult(tuple(rows), differences=differences, stages=stages)
    findings.sort(key=lambda finding: finding.rung)
    if findings:
        return _convicted(result, findings[0], known is not None)
    if max(rungs) >= 2 and not judged([row for row in rows if row.rung >= 2]):
        return replace(result, note=f"cannot tell: {NO_METRIC}")
    if ladder.float_finetune and not ladder.float_finetune.changed_parameters:
        return replace(result, note=f"cannot tell: {nothing_moved(ladder.float_finetune)}", rung=5)
    if flag:
        return replace(result, note=_nothing_found(ladder, flag))
    if better := _better_after_training(ladder, rows):
        return replace(result, note=better)
    suspicious = (
        f" Yet there is a suspicious difference: {_ended(differences.strong[0].what)}" if differences.strong else ""
    )
    return replace(result, verdict="healthy", note=_healthy(ladder, rows, reference) + suspicious)


def _convicted(result: PipelineCheckResult, finding: Finding, has_reference: bool) -> PipelineCheckResult:
    cause = _cause(result, finding, has_reference)
    verdict: Verdict = finding.verdict
    if verdict == "cannot tell" and cause and cause.part.startswith("labels"):
        verdict = "pipeline misaligned"  # the model's own answers convict them
    where = f"{verdict} (rung {finding.rung}, {NAMES[finding.rung]})"
    words = f" Most likely cause: {_ended(cause.what)}" if cause else ""
    if not cause and verdict == "pipeline misaligned" and not has_reference and finding.rung in _EXPLAINS:
        words = f" To see what differs, make a reference in the float project: {FINGERPRINT_COMMAND}."
    return replace(
        result,
        verdict=verdict,
        note=f"{where}: {finding.text}{words}",
        rung=finding.rung,
        cause=cause.what if cause else "",
    )


def _cause(result: PipelineCheckResult, finding: Finding, has_reference: bool) -> PipelineDifference | None:
    """The most suspicious difference that could break this rung."""
    parts = _EXPLAINS.get(finding.rung, ())

    def fits(row: PipelineDifference) -> bool:
        return any(row.part.startswith(part) for part in parts)

    rows = result.differences.rows
    for row in rows:
        if row.suspicion == "strong" and fits(row):
            return row
    for row in rows:
        if row.suspicion == "possible" and fits(row) and any(w in row.what for w in _WEAK_CAUSES.get(finding.rung, ())):
            return row
    if not has_reference and finding.rung in (2, 3, 5):
        return next((row for row in result.stages.rows if row.suspicion == "strong"), None)
    return None


def _ended(what: str) -> str:
    return what if what.endswith("?") else f"{what}."


def _nothing_found(ladder: Ladder, flag: str) -> str:
    finetune = ladder.qat or ladder.float_finetune or ladder.batch_norm_frozen
    batches = finetune.batches if finetune else 0
    return (
        f"cannot tell: ConvergenceMonitor has flagged this run ({flag}), and from the weights it started from nothing "
        f"breaks within {batches} batches. Look for longer: PipelineCheck(batches={10 * max(1, batches)}), and do what "
        "convergence.txt says."
    )


def _better_after_training(ladder: Ladder, rows: Sequence[PipelineRow]) -> str:
    """Say that a few batches make another model of the float model, if there is no reference: it was not good here."""
    finetune = ladder.float_finetune or ladder.qat
    if finetune is None or any(row.rung == 0 and row.status == "holds" for row in rows):
        return ""
    worse = judged(compare(0, "", finetune.after.metrics, ladder.float_model, finetune.after))
    changes = [f"{row.metric} {row.value:.4g} -> {row.expected:.4g}" for row in worse if row.status == "breaks"]
    if not changes:
        return ""
    return (
        f"cannot tell: {finetune.batches} batches of training make the float model far better "
        f"({', '.join(changes[:2])}), so it was not good to begin with. Are these the weights of the float run "
        "(init_from), and is the data prepared as it was there? The float run's fingerprint says what differs: "
        f"{FINGERPRINT_COMMAND}; then PipelineCheck(reference='pipeline_fingerprint.json')."
    )


def _healthy(ladder: Ladder, rows: Sequence[PipelineRow], reference: Mapping[str, float] | Fingerprint | None) -> str:
    batches = max((f.batches for f in _finetunes(ladder)), default=0)
    parts = [f"healthy: every rung holds, with {batches} batches each."]
    small = [row for row in judged([row for row in rows if row.rung >= 3]) if row.status == "falls"]
    if ladder.calibrated is not None and breaks(
        compare(4, "", ladder.float_model.metrics, ladder.calibrated, ladder.float_model)
    ):
        worst = f"; worst points: {'; '.join(ladder.points)}" if ladder.points else ""
        parts.append(f"Calibration alone loses the accuracy, and QAT wins it back: train on{worst}.")
    elif small:
        parts.append(f"Rung {small[0].rung} falls a little ({spelled(small[:1])}), which is no collapse.")
    elif risen := [row for row in rows if row.status == "breaks"]:  # costs: scores decide where there are any
        parts.append(f"A cost rises on rung {risen[0].rung} ({spelled(risen[:1])}), and the scores hold all the same.")
    if not any(row.rung == 0 and row.status == "holds" for row in rows):
        logged = ladder.float_model.metrics
        given = f" (it logs {', '.join(logged)}, not {', '.join(reference)})" if isinstance(reference, Mapping) else ""
        name = next((n for n in logged if not is_worse_when_larger(n)), next(iter(logged), "val_acc"))
        parts.append(
            f"Whether the float model itself, its labels and its loss are right cannot be told without a reference"
            f"{given}. Make one in the float project: {FINGERPRINT_COMMAND}; then PipelineCheck(reference="
            f"'pipeline_fingerprint.json'), or give its metrics: reference={{{name!r}: ...}}."
        )
    return " ".join(parts)


def _finetunes(ladder: Ladder) -> Iterator[Finetune]:
    rungs = (ladder.batch_norm_frozen, ladder.batch_norm_moving, ladder.quantized, ladder.float_finetune, ladder.qat)
    return (one for one in rungs if one is not None)
