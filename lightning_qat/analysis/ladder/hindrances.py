"""Hyperparameters that keep training from moving the model as it does in float, though they destroy nothing.

QAT starts from trained weights and has a tenth to a twentieth of the float run's learning rate. How far it moves them
depends on the size of its steps, on how many of them it makes of its samples, and on what the schedule leaves of the
learning rate. Each is compared with the float run's, if its fingerprint is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_qat.analysis.fingerprint.difference import PipelineDifferences
from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.fingerprint.module_differences import FROZEN, UPDATES, newly_frozen
from lightning_qat.analysis.fingerprint.training_plan import TrainingPlan
from lightning_qat.analysis.ladder.measurements import Ladder
from lightning_qat.analysis.ladder.rows import PipelineRow, compare, format_falls, judged
from lightning_qat.analysis.ladder.rungs import FLOAT_FINETUNE, RUNG_NAMES, BrokenRung
from lightning_qat.analysis.ladder.sentences import ended, worst_points
from lightning_qat.analysis.ladder.training_rungs import LONG_TRAINING

LEAST_REACH = 1 / 128
"""How far QAT moves the weights with the samples that move them by 1 in float: less is a sixth of what is usual."""
USUAL_STEP = 1 / 50
"""The smallest step that is usual in QAT, relative to that of the float run."""
USUAL_SHARE = 1 / 4
"""What schedules leave of the highest learning rate at least, on average; the same is asked of the number of steps."""
LEAST_SHARE = 1 / 20
"""A schedule that leaves less is over soon after it begins."""
STANDS_STILL = 0.003
"""Relative change of weights, all steps in one direction, that hardly rounds any of them otherwise."""
CLIPPED_AWAY = 0.05
"""Clipping that leaves less of the gradient than this is why steps are small."""
HIGH_START = 5.0
"""A schedule that begins so many times above the learning rate that was set is no warm-up."""
LARGE_DECAY = 0.3
"""Weight decay that takes more of the weights until the planned end moves them more than the data do."""
OTHER_BATCH = 16.0
"""So many times fewer samples in a step make another training."""
SHORT_MOMENTUM = 20
"""Steps over which momentum may average however short a training is."""
LARGE_PART = 1 / 2
"""Share of what the float run updates; a training without so much of it can hardly move the model."""


def hindrances(reference: Fingerprint | None, here: Fingerprint | None) -> list[str]:
    """Return what keeps training from moving the model, with the setting: one sentence each, without its end.

    Args:
        reference: of the float run, if it is known.
        here: of this run, ahead of its first step.
    """
    if here is None or here.plan is None:
        return []
    known = reference.plan if reference is not None else None
    reach = _short_reach(reference, known, here, here.plan) if reference is not None and known is not None else ()
    return [*reach, *_alone(here, here.plan, known)]


def frozen_parts(differences: PipelineDifferences) -> list[str]:
    """Return what training updates in the float run only, in sentences as those of :func:`hindrances`.

    Often it is a small part, such as one bias, and no reason why training wins nothing back.
    """
    return [row.what for row in differences.rows if row.part == UPDATES and row.value == FROZEN]


def is_largely_frozen(reference: Fingerprint, here: Fingerprint) -> bool:
    """Whether training does not update a large part of what the float run updates.

    Args:
        reference: of the float run.
        here: of this run. Without the sizes of its parameters the answer is no.
    """
    sizes = {n: size for n, size in (here.sizes or {}).items() if n.rpartition(".")[0] in reference.weights}
    updated = sum(size for name, size in sizes.items() if name not in (reference.untrained or ()))
    frozen = sum(sizes.get(name, 0) for name in newly_frozen(reference, here))
    return frozen > 0 and frozen >= LARGE_PART * updated


def plan_rows(reference: Fingerprint | None, here: Fingerprint | None) -> list[PipelineRow]:
    """Return what was measured of both trainings, as evidence that is not judged alone."""
    plan = here.plan if here is not None else None
    known = (reference.plan if reference is not None else None) or TrainingPlan()
    if plan is None:
        return []
    numbers: list[tuple[str, float | None, float | None, str]] = [
        (f"update per step, group {i}", known.updates[i] if i < len(known.updates) else None, update, _UPDATE)
        for i, update in enumerate(plan.updates)
    ]
    numbers.append(("samples per step", known.samples, plan.samples, ""))
    numbers += [
        (f"mean of highest lr, group {i}", known.rate_shares[i] if i < len(known.rate_shares) else None, share, _SHARE)
        for i, share in enumerate(plan.rate_shares)
    ]
    numbers.append(("gradient kept", known.kept, plan.kept, _KEPT))
    return [
        PipelineRow(FLOAT_FINETUNE, RUNG_NAMES[FLOAT_FINETUNE], name, before, value, None, "noted", note)
        for name, before, value, note in numbers
        if value is not None
    ]


_UPDATE = "relative change of the weights in one step at the highest learning rate"
_SHARE = "mean learning rate of the schedule, as a fraction of its highest"
_KEPT = "fraction of the gradient that clipping leaves"


def prevention(ladder: Ladder, found: Sequence[str]) -> list[BrokenRung]:
    """Blame the hyperparameters where calibration has lost accuracy and training wins back less than half of it.

    This is for trainings that were compared with the float run's: what stands out in a training alone proves nothing.

    Args:
        ladder: what was measured.
        found: what keeps training from moving the model.
    """
    if not found or ladder.calibrated is None or ladder.qat is None or ladder.calibration:
        return []
    before = ladder.float_model
    lost = [row for row in judged(compare(before.metrics, ladder.calibrated, before)) if row.status != "holds"]
    after = {row.metric: row for row in compare(before.metrics, ladder.qat.after, before)}
    still = [after[row.metric] for row in lost if row.metric in after and _still_lost(row, after[row.metric])]
    if not still:
        return []
    text = (
        f"calibration loses accuracy ({format_falls(lost)}), and training can hardly win it back "
        f"({format_falls(still)} in QAT): {ended('; '.join(found[:2]))}"
    )
    step = "Mend this and check again, before you look for quantization error."
    step = f"{step} {worst_points(ladder.points)}".rstrip()
    return [BrokenRung(FLOAT_FINETUNE, "hyperparameters", text, step, cause=found[0])]


def _still_lost(calibrated: PipelineRow, trained: PipelineRow) -> bool:
    if trained.status == "holds" or calibrated.expected is None or calibrated.value is None or trained.value is None:
        return False
    return not abs(trained.value - calibrated.expected) < abs(calibrated.value - calibrated.expected) / 2  # NaN is lost


def _short_reach(reference: Fingerprint, known: TrainingPlan, here: Fingerprint, plan: TrainingPlan) -> Iterator[str]:
    """What makes the weights move far less than in the float run, with as many samples."""
    most, first = _groups_that_move_most(plan, known)
    if first is None or most is None:
        return
    step = plan.updates[most] / known.updates[first]
    share = plan.rate_shares[most] / known.rate_shares[first]
    steps = known.samples / plan.samples if known.samples and plan.samples else 1.0
    if not step * share * steps < LEAST_REACH:
        return
    factors = {"step": step / USUAL_STEP, "share": share / USUAL_SHARE, "steps": steps / USUAL_SHARE}
    least = min(factors, key=lambda name: factors[name])
    unusual = [name for name, factor in factors.items() if factor < 1] or [least]
    if "step" in unusual:
        rate = f" (float run: {known.rates[first]:.3g})"
        yield (
            f"a step moves the weights by {plan.updates[most]:.2g} of their length (float run: "
            f"{known.updates[first]:.2g}): {_setting_of_step(here, plan, most, rate)}"
        )
    if "share" in unusual:
        yield _schedule(here, plan, most, reference)
    if "steps" in unusual:
        yield (
            f"a step takes {plan.samples:g} samples (float run: {known.samples:g}), so that {plan.steps} steps are "
            f"planned: {_changed(('accumulate_grad_batches', 'batch_size', 'world_size'), reference, here)}"
        )


def _groups_that_move_most(plan: TrainingPlan, known: TrainingPlan) -> tuple[int | None, int | None]:
    """The group that moves most, compared with the float run's; there the same one, if the groups are the same."""
    here, before = ([u * s for u, s in zip(p.updates, p.rate_shares, strict=False)] for p in (plan, known))
    moving = [i for i, moved in enumerate(before) if moved > 0]
    if not here or not moving:
        return None, None
    if len(here) == len(before):
        most = max(moving, key=lambda i: here[i] / before[i])
        return most, most
    return here.index(max(here)), before.index(max(before))


