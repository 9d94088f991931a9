"""Whether the labels agree with the model's answers: labels that belong to other inputs do not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lightning_qat.analysis.fingerprint.difference import PipelineDifference, Suspicion
from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.tolerance import COLLAPSE, tolerance

LABELS = "labels"
"""The part of a pipeline whose labels do not agree with the model's answers."""


def is_a_guess(share: float, guess: float, error: float = 0.0) -> bool:
    """Whether a share of right answers is hardly better than the share of a constant guess.

    Args:
        share: share of the model's answers that are right.
        guess: share of the most frequent label.
        error: standard error of the share.

    Example:
        >>> is_a_guess(0.13, 0.11), is_a_guess(0.4, 0.11), is_a_guess(0.985, 0.98), is_a_guess(0.999, 0.98)
        (True, False, True, False)
    """
    return share - guess <= min(tolerance(error, least=COLLAPSE / 2), (1 - guess) / 4)


def agreement_error(fingerprint: Fingerprint, stage: str, name: str) -> float:
    """Return the standard error of a share of right answers, by the number of samples; 0 if that is not known.

    One right and one wrong answer are added (Laplace's rule of succession): eight right answers of eight are no proof.
    """
    target = name.rpartition("=")[2]
    samples = next((s.samples for s in fingerprint.data.get(stage, ()) if s.name == target), 0)
    share = fingerprint.agreement.get(stage, {}).get(name, 0.0)
    likely = (share * samples + 1) / (samples + 2)
    return math.sqrt(likely * (1 - likely) / samples) if samples else 0.0


def agreement_with_reference(
    reference: Fingerprint, here: Fingerprint, found: Sequence[PipelineDifference] = ()
) -> Iterator[PipelineDifference]:
    """Compare the agreement with that in the float run; a higher agreement is no fault.

    Args:
        reference: of the float run.
        here: of this run.
        found: the differences that are known already. Answers to another input, or of layers that compute something
            else, do not accuse the labels.
    """
    if reference.weights != here.weights:
        return  # it says as much about the weights
    for stage in (stage for stage in reference.agreement if stage in here.agreement):
        before, now = reference.agreement[stage], here.agreement[stage]
        for name in (name for name in before if name in now):
            errors = agreement_error(reference, stage, name), agreement_error(here, stage, name)
            if before[name] - now[name] > tolerance(*errors, least=COLLAPSE):
                row = _disagreement(stage, name, before[name], now[name], "the reference", "strong")
                yield _excused(row, stage, found)


def agreement_of_stages(here: Fingerprint, found: Sequence[PipelineDifference] = ()) -> Iterator[PipelineDifference]:
    """Compare the agreement in training with that in validation.

    An augmentation or mixed labels lower it in a healthy run as well, so only less than half of the model's agreement
    is strong evidence.

    Args:
        here: of this run.
        found: the differences between the stages that are known already.
    """
    before, now = here.agreement.get("validate", {}), here.agreement.get("train", {})
    for name in (name for name in before if name in now):
        errors = agreement_error(here, "validate", name), agreement_error(here, "train", name)
        if before[name] - now[name] > tolerance(*errors, least=COLLAPSE):
            guess = here.constant_guess.get("train", {}).get(name, 0.0)
            suspicion: Suspicion = "strong" if now[name] - guess < (before[name] - guess) / 2 else "possible"
            row = _disagreement("train", name, before[name], now[name], "validation", suspicion)
            yield _excused(row, "train", found)


def _excused(row: PipelineDifference, stage: str, found: Sequence[PipelineDifference]) -> PipelineDifference:
    """Name what the disagreement follows from, if the model's input or its layers differ."""
    for known in found:
        of_input = known.part.startswith("model input") and known.part.endswith(f"{stage})")
        if known.suspicion == "strong" and (of_input or known.part.startswith("layers")):
            return replace(row, suspicion="possible", what=f"{row.what} It may follow from: {known.what}")
    return row


def _disagreement(
    stage: str, name: str, before: float, now: float, where: str, suspicion: Suspicion
) -> PipelineDifference:
    output, _, target = name.rpartition("=")
    what = (
        f"{LABELS} ({stage}, {target}): {now:.0%} are what the model answers ({output}), in {where} {before:.0%}: do "
        "labels and inputs belong together (shuffled, shifted, other classes)?"
    )
    return PipelineDifference(suspicion, f"{LABELS} ({stage})", name, f"{before:.4g}", f"{now:.4g}", what)
