"""Reasons not to call a ladder healthy although no rung breaks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from lightning_qat.analysis.fingerprint.difference import PipelineDifferences
from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.fingerprint.label_agreement import LABELS, agreement_error, is_a_guess
from lightning_qat.analysis.ladder.measurements import Ladder
from lightning_qat.analysis.ladder.rows import PipelineRow, compare, judged
from lightning_qat.analysis.ladder.rungs import (
    FLOAT_FINETUNE,
    FLOAT_MODEL,
    TRAINING_RUNGS,
    ZERO_LR_RUNGS,
    Verdict,
)
from lightning_qat.analysis.ladder.sentences import MAKE_REFERENCE, NO_METRIC, Said, ended, nothing_moved
from lightning_qat.analysis.ladder.training_rungs import Reference, is_loss_known
from lightning_qat.analysis.metric_direction import higher_is_better, is_quality
from lightning_qat.quantization.counts import number_of

_TRAINING_LABELS = f"{LABELS} (train)"


@dataclass(frozen=True)
class Doubt:
    """Why the verdict is not ``healthy``.

    Args:
        text: the reason.
        next_step: what to do.
        verdict: the verdict instead of ``healthy``.
        rung: the rung that shows it, if one does.
        cause: the difference that explains it, in words; empty if there is none.
    """

    text: str
    next_step: str = ""
    verdict: Verdict = "cannot tell"
    rung: int | None = None
    cause: str = ""


def doubts(
    ladder: Ladder,
    rows: Sequence[PipelineRow],
    rungs: Collection[int],
    reference: Reference,
    here: Fingerprint | None,
    tables: tuple[PipelineDifferences, PipelineDifferences],
    flag: str,
) -> Iterator[Doubt]:
    """Yield the reasons against ``healthy``, the gravest first.

    Args:
        ladder: what was measured; no rung breaks.
        rows: the evidence.
        rungs: those asked for.
        reference: the float run, if it is known.
        here: the fingerprint of this pipeline, if it was taken.
        tables: the differences from the float run, and those of training from validation.
        flag: what ConvergenceMonitor has flagged, if that is why the check runs.
    """
    differences, stages = tables
    # a float run that was compared has these rows as differences, if it did not have them itself
    table = differences if isinstance(reference, Fingerprint) else stages
    yield from _guessed_labels(table, here)
    if reason := _nothing_judged(ladder, rows, rungs):
        yield Doubt(*reason)
    if ladder.float_finetune and not ladder.float_finetune.changed_parameters:
        yield Doubt(*nothing_moved(ladder.float_finetune), rung=FLOAT_FINETUNE)
    if flag:
        yield Doubt(*_nothing_found(ladder, flag))
    is_known = isinstance(reference, Fingerprint) or any(r.rung == FLOAT_MODEL and r.status == "holds" for r in rows)
    if FLOAT_MODEL in rungs and not is_known:
        yield from _constant_guess(ladder, here)
        yield from _better_after_training(ladder)
    inputs = () if is_loss_known(reference, here) or ladder.batch_norm_moving is not None else stages.strong
    for row in [*(row for row in table.strong if row.part == _TRAINING_LABELS), *inputs]:
        text = f"no rung breaks, and yet training does not fit validation. {ended(row.what)}"
        yield Doubt(text, f"{MAKE_REFERENCE}.")


def _guessed_labels(table: PipelineDifferences, here: Fingerprint | None) -> Iterator[Doubt]:
    """Labels of the training data that have nothing to do with what the model answers.

    Where the input or the layers differ as well, they are the cause.
    """
    here = here or Fingerprint()
    for row in (row for row in table.rows if row.part == _TRAINING_LABELS):
        guess, share = (shares.get("train", {}).get(row.name) for shares in (here.constant_guess, here.agreement))
        if guess is not None and share is not None and is_a_guess(share, guess):
            cause = row.what if row.suspicion == "strong" else table.strong[0].what
            text = f"no rung breaks so soon, but the model's answers do not fit the training labels. {ended(cause)}"
            yield Doubt(text, verdict="pipeline misaligned", cause=cause)


def _constant_guess(ladder: Ladder, here: Fingerprint | None) -> Iterator[Doubt]:
    """Without a reference: the float model answers no better than one that does not look at its input."""
    if here is None:
        return
    known, guesses = here.agreement.get("validate", {}), here.constant_guess.get("validate", {})
    names = [name for name in known if name in guesses]
    if not names or not all(is_a_guess(known[n], guesses[n], agreement_error(here, "validate", n)) for n in names):
        return
    name = names[0]
    share, guess = known[name], guesses[name]
    logged = ladder.float_model.metrics
    scores = [value for metric, value in logged.items() if higher_is_better(metric) and is_quality(metric)]
    if any(not is_a_guess(score, guess) for score in scores if score <= 1):
        return  # its answers are read in another way
    yield Doubt(
        f"the float model is no better than a constant guess ({share:.0%} of {name.rpartition('=')[0]}'s answers are "
        f"right, the most frequent label alone gives {guess:.0%}), so there is nothing here that a check could see "
        "break.",
        "Are these the weights of the float run (init_from), and is the data prepared as it was there? "
        f"{MAKE_REFERENCE}.",
    )


def _nothing_judged(ladder: Ladder, rows: Sequence[PipelineRow], rungs: Collection[int]) -> Said | None:
    """Say why no rung that trains could be judged; None if one was, or if none was asked for."""
    asked = [rung for rung in rungs if rung in (*ZERO_LR_RUNGS, *TRAINING_RUNGS)]
    if not asked or judged([row for row in rows if row.rung in asked]):
        return None
    if all(rung in ladder.missing for rung in asked):
        return ladder.missing[asked[0]], ""
    return NO_METRIC


def _nothing_found(ladder: Ladder, flag: str) -> Said:
    finetune = ladder.qat or ladder.float_finetune or ladder.batch_norm_fixed
    batches = finetune.batches if finetune else 0
    return (
        f"ConvergenceMonitor has flagged this run ({flag}), and from the weights it started from nothing breaks within "
        f"{number_of(batches, 'batch')}."
    ), f"Look for longer: PipelineCheck(batches={10 * max(1, batches)}), and do what convergence.txt says."


def _better_after_training(ladder: Ladder) -> Iterator[Doubt]:
    """Without a reference: a few batches improve the float model a lot, so it was not good here."""
    finetune = ladder.float_finetune or ladder.qat
    if finetune is None:
        return
    worse = judged(compare(finetune.after.metrics, ladder.float_model, finetune.after))
    worse = [row for row in worse if higher_is_better(row.metric)] or worse  # an error often has room to fall
    changes = [f"{row.metric} {row.value:.4g} -> {row.expected:.4g}" for row in worse if row.status == "breaks"]
    if changes:
        yield Doubt(
            f"after {number_of(finetune.batches, 'batch')} of training the float model is far better "
            f"({', '.join(changes[:2])}), so it was not good to begin with.",
            "Are these the weights of the float run (init_from), and is the data prepared as it was there? "
            f"{MAKE_REFERENCE}: it says what differs.",
        )
