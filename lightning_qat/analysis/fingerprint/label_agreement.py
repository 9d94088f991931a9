"""Whether the labels agree with the model's answers: labels that belong to other inputs do not."""

from __future__ import annotations

import math
from collections.abc import Iterator

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
    """Return the standard error of a share of right answers, by the number of samples; 0 if that is not known."""
    target = name.rpartition("=")[2]
    samples = next((s.samples for s in fingerprint.data.get(stage, ()) if s.name == target), 0)
    share = fingerprint.agreement.get(stage, {}).get(name, 0.0)
    return math.sqrt(share * (1 - share) / samples) if samples else 0.0


def agreement_with_reference(reference: Fingerprint, here: Fingerprint) -> Iterator[PipelineDifference]:
    """Compare the agreement with that in the float run; a higher agreement is no fault."""
    if reference.weights != here.weights:
        return  # it says as much about the weights
    for stage in (stage for stage in reference.agreement if stage in here.agreement):
        before, now = reference.agreement[stage], here.agreement[stage]
        for name in (name for name in before if name in now):
            errors = agreement_error(reference, stage, name), agreement_error(here, stage, name)
            if before[name] - now[name] > tolerance(*errors, least=COLLAPSE):
                yield _disagreement(stage, name, before[name], now[name], "the reference", "strong")


def agreement_of_stages(here: Fingerprint) -> Iterator[PipelineDifference]:
    """Compare the agreement in training with that in validation.

    An augmentation or mixed labels lower it in a healthy run as well, so only less than half of the model's agreement
    is strong evidence.
    """
    before, now = here.agreement.get("validate", {}), here.agreement.get("train", {})
    for name in (name for name in before if name in now):
        errors = agreement_error(here, "validate", name), agreement_error(here, "train", name)
        if before[name] - now[name] > tolerance(*errors, least=COLLAPSE):
            guess = here.constant_guess.get("train", {}).get(name, 0.0)
            suspicion: Suspicion = "strong" if now[name] - guess < (before[name] - guess) / 2 else "possible"
            yield _disagreement("train", name, before[name], now[name], "validation", suspicion)


def _disagreement(
    stage: str, name: str, before: float, now: float, where: str, suspicion: Suspicion
) -> PipelineDifference:
    output, _, target = name.rpartition("=")
    what = (
        f"{LABELS} ({stage}, {target}): {now:.0%} are what the model answers ({output}), in {where} {before:.0%}: do "
        "labels and inputs belong together (shuffled, shifted, other classes)?"
    )
    return PipelineDifference(suspicion, f"{LABELS} ({stage})", name, f"{before:.4g}", f"{now:.4g}", what)