def _setting_of_step(here: Fingerprint, plan: TrainingPlan, group: int, known: str = "") -> str:
    if plan.kept is not None and plan.kept < CLIPPED_AWAY:
        return f"gradient_clip_val {here.settings.get('gradient_clip_val')} leaves {plan.kept:.1g} of the gradient"
    return f"the highest learning rate is {plan.rates[group]:.3g}{known}"


def _changed(names: Sequence[str], reference: Fingerprint, here: Fingerprint) -> str:
    values = [(name, reference.settings.get(name), here.settings.get(name)) for name in names]
    return ", ".join(f"{name} {before} -> {now}" for name, before, now in values if before != now)


def _schedule(here: Fingerprint, plan: TrainingPlan, group: int, reference: Fingerprint | None) -> str:
    float_run = f" (float run: {_schedulers(reference)})" if reference is not None else ""
    return (
        f"the schedule leaves {plan.rate_shares[group]:.1%} of the highest learning rate, on average over the "
        f"{plan.steps} planned steps: {_schedulers(here)}{float_run}; should it step once per epoch?"
    )


def _schedulers(fingerprint: Fingerprint) -> str:
    return ", ".join(f"{s.get('class')} per {s.get('interval')}" for s in fingerprint.schedulers) or "no scheduler"


def _alone(here: Fingerprint, plan: TrainingPlan, known: TrainingPlan | None) -> Iterator[str]:
    """What stands out in this training alone; the float run may excuse it."""
    usual = known or TrainingPlan()
    if plan.rate_shares and plan.steps and (most := max(plan.rate_shares)) < LEAST_SHARE and known is None:
        yield _schedule(here, plan, plan.rate_shares.index(most), None)
    steps = max(plan.steps, LONG_TRAINING)
    moved = [steps * u * s for u, s in zip(plan.updates, plan.rate_shares, strict=False)]
    if known is None and moved and max(moved) < STANDS_STILL:
        group = moved.index(max(moved))
        yield (
            f"{steps} steps in one direction would move the weights by {moved[group]:.2g} of their length: "
            f"{_setting_of_step(here, plan, group)}"
        )
    if plan.steps and plan.horizon > max(plan.steps / 2, 5 * usual.horizon, SHORT_MOMENTUM):
        before = f" (float run: {usual.horizon:.3g})" if known is not None else ""
        yield f"momentum averages over {plan.horizon:.3g} steps{before}, and {plan.steps} are planned"
    for number, (base, first) in enumerate(zip(plan.base_rates, plan.first_rates, strict=False)):
        if base > 0 and first >= HIGH_START * base:
            yield f"the schedule begins at {first:.3g}, {first / base:.3g} times the learning rate of group {number}"
            break
    decay, before_decay = max(plan.decays, default=0.0), max(usual.decays, default=0.0)
    if known is not None and decay > LARGE_DECAY and decay > 2 * before_decay:  # a long training takes them all
        yield f"weight decay takes {decay:.0%} of the weights until the planned end (float run: {before_decay:.0%})"
    if known is not None and known.samples and plan.samples and known.samples / plan.samples >= OTHER_BATCH:
        samples = f"{plan.samples:g} sample{'' if plan.samples == 1 else 's'}"
        yield f"a step takes {samples} (float run: {known.samples:g}), so its gradient is mostly noise"
